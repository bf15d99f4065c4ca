"""The portable layout: a stock model, equal to the masked dense one, with kvprune nowhere near."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.errors import BadOption, PlanMismatch
from kvprune.models.view import ModelView
from tiny import (
    VOCABULARY,
    make_plan,
    mask_dense,
    measured_bases,
    merged_plan,
    project_dense,
    random_bases,
    tiny_model,
)

PAIRS = [1, 2, 4, 7]
QK = [[*PAIRS, *(p + 8 for p in PAIRS)]] * 2
VO = [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7, 9, 11, 13, 15]]


def portable_plan(model, layers):
    return make_plan(model, layers).model_copy(update={"layout": "portable"})


@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama3-rope", "mistral", "qwen2"])
@torch.no_grad()
def test_a_stock_model_equals_the_masked_dense_one(family, tmp_path):
    dense = tiny_model(family, groups=3)
    layers = [(QK, VO)] * 2
    pruned = cut(ModelView(dense), portable_plan(dense, layers))
    assert type(pruned) is (MistralForCausalLM if family == "mistral" else LlamaForCausalLM)
    ids = torch.randint(3, VOCABULARY, (2, 40))
    expected = mask_dense(dense, layers)(ids).logits
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=0, atol=1e-5)
    pruned.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, pruned(ids).logits)


def merged(model, bases, width, half=None):
    """A portable plan that keeps the pairs `half` of the keys' coordinates, or random ones, in all heads and layers."""
    plan = merged_plan(model, bases, [width] * len(bases))
    kept = plan.layers[0].qk[0] if half is None else (*half, *(c + bases[0].width // 2 for c in half))
    same = (kept,) * len(plan.layers[0].qk)
    layers = tuple(layer.model_copy(update={"qk": same}) for layer in plan.layers)
    return plan.model_copy(update={"layout": "portable", "layers": layers})


@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama3-rope", "yarn", "linear", "mistral", "qwen2"])
@pytest.mark.parametrize(("groups", "merge", "width"), [(1, 2, 12), (3, 2, 20), (3, 4, 24)])
@torch.no_grad()
def test_merged_heads_equal_the_projected_dense_model(family, groups, merge, width):
    dense = tiny_model(family, kv_heads=4, groups=groups)
    bases = random_bases(dense, merge)
    plan = merged(dense, bases, width)
    pruned = cut(ModelView(dense), plan, bases)
    assert type(pruned) is (MistralForCausalLM if family == "mistral" else LlamaForCausalLM)
    assert (pruned.config.num_key_value_heads, pruned.config.head_dim) == (4 // merge, width)
    ids = torch.randint(3, VOCABULARY, (2, 40))
    expected = project_dense(dense, plan, bases)(ids).logits
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=0, atol=2e-5)
    # vLLM and llama.cpp read no attention_factor: it is in W_q
    assert pruned.config.rope_parameters["attention_factor"] == 1
    assert (dense.model.rotary_emb.attention_scaling > 1.2) == (family == "yarn")


@pytest.mark.parametrize("merge", [1, 4])
@torch.no_grad()
def test_slow_pairs_keep_their_own_frequencies(merge):
    """Seven of eight pairs hardly turn; each kept direction turns by the frequency that its coordinate has."""
    factors = [1.0, *[1e9] * 7]
    same = {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.0, **same}
    dense = tiny_model("llama", kv_heads=4, groups=3, rope_parameters=rope)
    bases = measured_bases(dense, merge, slow=True)
    assert len(bases[0].slow) == 14
    half = (0, *range(merge, merge + 5))  # of the pair that turns the first component, and the leading directions
    plan = merged(dense, bases, 12, half)
    pruned = cut(ModelView(dense), plan, bases)
    turned = bases[0].rope[0, list(plan.layers[0].qk[0][:6])]
    own = dense.model.rotary_emb.inv_freq[turned]
    torch.testing.assert_close(pruned.model.rotary_emb.inv_freq, own, rtol=1e-5, atol=0)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    expected = project_dense(dense, plan, bases)(ids).logits
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("merge", [1, 2])
def test_prune_to_the_portable_layout(checkpoint, texts, tmp_path, merge):
    options = {"calibration_tokens": 512, "eval_tokens": 512, "windows": (64,), "device": "cpu", "merge": merge}
    result = kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, layout="portable", **options)
    assert result.plan.widths == [16 * merge] * 4
    assert len({kept for layer in result.plan.layers for kept in layer.qk}) == 1
    assert all(layer.vo is None for layer in result.plan.layers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is LlamaForCausalLM
    assert not (tmp_path / "out" / "modeling.py").exists()
    (row,) = result.record["perplexity"]
    (again,) = kvprune.evaluate(tmp_path / "out", window_lengths=(64,), tokens=512)["perplexity"]
    assert again["values"] == [pytest.approx(row["pruned"], rel=1e-6)]


def test_what_stock_code_cannot_hold_is_refused():
    dynamic = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    for model in (dynamic, tiny_model("qwen2-sliding")):
        with pytest.raises(BadOption, match="--layout uniform"):
            cut(ModelView(model), portable_plan(model, [(QK, VO)] * 2))
    model = tiny_model("llama")
    other = [[*range(4), *range(8, 12)]] * 2
    with pytest.raises(PlanMismatch, match="same qk"):
        cut(ModelView(model), portable_plan(model, [(QK, VO), (other, VO)]))
