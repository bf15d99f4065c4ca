"""Layers that lose their attention: exact, without bytes, and the ones that cost least."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.channels.widths.allocation import Grid
from kvprune.channels.widths.depth import choose_depth, widths_without
from kvprune.errors import BadOption, UnreachableRatio
from kvprune.models.view import ModelView
from kvprune.runtime import quantized
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import quantized_cache
from tiny import COARSE, VOCABULARY, make_plan, random_layers, tiny_model, tiny_tokenizer

BITS = [bits for bits in (8, 4) if quantized._available(bits)]  # that something here quantises to
DROPPED = [(0,), (1, 2), (3,)]


def without(family, dropped):
    """(the dense model whose dropped attentions put out their constant, the pruned one)."""
    dense = tiny_model(family, layers=4, groups=2)
    layers = random_layers(dense, (16, 16, 16, 16))
    for layer in dropped:
        layers[layer] = ([[], []], [[], []])
    reference = tiny_model(family, layers=4, groups=2)
    for layer in dropped:
        attention = reference.model.layers[layer].self_attn
        with torch.no_grad():
            attention.v_proj.weight.zero_()  # weights sum to one: what is left is V's bias behind O
    return reference, cut(ModelView(dense), make_plan(dense, layers))


@pytest.mark.parametrize("make", [DynamicCache, GrowingCache])
@pytest.mark.parametrize("dropped", DROPPED, ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen2-sliding"])
@torch.no_grad()
def test_prompt_cached_steps_and_padding(family, dropped, make):
    reference, pruned = without(family, dropped)
    ids = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=0, atol=1e-5)
    cache = make(config=pruned.config)
    steps = [pruned(ids[:, :9], **{CACHE: cache}).logits]
    steps += [pruned(ids[:, t : t + 1], **{CACHE: cache}).logits for t in range(9, 14)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-5)
    assert [layer.keys.nbytes == 0 for layer in cache.layers] == [layer in dropped for layer in range(4)]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    real = mask.bool()
    found = pruned(ids, **padded).logits[real]
    torch.testing.assert_close(found, reference(ids, **padded).logits[real], rtol=0, atol=1e-5)


@torch.no_grad()
def test_generate_and_late_admission_without_the_first_attention():
    _, pruned = without("llama", (0, 2))
    ids = torch.randint(3, VOCABULARY, (2, 30))
    plain = pruned.generate(ids, max_new_tokens=8, do_sample=False)
    with kvprune.TokenFilter(keep=1.0, block=4, window=4)(pruned):
        assert pruned.generate(ids, max_new_tokens=8, do_sample=False).tolist() == plain.tolist()
    with kvprune.TokenFilter(keep=0.5, block=4, window=4)(pruned) as f:
        pruned.generate(ids, max_new_tokens=8, do_sample=False)
        assert f.report["keep_achieved"] < 0.7


@pytest.mark.parametrize("depth", [1, "auto"])
def test_from_the_command_line_to_a_folder(checkpoint, texts, tmp_path, depth, command):
    small = ["--calibration-tokens", "512", "--repair-tokens", "4096", "--eval-tokens", "512", "--window", "64"]
    small += ["--align", "2", "--min-width", "4"]
    code, _, err = command("prune", checkpoint, "--out", tmp_path / "out", "--ratio", "0.5", "--depth", depth, *small)
    assert code == 0, err
    assert "layers without attention" in err
    record = json.loads((tmp_path / "out" / "kvprune.json").read_text())
    assert record["widths"].count(0) == (1 if depth == 1 else record["widths"].count(0))
    assert record["kv_bytes_per_token"]["dense"] == 2 * record["kv_bytes_per_token"]["pruned"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, VOCABULARY, (1, 9))
    with torch.no_grad():
        cache = loaded(ids, use_cache=True)[CACHE]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 9 * record["kv_bytes_per_token"]["pruned"]
    assert command("show", tmp_path / "out")[0] == 0
    if depth == 1:
        again = kvprune.prune(checkpoint, plan=tmp_path / "out" / "plan.json", device="cpu", eval_tokens=512,
                              windows=(64,), calibration_tokens=512, calibration_window=64)  # fmt: skip
        assert again.plan.widths == record["widths"]


def test_a_refit_takes_the_attentions_place(texts, tmp_path):
    """The constant is fitted, and what the MLP can do of it."""
    tiny_model("llama", layers=4, groups=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    result = kvprune.prune(tmp_path / "dense", ratio=0.5, depth=2, **COARSE)
    rows = [row for row in result.record["refit"] if result.record["widths"][row["layer"]] == 0]
    assert {row["matrix"] for row in rows} == {"o", "down"}
    assert all(row["after"] <= row["before"] for row in rows)
    gone = [i for i, width in enumerate(result.record["widths"]) if not width]
    assert result.model.model.layers[gone[0]].self_attn.o_proj.bias.abs().max() > 0


@given(
    changes=st.lists(st.floats(0, 1), min_size=3, max_size=6),
    ratio=st.sampled_from([0.25, 0.5, 0.75]),
    data=st.data(),
)
def test_the_number_of_layers_is_the_best_of_those_that_were_tried(changes, ratio, data):
    grid = Grid(len(changes), 64, 2, 4, 2)
    seen = {}

    def loss_of(widths):
        return seen.setdefault(tuple(widths), data.draw(st.floats(0, 1)))

    widths = choose_depth("auto", changes, ratio, grid, loss_of)
    assert seen[tuple(widths)] == min(seen.values())
    assert abs(sum(widths) / (64 * len(changes)) - (1 - ratio)) < 0.02
    order = sorted(range(len(changes)), key=lambda i: (changes[i], i))
    for tried, number in zip(seen, itertools.count()):
        assert {i for i, width in enumerate(tried) if not width} == set(order[:number])


@pytest.mark.parametrize(("depth", "error", "message"), [
    (-1, BadOption, "from 0 up"),
    ("many", BadOption, "--depth many must be auto"),
    (4, BadOption, "leaves none of the 4 layers"),
    (3, UnreachableRatio, "at most 2"),
])  # fmt: skip
def test_what_cannot_be(checkpoint, texts, depth, error, message):
    with pytest.raises(error, match=message):
        kvprune.prune(checkpoint, ratio=0.5, depth=depth, **COARSE)
    with pytest.raises(BadOption, match="wants --layout per-layer"):
        kvprune.prune(checkpoint, ratio=0.5, depth=1, layout="uniform", **COARSE)


def test_the_total_is_kept():
    grid = Grid(10, 192, 8, 16, 2, 256)
    assert widths_without([], 0.5, grid) == [96] * 10
    widths = widths_without([3, 7], 0.5, grid)
    assert [i for i, w in enumerate(widths) if not w] == [3, 7]
    assert sum(widths) == 960


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_a_quantised_cache(bits):
    """It has nothing to quantise where there is no attention."""
    _, pruned = without("llama", (0, 2))
    ids = torch.randint(3, VOCABULARY, (1, 14))
    cache = quantized_cache(pruned.config, bits)
    steps = [pruned(ids[:, :9], **{CACHE: cache}).logits]
    steps += [pruned(ids[:, t : t + 1], **{CACHE: cache}).logits for t in range(9, 14)]
    assert cache.get_seq_length() == 14
    expected = pruned(ids).logits
    assert torch.isfinite(torch.cat(steps, 1)).all()
    assert (torch.cat(steps, 1) - expected).abs().mean() < 0.2 * expected.abs().mean()
