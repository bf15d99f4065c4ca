"""The product's conscience: pruned logits equal the masked dense model's, and with merged heads those of the dense
model whose keys and values go to the kept coordinates and back, in every way a model is run."""

from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime import modeling
from kvprune.runtime.modeling import CACHE
from tiny import (
    FAMILIES,
    VOCABULARY,
    make_plan,
    mask_dense,
    measured_bases,
    merged_plan,
    project_dense,
    random_bases,
    random_layers,
    tiny_model,
)

TOLERANCE = 1e-5
SLIDING = ("mistral", "qwen2-sliding")
GROUPS = {"one query head per KV head": (3, 1), "groups of three": (2, 3), "one KV head for all": (1, 4)}
# How many of four KV heads become one, the layers' widths, and which of the two are factored.
MERGES = {
    "each for itself": (1, (8, 12), (False, False)),
    "two and two": (2, (12, 28), (False, True)),
    "all": (4, (32, 12), (True, False)),
}

# So much that no coordinate of 64 is without variance, and as large as rounding
LONGER = list(torch.randint(3, VOCABULARY, (12, 40), generator=torch.Generator().manual_seed(2)).split(4))


def pair(family, shape, attention="sdpa", widths=(8, 12)):
    """(masked dense, pruned) of one random plan with mixed widths."""
    kv_heads, groups = shape
    dense = tiny_model(family, kv_heads=kv_heads, groups=groups, attention=attention)
    layers = random_layers(dense, widths)
    return mask_dense(dense, layers), cut(ModelView(dense), make_plan(dense, layers))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@cache
def merged_pair(family, groups, merge, widths):
    """(dense, projected dense, pruned) with four KV heads, `merge` of them to one."""
    dense = tiny_model(family, kv_heads=4, groups=groups, hidden=48)
    bases = measured_bases(dense, merge)
    plan = merged_plan(dense, bases, widths)
    return dense, project_dense(dense, plan, bases), cut(ModelView(dense), plan, bases)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_decode_and_left_padding(family, shape, attention):
    masked, pruned = pair(family, shape, attention)
    assert pruned.config._attn_implementation == attention
    check(tiny_model(family, kv_heads=shape[0], groups=shape[1]), masked, pruned)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_heads_in_prefill_decode_and_left_padding(family, groups, merge, attention):
    m, widths, factored = merge
    dense, projected, pruned = merged_pair(family, groups, m, widths)
    for model in (dense, projected, pruned):
        model.set_attn_implementation(attention)
    assert [layer.factored for layer in pruned.config.per_layer_config] == list(factored)
    assert (pruned.config.num_key_value_heads, pruned.config.dense().num_key_value_heads) == (4 // m, 4)
    check(dense, projected, pruned)
    cached = pruned(torch.zeros(1, 3, dtype=torch.long), use_cache=True)[CACHE]
    for layer, width in zip(cached.layers, widths, strict=True):
        assert layer.keys.shape == layer.values.shape == (1, 4 // m, 3, width)


@torch.no_grad()
def check(dense, masked, pruned):
    """Pruned logits are the reference's, which are not the dense model's."""
    ids = torch.randint(3, VOCABULARY, (2, 14))
    expected = masked(ids).logits
    assert (dense(ids).logits - expected).abs().max() > 1e-2
    close(pruned(ids).logits, expected)

    cache = DynamicCache(config=pruned.config)
    steps = [pruned(ids[:, :9], **{CACHE: cache}, use_cache=True).logits]
    for position in range(9, 14):
        steps.append(pruned(ids[:, position : position + 1], **{CACHE: cache}, use_cache=True).logits)
    close(torch.cat(steps, 1), expected)

    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :5], mask[1, :5] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "position_ids": positions}
    real = mask.bool()
    close(pruned(padded, **arguments).logits[real], masked(padded, **arguments).logits[real])
    close(pruned(padded, **arguments).logits[1, 5:], masked(padded[1:, 5:]).logits[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ratio_zero_is_the_dense_model_bit_for_bit(family, attention):
    dense = tiny_model(family, groups=3, attention=attention)
    every = [list(range(16))] * 2  # per KV head
    pruned = cut(ModelView(dense), make_plan(dense, [(every, every)] * 2, ratio=0.0))
    ids = torch.randint(3, VOCABULARY, (2, 14))
    assert torch.equal(pruned(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(
    ("widths", "merge"), [((8, 12), None), ((8, 8), None), ((12, 28), 2)], ids=["mixed", "uniform", "merged"]
)
@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_rope_that_changes_with_the_context_saved_and_loaded(family, rope, widths, merge, tmp_path):
    """Before the change, behind it, and back: its frequencies are the dense width's, whatever is kept, and whatever
    context the dense model saw last."""
    parameters = tiny_model(rope).config.rope_parameters
    dense = tiny_model(family, groups=3, rope_parameters=dict(parameters))
    bases = random_bases(dense, merge) if merge else None
    plan = merged_plan(dense, bases, widths) if bases else make_plan(dense, random_layers(dense, widths))
    masked = project_dense(dense, plan, bases) if bases else mask_dense(dense, [(x.qk, x.vo) for x in plan.layers])
    ids = torch.randint(3, VOCABULARY, (1, 140))
    dense(ids)
    pruned = cut(ModelView(dense), plan, bases)
    pruned.save_pretrained(tmp_path)
    for model in (pruned, AutoModelForCausalLM.from_pretrained(tmp_path)):
        for tokens in (20, 140, 20):
            close(model(ids[:, :tokens]).logits, masked(ids[:, :tokens]).logits)
    before = masked(ids[:, :20]).logits
    masked.model.rotary_emb.inv_freq *= 0.9
    masked.model.rotary_emb.original_inv_freq *= 0.9
    assert (masked(ids[:, :20]).logits - before).abs().max() > 1e-3  # and they matter


@settings(max_examples=60)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 20]),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
    attention=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_any_shape_and_plan(family, kv_heads, groups, head_dim, shares, attention, seed):
    shape = {"kv_heads": kv_heads, "groups": groups, "head_dim": head_dim, "layers": len(shares)}
    dense = tiny_model(family, **shape, attention=attention, seed=seed)
    widths = [max(2, round(share * head_dim / 2) * 2) for share in shares]
    layers = random_layers(dense, widths, seed)
    pruned = cut(ModelView(dense), make_plan(dense, layers))
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    close(pruned(ids).logits, mask_dense(dense, layers)(ids).logits)
    cache = pruned(ids, use_cache=True)[CACHE]
    expected = [(2, kv_heads, width) for width in widths]
    assert [tuple(layer.keys.shape[i] for i in (0, 1, 3)) for layer in cache.layers] == expected
    assert [tuple(layer.values.shape[i] for i in (0, 1, 3)) for layer in cache.layers] == expected


@pytest.mark.parametrize("many", [4, 1000], ids=["at the dense width", "at the kept width"])
@pytest.mark.parametrize("merge", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_heads_with_slow_pairs_mixed(family, merge, many, monkeypatch):
    """Over pairs and heads: what is mixed does not turn, however fast it turned in the dense model."""
    monkeypatch.setattr(modeling, "MANY", many)
    dense = tiny_model(family, kv_heads=4, groups=2, hidden=48)
    bases = measured_bases(dense, merge, slow=[2, 7, 4, 5], text=LONGER)
    plan = merged_plan(dense, bases, (6 * merge, 12 * merge))
    pruned = cut(ModelView(dense), plan, bases)
    assert all((layer.self_attn.rope_index == 16).any() for layer in pruned.model.layers)
    check(dense, project_dense(dense, plan, bases), pruned)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("merge", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_many_tokens_attend_at_the_dense_width(family, merge, attention, monkeypatch):
    """The numbers are the same; the width that attention runs at, and what the cache holds, are looked at."""
    _, projected, pruned = merged_pair(family, 2, merge, (28, 12))
    assert [layer.factored for layer in pruned.config.per_layer_config] == [True, False]
    for model in (projected, pruned):
        model.set_attn_implementation(attention)
    ids = torch.randint(3, VOCABULARY, (2, 14))
    expected = projected(ids).logits
    seen = []
    own = ALL_ATTENTION_FUNCTIONS.get_interface(attention, modeling.eager_attention_forward)

    def watched(module, query, key, value, *args, **kwargs):
        seen.append((query.shape[1:], key.shape[1:], value.shape[1:]))
        return own(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface", lambda *args: watched)
    for many, steps in ((15, (14,)), (14, (14,)), (4, (5, 4, 1, 4))):
        monkeypatch.setattr(modeling, "MANY", many)
        seen.clear()
        cache = DynamicCache(config=pruned.config)
        close(torch.cat([pruned(x, **{CACHE: cache}).logits for x in ids.split(steps, 1)], 1), expected)
        assert [layer.keys.shape[1::2] for layer in cache.layers] == [(4 // merge, width) for width in (28, 12)]
        for i, tokens in enumerate(steps):
            heads, width = (4, 16) if tokens >= many else (4 // merge, 28)
            query, *read = seen[2 * i]
            known = sum(steps[: i + 1]) if family not in SLIDING else read[0][1]
            assert (query, read) == ((8, tokens, width), [(heads, known, width)] * 2)
            assert seen[2 * i + 1][0] == (8, tokens, 12)


@pytest.mark.parametrize("family", ["llama-bias", "qwen2"])
@torch.no_grad()
def test_all_coordinates_of_merged_heads_are_the_dense_model(family):
    dense = tiny_model(family, kv_heads=4, groups=2)
    ids = torch.randint(3, VOCABULARY, (2, 14))
    for merge in (1, 2, 4):
        bases = measured_bases(dense, merge, text=LONGER)
        plan = merged_plan(dense, bases, (16 * merge, 16 * merge))
        found = cut(ModelView(dense), plan, bases)(ids).logits
        torch.testing.assert_close(found, dense(ids).logits, rtol=0, atol=1e-4)


@settings(max_examples=60)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    merge=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 12]),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
    attention=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_any_shape_merge_and_plan(family, merge, kv_heads, groups, head_dim, shares, attention, seed):
    """kv_heads: of the pruned model, each of `merge` dense ones in any order. In float64, but for what the models
    themselves round, since bases at random may be far from even."""
    shape = {"kv_heads": kv_heads * merge, "groups": groups, "head_dim": head_dim, "layers": len(shares)}
    dense = tiny_model(family, **shape, attention=attention, seed=seed).double()
    bases = random_bases(dense, merge, seed)
    widths = [max(2, round(share * merge * head_dim / 2) * 2) for share in shares]
    plan = merged_plan(dense, bases, widths, seed)
    pruned, projected = cut(ModelView(dense), plan, bases), project_dense(dense, plan, bases)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    close(pruned(ids).logits, projected(ids).logits)
    cached = pruned(ids[:, :5], use_cache=True)[CACHE]
    assert [layer.keys.shape[1] * layer.keys.shape[3] for layer in cached.layers] == [kv_heads * w for w in widths]
    close(pruned(ids[:, 5:], **{CACHE: cached}).logits, projected(ids).logits[:, 5:])


def test_surgery_leaves_the_dense_model_alone():
    dense = tiny_model("qwen2", groups=2)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pruned = cut(ModelView(dense), make_plan(dense, random_layers(dense, (8, 8))))
    after = dense.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    embedding, shared = dense.model.embed_tokens.weight, pruned.model.embed_tokens.weight
    assert embedding.data_ptr() == shared.data_ptr()  # only the attention costs memory
