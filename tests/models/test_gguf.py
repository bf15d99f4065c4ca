"""GGUF files that are written here, from models that are known: read exactly, or refused in words."""

import gguf
import numpy as np
import pytest
import torch
from every_family import family_model
from gguf import RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import kvprune
from ggufs import CONVERTED, as_gguf, capped, converted, windowed, write_gguf
from kvprune import errors
from tiny import QUICK, tiny_model, tiny_tokenizer


@pytest.fixture
def written(tmp_path):
    """Writes a model as a float32 .gguf file, with further tensors, and with `more(writer)` said of it."""
    return lambda model, *given, name="tiny.gguf", **said: write_gguf(model, tmp_path / name, *given, **said)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_it_is_the_model_it_was_written_from(written, tmp_path, family):
    model = tiny_model(family, kv_heads=2, groups=2, head_dim=32, layers=2)
    path = written(model)
    ids = torch.randint(3, 300, (1, 7))
    loaded = kvprune.load(path, dtype="float32")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")  # as a plain dense checkpoint
    assert torch.equal(kvprune.load(tmp_path / "again")(ids).logits, loaded(ids).logits)
    assert kvprune.load(path).dtype == torch.bfloat16


@torch.no_grad()
def test_a_hybrid(tmp_path):
    """Which of its blocks have attention is said by their numbers of KV heads."""
    model = family_model("lfm2")
    config, writer = model.config, gguf.GGUFWriter(tmp_path / "lfm2.gguf", "lfm2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(model.model.layers[0].feed_forward.w1.out_features)
    writer.add_head_count(config.num_attention_heads)
    heads = {"full_attention": config.num_key_value_heads, "conv": 0}
    writer.add_head_count_kv([heads[kind] for kind in config.layer_types])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if stem != "lm_head":  # tied
            writer.add_tensor(f"{names.get_name(stem)}.{leaf}", np.ascontiguousarray(tensor.squeeze().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.randint(3, 300, (1, 7))
    loaded = kvprune.load(tmp_path / "lfm2.gguf", dtype="float32")
    assert loaded.config.layer_types == config.layer_types
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONVERTED)
@torch.no_grad()
def test_what_transformers_leaves_at_a_default(kind, tmp_path):
    model, path = converted(*CONVERTED[kind], tmp_path)
    ids = torch.randint(3, 300, (1, 50))
    loaded = kvprune.load(path, dtype="float32")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def linear(writer):
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def factor_only(writer):
    writer.add_rope_scaling_factor(4.0)


def yarn(writer):
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def nothing(writer):
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_rope_scaling_factor(4.0)


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


SCALED = {
    "linear": (linear, "llama", rope(rope_type="linear", factor=4.0)),
    "linear, untold": (factor_only, "llama", rope(rope_type="linear", factor=4.0)),
    "yarn": (yarn, "qwen2", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "none": (nothing, "llama", {}),
}


@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_rope_scaling_is_read(written, kind):
    said, family, options = SCALED[kind]
    model = tiny_model(family, head_dim=32, **options)
    ids = torch.randint(3, 300, (1, 100))
    expected = model(ids).logits
    if kind != "none":
        assert not torch.allclose(expected, tiny_model(family, head_dim=32)(ids).logits, atol=1e-3)
    loaded = kvprune.load(written(model, more=said), dtype="float32")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)


def test_yarn_turns_as_llama_cpp_does(written):
    """Against ggml's rope_yarn, written again from its ops.cpp: the test above compares transformers with itself."""
    base, dim, factor, original = 10000.0, 32, 4.0, 32

    def corrected(rotations):
        return dim * np.log(original / (rotations * 2 * np.pi)) / (2 * np.log(base))

    low, high = max(0, np.floor(corrected(32.0))), min(dim - 1, np.ceil(corrected(1.0)))
    expected = []
    for pair in range(dim // 2):
        plain = base ** (-2 * pair / dim)
        mix = 1 - min(1, max(0, (pair - low) / max(0.001, high - low)))
        expected.append(plain / factor * (1 - mix) + plain * mix)
    rotary = kvprune.load(written(tiny_model("llama", head_dim=dim), more=yarn), dtype="float32").model.rotary_emb
    np.testing.assert_allclose(rotary.inv_freq.numpy(), expected, rtol=1e-6)
    assert rotary.attention_scaling == pytest.approx(1 + 0.1 * np.log(factor))


@torch.no_grad()
def test_the_frequency_factors_of_llama_3_1_are_read_and_kept(written, texts, tmp_path):
    """rope_freqs.weight divides the frequencies; pruned, in every layout, they stay."""
    model = tiny_model("llama3-rope", head_dim=32)
    own, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    tensors = as_gguf(model) | {"rope_freqs.weight": (plain / own).numpy()}
    path = written(model, tensors)
    ids = torch.randint(3, 300, (1, 100))
    expected = model(ids).logits
    loaded = kvprune.load(path, dtype="float32")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)
    tokenizer = tiny_tokenizer()
    loaded.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    for layout in ("per-layer", "portable"):
        kvprune.prune(tmp_path / "dense", tmp_path / layout, ratio=0.0, layout=layout, **QUICK)
        torch.testing.assert_close(kvprune.load(tmp_path / layout)(ids).logits, expected, rtol=0, atol=1e-5)
    half = written(model, tensors, linear, name="half.gguf")  # both at once
    rotary = kvprune.load(half, dtype="float32").model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, own / 4, rtol=1e-5, atol=0)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def more_tensors(name):
    return lambda tensors: tensors | {name: np.zeros(4, dtype=np.float32)}


def unknown_key(name, value):
    return lambda writer: writer.add_float32(name, value)


def longrope(writer):
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_factor(4.0)


def part(writer):
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 3)


def same(thing):
    return thing


def half_rotary(writer):
    del writer.kv_data[0]["llama.rope.dimension_count"]
    writer.add_rope_dimension_count(16)


def silent(writer):
    pass


def pattern(writer):
    writer.add_sliding_window_pattern([True, False])


def local_base(writer):
    writer.add_rope_freq_base_swa(50.0)


def not_causal(writer):
    writer.add_causal_attention(False)


WRONG = {
    "a tensor is missing": (without("blk.1.attn_k.weight"), silent, "lacks blk.1.attn_k.weight: .* plain llama"),
    "prefixed": (lambda t: {f"model.{k}": v for k, v in t.items()}, silent, "lacks blk.0.attn_k.weight and .* more"),
    "a bias that Llama has no place for": (more_tensors("blk.0.attn_q.bias"), silent, "has blk.0.attn_q.bias"),
    "experts": (more_tensors("blk.0.ffn_gate_inp.weight"), silent, "ffn_gate_inp"),
    "another scaling": (same, longrope, "'longrope'.*checkpoint"),
    "yarn of its own kind": (same, unknown_key("llama.rope.scaling.yarn_beta_fast", 8.0), "yarn_beta_fast"),
    "a scale": (same, unknown_key("llama.logit_scale", 0.5), "llama.logit_scale.*checkpoint"),
    "partial rotary": (same, half_rotary, "partial rotary"),
    "a number for each layer": (same, pattern, "sliding_window_pattern.*checkpoint"),
    "a table for windows": (same, local_base, "rope.freq_base_swa.*checkpoint"),
    "it looks ahead": (same, not_causal, "looks ahead"),
    "named as what transformers fails on": (same, lambda writer: writer.add_name("mistral"), "mistral.*checkpoint"),
    "a part": (same, part, "llama-gguf-split --merge"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_be_another_model_is_refused(written, kind):
    change, said, message = WRONG[kind]
    model = tiny_model("llama", head_dim=32)
    path = written(model, change(as_gguf(model)), said)
    for use in (kvprune.load, lambda path: kvprune.fit(path, memory="1GB", context=8)):
        with pytest.raises(errors.KVPruneError, match=message) as caught:
            use(path)
        assert "\n" not in str(caught.value)


GEMMAS = {
    "a head of its own": (
        "gemma2",
        {"tie_word_embeddings": False},
        capped,
        "GGUF has no lm_head of gemma2.*checkpoint",
    ),
    "yarn in windows": ("gemma3_text", {"sliding_window": 6}, lambda w: (windowed(w), yarn(w)), "RoPE scaling.*family"),
}


@pytest.mark.parametrize("kind", GEMMAS)
def test_gemmas_that_are_refused(kind, tmp_path):
    family, options, more, message = GEMMAS[kind]
    _, path = converted(family, {"head_dim": 32, **options}, more, tmp_path)
    with pytest.raises(errors.UnsupportedArchitecture, match=message) as caught:
        kvprune.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [5, 40, 3000, -100], ids=str)
def test_a_cut_file_is_called_so(written, left):
    path = written(tiny_model("llama"))
    path.write_bytes(path.read_bytes()[:left])
    for use in (kvprune.load, kvprune.load_tokenizer):
        with pytest.raises(errors.BrokenCheckpoint, match=r"truncated.*fetch it again"):
            use(path)


def test_an_adapter_beside_it_is_refused(written):
    """transformers would look for it in the file's folder, and load it on top."""
    path = written(tiny_model("llama"))
    kvprune.load(path)
    (path.parent / "adapter_config.json").write_text("{}")
    with pytest.raises(errors.BadOption, match=r"move tiny\.gguf"):
        kvprune.load(path)
