"""A GGUF file, read by transformers' own GGUF reader, is the model that the folder holds."""

import json

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.engines.vocabulary import SPLITS, differences, vocabulary
from kvprune.errors import BadOption, BrokenCheckpoint, OutputExists, UnknownSource, UnsupportedArchitecture
from kvprune.models.view import ModelView
from kvprune.runtime.checkpoint import save
from tiny import VOCABULARY, make_plan, merged_plan, random_bases, random_layers, tiny_model, tiny_tokenizer

PAIRS = [1, 2, 4, 7]
QK, VO = [[*PAIRS, *(p + 8 for p in PAIRS)]] * 2, [[*range(8)], [*range(1, 16, 2)]]


def written(folder, family="llama", layout="portable", tokenizer=None, **options):
    """A pruned folder of random weights."""
    dense = tiny_model(family, groups=3, hidden=96, **options)
    plan = make_plan(dense, [(QK, VO)] * 2).model_copy(update={"layout": layout})
    pruned = cut(ModelView(dense), plan)
    record = {"source": "tiny", "layout": layout}
    save(pruned, tokenizer or tiny_tokenizer(), plan.to_json(), lambda: record, folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "llama3-rope", "yarn", "linear"])
@pytest.mark.parametrize(("type", "most"), [("f32", 2e-5), ("f16", 5e-3), ("q8_0", 0.2)])
@torch.no_grad()
def test_the_file_is_the_model(family, type, most, tmp_path):
    """YaRN's scale is in W_q, and the frequencies of all kinds of RoPE in rope_freqs.weight."""
    folder = written(tmp_path / "pruned", family)
    found = kvprune.export(folder, gguf=tmp_path / "m.gguf", type=type)
    ids = torch.randint(3, VOCABULARY, (2, 40))
    expected = kvprune.load(folder)(ids).logits.log_softmax(-1)
    logits = kvprune.load(tmp_path / "m.gguf", dtype="float32")(ids).logits.log_softmax(-1)
    assert (logits - expected).abs().max() < most
    assert found["bytes"] == (tmp_path / "m.gguf").stat().st_size
    # heads of 8 channels: 6 of them are a row of o_proj, and the MLP has 40; hidden is 96
    odd = {f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_output", "ffn_down")}
    assert set(found["not_quantised"]) == (odd if type == "q8_0" else set())


@torch.no_grad()
def test_a_stock_folder_with_yarn(tmp_path):
    """Here the scale is still in the config, and the file has it in W_q."""
    dense = tiny_model("yarn", kv_heads=4, groups=1, hidden=64)
    folder = tmp_path / "stock"
    save(dense, tiny_tokenizer(), "{}", lambda: {"source": "tiny", "layout": "stock"}, folder)
    kvprune.export(folder, gguf=tmp_path / "m.gguf", type="f32")
    ids = torch.randint(3, VOCABULARY, (1, 40))
    logits = kvprune.load(tmp_path / "m.gguf", dtype="float32")(ids).logits
    torch.testing.assert_close(logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_tokens_are_the_same(tmp_path):
    folder = written(tmp_path / "pruned")
    kvprune.export(folder, gguf=tmp_path / "m.gguf")
    text = "the cat  saw 123 old\n\n houses, isn't it? Ünïcode\t</s> end"
    own, read = (kvprune.load_tokenizer(source) for source in (folder, tmp_path / "m.gguf"))
    assert own(text)["input_ids"] == read(text)["input_ids"]


def bpe(split, normalizer=None, ignore_merges=False, post=None):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.normalizer = split, normalizer
    tokenizer.model.ignore_merges = ignore_merges
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def by_regex(name):
    regex = Regex(SPLITS[name][0][0])
    parts = [pre_tokenizers.Split(regex, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


KNOWN = {
    "gpt-2": (BYTES,),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES]),),
    "llama-bpe": (by_regex("llama-bpe"), None, True),
    "qwen2": (by_regex("qwen2"), normalizers.NFC()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_how_a_text_is_split_has_llama_cpps_name(name, tmp_path):
    tokenizer = bpe(*KNOWN[name], post="<s> $A" if name == "llama-bpe" else None)
    tokenizer.save_pretrained(tmp_path)
    found = vocabulary(tmp_path, tokenizer, 6)
    assert [line[:27] for line in differences(tmp_path)] == ["text that is not normalised"] * (name == "qwen2")
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<s>", "[PAD4]", "[PAD5]"]
    assert found["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 5, 5]
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (
        name == "llama-bpe",
        False,
    )


REFUSED = {
    "another regular expression": bpe(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a+"), "isolated"), BYTES])),
    "a space before the text": bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "merges where llama.cpp has none": bpe(*KNOWN["llama-bpe"][:2], False),
    "lower case": bpe(BYTES, normalizers.Lowercase()),
    "two tokens before a text": bpe(BYTES, post="<s> <s> $A"),
    "no byte-level BPE": bpe(pre_tokenizers.Metaspace()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_tokenizer_that_would_make_other_tokens_is_refused(what, tmp_path):
    REFUSED[what].save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=r"cannot be written to GGUF as it is: .*; serve the folder with"):
        vocabulary(tmp_path, REFUSED[what], 6)
    with pytest.raises(UnsupportedArchitecture, match="more tokens than the embedding has rows"):
        vocabulary(tmp_path, REFUSED[what], 3)


def test_what_is_refused(tmp_path, capsys):
    folder, file = written(tmp_path / "pruned"), tmp_path / "m.gguf"
    with pytest.raises(BadOption, match="f32, f16, q8_0"):
        kvprune.export(folder, gguf=file, type="q4_0")
    with pytest.raises(UnknownSource, match="there is no folder"):
        kvprune.export(tmp_path / "nowhere", gguf=file)
    with pytest.raises(BrokenCheckpoint):
        kvprune.export(tmp_path, gguf=file)
    bases = random_bases(dense := tiny_model("llama", kv_heads=4), 2)
    plan = merged_plan(dense, bases, [12, 28])
    own = {"source": "tiny", "layout": "per-layer"}
    save(cut(ModelView(dense), plan, bases), tiny_tokenizer(), plan.to_json(), lambda: own, tmp_path / "own")
    with pytest.raises(UnsupportedArchitecture, match="--layout stock"):
        kvprune.export(tmp_path / "own", gguf=file)
    windowed = written(tmp_path / "windowed", "mistral")
    config = json.loads((windowed / "config.json").read_text())
    assert config["sliding_window"]
    with pytest.raises(UnsupportedArchitecture, match="sliding window"):
        kvprune.export(windowed, gguf=file)
    assert not list(tmp_path.glob("m.gguf*"))
    file.write_text("mine")
    with pytest.raises(OutputExists, match="there already"):
        kvprune.export(folder, gguf=file)
    assert file.read_text() == "mine"


def test_the_command(tmp_path, monkeypatch, capsys):
    from kvprune.cli import main

    folder = written(tmp_path / "pruned")
    monkeypatch.setattr("sys.argv", ["kvprune", "export", str(folder), "--gguf", str(tmp_path / "m.gguf"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["type"] == "f16"


def without_attention(folder, layer, tied):
    """Three layers of which one has none, the others all of their channels, head by head in an order of its own."""
    dense = tiny_model("llama", groups=2, layers=3, hidden=64, tie_word_embeddings=tied)
    plan = make_plan(dense, random_layers(dense, [0 if i == layer else 16 for i in range(3)]))
    pruned = cut(ModelView(dense), plan)
    torch.nn.init.normal_(pruned.model.layers[layer].self_attn.o_proj.bias)
    for other in {0, 1, 2} - {layer}:  # as merging leaves them: pairs in any order, some of which do not turn
        attention = pruned.model.layers[other].self_attn
        for head in range(2):
            order = torch.randperm(8)
            index = torch.tensor([0, 1, 2, 3, 4, 5, 16, 16])[order]
            attention.rope_index[head] = torch.cat((index, torch.where(index == 16, 16, index + 8)))
    save(pruned, tiny_tokenizer(), plan.to_json(), lambda: {"source": "tiny", "layout": "per-layer"}, folder)
    return pruned


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_layer_without_attention(layer, tied, tmp_path):
    """The file's tensors in a loop from llama.cpp's formula: pairs side by side, frequencies divided, no attention
    where a layer has no heads."""
    model = without_attention(tmp_path / "pruned", layer, tied)
    found = kvprune.export(tmp_path / "pruned", gguf=tmp_path / "m.gguf", type="f32")
    assert found["architecture"] == "deci"
    reader = GGUFReader(tmp_path / "m.gguf")
    heads = [0 if i == layer else 4 for i in range(3)]
    assert reader.fields["deci.attention.head_count"].contents() == heads
    assert reader.fields["deci.attention.head_count_kv"].contents() == [number // 2 for number in heads]
    tensors = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    ids = torch.randint(3, VOCABULARY, (20,))
    x = tensors["token_embd.weight"][ids]
    for i, number in enumerate(heads):
        own = {name.removeprefix(f"blk.{i}."): t for name, t in tensors.items() if name.startswith(f"blk.{i}.")}
        if number:
            h = norm(x, own["attn_norm.weight"])
            q, k, v = (h @ own[f"attn_{name}.weight"].T for name in "qkv")
            attended = attend(turned(q, tensors["rope_freqs.weight"]), turned(k, tensors["rope_freqs.weight"]), v)
            x = x + attended @ own["attn_output.weight"].T + own.get("attn_output.bias", torch.zeros(64))
        h = norm(x, own["ffn_norm.weight"])
        h = torch.nn.functional.silu(h @ own["ffn_gate.weight"].T) * (h @ own["ffn_up.weight"].T)
        x = x + h @ own["ffn_down.weight"].T + own.get("ffn_down.bias", torch.zeros(64))
    last = tensors.get("output.weight", tensors["token_embd.weight"])
    logits = norm(x, tensors["output_norm.weight"]) @ last.T
    torch.testing.assert_close(logits, model(ids[None]).logits[0], atol=2e-4, rtol=2e-4)


def norm(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def turned(x, divisors):
    """(tokens, heads * 16), pairs (2 i, 2 i + 1) turned by position times base^(-2 i / 16) / divisor."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 8, 2)))
    angles = torch.arange(len(x))[:, None] * (1e4 ** (-torch.arange(8) / 8) / divisors)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def attend(q, k, v):
    """q (tokens, 4, 16), k (tokens, 2, 16), v (tokens, 32) -> (tokens, 64)."""
    k, v = (one.repeat_interleave(2, 1) for one in (k, v.unflatten(-1, (2, 16))))
    scores = torch.einsum("ihd,jhd->hij", q, k) / 4 + torch.full((len(q), len(q)), -torch.inf).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


def test_heads_that_turn_differently_are_refused(tmp_path):
    model = without_attention(tmp_path / "pruned", 1, False)
    index = model.model.layers[2].self_attn.rope_index
    index[1, index[1] == 5] = 4
    save(model, tiny_tokenizer(), "{}", lambda: {"source": "tiny", "layout": "per-layer"}, tmp_path / "other")
    with pytest.raises(UnsupportedArchitecture, match="--layout stock"):
        kvprune.export(tmp_path / "other", gguf=tmp_path / "m.gguf")
