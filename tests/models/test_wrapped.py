"""Multimodal wrappers: their text model alone, which computes on text what the wrapper does."""

import json
import re

import every_family
import pytest
import torch
from every_family import HEADS, KV, LAYERS, OPTIONS, VOCABULARY, D, type_of
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

import kvprune
from kvprune.errors import UnsupportedArchitecture
from kvprune.models.family import WRAPPERS
from kvprune.models.source import load_model, resolve
from kvprune.models.view import ModelView
from tiny import tiny_tokenizer

QUICK = ["--calibration-tokens=512", "--window=64", "--eval-tokens=512", "--repair-tokens=4096"]

SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
PIXTRAL = {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16}
GEMMA4 = {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 16}
QWEN = {"depth": 1, "num_heads": 2, "embed_dim": 32, "hidden_size": 64, "out_hidden_size": 64}
HYBRID = {name: value for name, value in OPTIONS["qwen3_5_text"].items() if name != "num_hidden_layers"} | {
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": OPTIONS["qwen3_5_text"]["rope_parameters"] | {"mrope_section": [1, 1, 0]},
}
EXPERTS = {**every_family.EXPERTS, "shared_expert_intermediate_size": 24}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
WRAPPED = {  # wrapper -> (family of the text model, its model_type in the wrapper, what is said of it, vision tower)
    "gemma3": ("gemma3_text", "gemma3_text", SLIDING | {"query_pre_attn_scalar": 9}, SIGLIP),
    "gemma4": ("gemma4_text", "gemma4_text", OPTIONS["gemma4_text"] | SLIDING, GEMMA4),
    "idefics3": ("llama", "llama", {}, {"image_size": 28, "patch_size": 14}),
    "internvl": ("qwen3", "qwen3", {}, {"image_size": [28, 28], "patch_size": [14, 14]}),
    "llava": ("mistral", "mistral", {}, PIXTRAL),
    "llava_next": ("llama", "llama", {}, SIGLIP),
    "llava_onevision": ("qwen2", "qwen2", {}, SIGLIP),
    "mistral3": ("mistral", "mistral", {}, PIXTRAL),
    "qwen2_5_vl": ("qwen2", "qwen2_5_vl_text", MROPE, QWEN),
    "qwen2_vl": ("qwen2", "qwen2_vl_text", MROPE, QWEN),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_text", HYBRID, QWEN),
    "qwen3_5_moe": ("qwen3_5_moe_text", "qwen3_5_moe_text", HYBRID | EXPERTS, QWEN),
    "qwen3_vl": ("qwen3", "qwen3_vl_text", MROPE, QWEN | {"deepstack_visual_indexes": [0]}),
    "smolvlm": ("llama", "llama", {}, {"image_size": 28, "patch_size": 14}),
}
KNOWN = [name for name in WRAPPED if name in CONFIG_MAPPING]
# From the names that transformers gives to those in checkpoints that are older
OLDER = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
OLDER_QWEN = {"model.language_model.": "model.", "model.visual.": "visual."}


def test_every_wrapper_is_tested():
    assert set(WRAPPED) == set(WRAPPERS)


def wrapper(name, model_type=None, **settings):
    """A random one in eval mode, float32; model_type: of another text model."""
    _, inner, text, vision = WRAPPED[name]
    if model_type is not None:
        inner, text = type_of(model_type), OPTIONS[model_type]
    text = text | {
        "model_type": inner,
        "vocab_size": VOCABULARY,
        "hidden_size": HEADS * D,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS if model_type else 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": D,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(name, text_config=text, vision_config=sizes | vision, **settings)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    for key, parameter in model.named_parameters():
        if "norm" not in key:
            torch.nn.init.normal_(parameter, std=0.4 if key.endswith("bias") else 0.1)
    for key, buffer in model.named_buffers():
        if key.endswith("layer_scalar"):
            buffer.fill_(0.8)
    return model


def written(model, folder, older=None):
    """The wrapper as a checkpoint; older: what tensors were called before."""
    tiny_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied:
        del tensors["lm_head.weight"]
    for new, old in (older or {}).items():
        tensors = {re.sub(f"^{re.escape(new)}", old, key): value for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("age", ["new", "older", "as it is saved"])
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_the_text_model_alone_is_the_wrapper_on_text(name, age, tmp_path):
    model = wrapper(name)
    older = OLDER_QWEN if name.startswith("qwen") else OLDER
    if age == "as it is saved":
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
    else:
        written(model, tmp_path, older if age == "older" else None)
    ids = torch.randint(3, VOCABULARY, (2, 17))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = kvprune.load(tmp_path)
    assert found.config.model_type == WRAPPED[name][0]
    assert "mrope" not in str(found.config)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    padded = model(ids, **given).logits
    torch.testing.assert_close(found(ids, **given).logits[mask.bool()], padded[mask.bool()], rtol=0, atol=1e-5)
    assert found.base_model.num_parameters() == model.get_decoder().num_parameters()
    streamed = load_model(resolve(tmp_path), "cpu", offload=tmp_path / "left")  # block by block
    torch.testing.assert_close(streamed(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "model_type"), [
    ("mistral3", "ministral3"), ("llava", "phi3"), ("llava_next", "qwen3_moe"), ("internvl", "gpt_oss"),
    ("gemma4", "gemma4_text:shared"), ("gemma4", "gemma4_text:experts"),
])  # fmt: skip
@torch.no_grad()
def test_other_text_models_of_a_wrapper(name, model_type, tmp_path):
    model = wrapper(name, model_type)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, 17))
    found = kvprune.load(tmp_path)
    assert found.config.model_type == type_of(model_type)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "mistral3", "qwen2_5_vl"])
def test_prune_makes_an_ordinary_folder(name, command, texts, tmp_path):
    model = wrapper(name)
    source, out = written(model, tmp_path / "dense"), tmp_path / "pruned"
    code, _, stderr = command("prune", source, "--out", out, "--ratio=0.5", "--align=2", "--min-width=4", *QUICK)
    assert code == 0, stderr
    assert f"the text model of {name} alone" in stderr
    assert "UNEXPECTED" not in stderr
    settings = json.loads((out / "config.json").read_text())
    assert settings["model_type"] == "kvprune_" + WRAPPED[name][0]
    assert not any("vision" in key or "language_model" in key for key in load_file(out / "model.safetensors"))
    assert kvprune.load_tokenizer(out)("the cat")["input_ids"]
    assert kvprune.fit(source, memory="1GiB", context=16, align=2, min_width=4)["weights_read_bytes"]
    assert command("generate", source, "the cat", "--max-new-tokens=2")[0] == 0
    assert kvprune.load(out)(torch.randint(3, VOCABULARY, (1, 9))).logits.isfinite().all()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_config_that_says_all_in_one_place(name, tmp_path):
    """As these checkpoints are published: no text_config, and RoPE by its older names."""
    model = wrapper(name)
    written(model, tmp_path, OLDER_QWEN)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    text = settings.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    path.write_text(json.dumps(text | settings))
    ids = torch.randint(3, VOCABULARY, (2, 17))
    torch.testing.assert_close(kvprune.load(tmp_path)(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_whether_embeddings_are_tied_is_the_wrappers_word(tied, tmp_path):
    """The text model's own config says the opposite, or nothing."""
    model = wrapper("mistral3", tie_word_embeddings=tied)
    written(model, tmp_path)
    ids = torch.randint(3, VOCABULARY, (1, 9))
    found = kvprune.load(tmp_path)
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == tied
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    found.save_pretrained(tmp_path / "alone")  # by the text model's own names
    again = kvprune.load(tmp_path / "alone")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_text_model_that_lacks_a_tensor_is_refused(tmp_path):
    written(wrapper("gemma3"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(kvprune.errors.BrokenCheckpoint, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        kvprune.load(tmp_path)


def test_a_loaded_wrapper_is_refused():
    with pytest.raises(UnsupportedArchitecture, match="'llava' is not supported; of such a model only the text model"):
        ModelView(wrapper("llava"))


@pytest.mark.parametrize(("settings", "message"), [
    ({"model_type": "llava", "text_config": {"model_type": "deepseek_v3"}}, "text model of 'llava'.*one latent"),
    ({"model_type": "llava", "text_config": {"model_type": "granite", "logits_scaling": 8.0}}, "without its text"),
    ({"model_type": "paligemma"}, "its prompt looks ahead"),
    ({"model_type": "kimi_vl"}, "architecture 'kimi_vl' is not supported"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_with_its_reason(settings, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedArchitecture, match=message):
        kvprune.load(tmp_path)
