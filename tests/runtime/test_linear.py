"""Packed weights against the very layers that they stand for."""

import copy

import pytest
import torch
from torch import nn

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.measure.memory import weight_bytes
from kvprune.measure.speed import Side
from kvprune.models.view import ModelView
from kvprune.runtime import linear
from kvprune.runtime.linear import PackedLinear, pack_weights
from kvprune.runtime.modeling import CACHE
from tiny import VOCABULARY, make_plan, merged_model, random_layers, tiny_model

here = pytest.mark.skipif(not linear._can_pack(), reason="this CPU or PyTorch cannot pack bfloat16 weights")
IDS = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))


def models(family):
    dense = tiny_model(family, kv_heads=2, groups=2, layers=2).to(torch.bfloat16)
    pruned = cut(ModelView(copy.deepcopy(dense)), make_plan(dense, random_layers(dense, [8, 12])))
    wide = tiny_model(family, kv_heads=4, groups=2, layers=2, hidden=48).to(torch.bfloat16)
    return dense, pruned.to(torch.bfloat16), merged_model(wide, [12, 28])[1]


@torch.no_grad()
def logits(model):
    cache = kvprune.GrowingCache(model.config)
    parts = IDS.split([15, *[1] * 5], dim=1)
    return torch.cat([model(piece, **{CACHE: cache}).logits for piece in parts], dim=1)


@here
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the second has biases
def test_the_numbers_are_the_same(family):
    for model in models(family):
        expected = logits(model)
        plain = sum(type(module) is nn.Linear for module in model.modules())
        pack_weights(model)
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == plain == 2 * 7 + 1
        torch.testing.assert_close(logits(model), expected, atol=1e-2 * expected.abs().max().item(), rtol=0)
        with torch.no_grad(), kvprune.TokenFilter(0.3, tail=1.0)(model) as f:
            model.generate(IDS, max_new_tokens=30, do_sample=False, pad_token_id=0)
        assert f.report["ratio_achieved"] > 0.1


@here
def test_what_a_step_reads_does_not_change():
    for model in models("llama"):
        sides = Side(model), Side(copy.deepcopy(model))
        before = weight_bytes(model)
        pack_weights(sides[1].model)
        for side in sides:
            with side.running():
                side.prefill(IDS)
        assert sides[0].bytes_read() == sides[1].bytes_read()
        embedding = model.get_input_embeddings().weight
        tied = embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()
        assert weight_bytes(sides[1].model) == before + (embedding.nbytes if tied else 0)


@here
def test_what_reads_nothing_stays_as_it_is():
    """Of a layer without attention, and of one without block."""
    dense = tiny_model("llama", kv_heads=2, groups=2, layers=3).to(torch.bfloat16)
    layers = [([[], []], [[], []]), ([[], []], [[], []], None, False), *random_layers(dense, [16])]
    model = cut(ModelView(dense), make_plan(dense, layers))
    for layer in model.model.layers[:2]:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)
    expected = logits(model)
    pack_weights(model)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 3 + 7 + 1
    torch.testing.assert_close(logits(model), expected, atol=1e-2 * expected.abs().max().item(), rtol=0)


def test_other_models_stay_as_they_are(monkeypatch):
    exact = tiny_model("llama")
    pack_weights(exact)
    coarse = tiny_model("llama").to(torch.bfloat16)
    monkeypatch.setattr(linear, "_can_pack", lambda: False)
    pack_weights(coarse)
    for model in (exact, coarse):
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
