"""The product's conscience: pruned logits equal the masked dense model's, in every way a model is run."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import AutoModelForCausalLM, DynamicCache

from kvprune.channels.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from tiny import FAMILIES, VOCABULARY, make_plan, mask_dense, random_layers, tiny_model

TOLERANCE = 1e-5
GROUPS = {"one query head per KV head": (3, 1), "groups of three": (2, 3), "one KV head for all": (1, 4)}


def pair(family, shape, attention="sdpa", widths=(8, 12)):
    """(masked dense, pruned) of one random plan with mixed widths."""
    kv_heads, groups = shape
    dense = tiny_model(family, kv_heads=kv_heads, groups=groups, attention=attention)
    layers = random_layers(dense, widths)
    return mask_dense(dense, layers), cut(ModelView(dense), make_plan(dense, layers))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_decode_and_left_padding(family, shape, attention):
    masked, pruned = pair(family, shape, attention)
    assert pruned.config._attn_implementation == attention
    ids = torch.randint(3, VOCABULARY, (2, 14))
    expected = masked(ids).logits
    assert (tiny_model(family, kv_heads=shape[0], groups=shape[1])(ids).logits - expected).abs().max() > 1e-2
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


@pytest.mark.parametrize("widths", [(8, 12), (8, 8)], ids=["mixed", "uniform"])
@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_rope_that_changes_with_the_context_saved_and_loaded(family, rope, widths, tmp_path):
    """Before the change, behind it, and back: its frequencies are the dense width's, whatever is kept, and whatever
    context the dense model saw last."""
    parameters = tiny_model(rope).config.rope_parameters
    dense = tiny_model(family, groups=3, rope_parameters=dict(parameters))
    layers = random_layers(dense, widths)
    masked = mask_dense(dense, layers)
    ids = torch.randint(3, VOCABULARY, (1, 140))
    dense(ids)
    pruned = cut(ModelView(dense), make_plan(dense, layers))
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


def test_surgery_leaves_the_dense_model_alone():
    dense = tiny_model("qwen2", groups=2)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pruned = cut(ModelView(dense), make_plan(dense, random_layers(dense, (8, 8))))
    after = dense.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    embedding, shared = dense.model.embed_tokens.weight, pruned.model.embed_tokens.weight
    assert embedding.data_ptr() == shared.data_ptr()  # only the attention costs memory
