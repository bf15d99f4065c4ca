"""Every family: the pruned model is the dense one whose keys and values lose what the cut removes."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from every_family import OPTIONS, VOCABULARY, changed, family_model, has_sdpa, type_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from kvprune.channels.choice.basis import Kept, basis_of
from kvprune.channels.cut.surgery import cut
from kvprune.channels.evidence.moments import attention_moments
from kvprune.models.family import FAMILIES
from kvprune.models.view import ModelView
from kvprune.runtime import modeling
from kvprune.runtime.modeling import CACHE
from tiny import make_plan

KNOWN = [name for name in OPTIONS if type_of(name) in CONFIG_MAPPING]
WIDTHS = (12, 14, 8, 6)
# So much that no coordinate is without variance
TEXT = list(torch.randint(3, VOCABULARY, (12, 40), generator=torch.Generator().manual_seed(2)).split(4))
# Norms and linear attention amplify rounding: the dense model's own steps are up to 2e-5 from a prompt
TOLERANCE = {"gemma2": 2e-5, "gemma3_text": 4e-5, "gemma4_text": 2e-5, "gemma4_text:shared": 4e-5}
TOLERANCE |= dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 2e-5)


def tolerance_of(name):
    return TOLERANCE.get(name, TOLERANCE.get(type_of(name), 1e-5))


def test_every_family_is_tested():
    assert set(FAMILIES) == set(map(type_of, OPTIONS))


def without_channels(model, seed=0):
    """(what the dense model attends with, the pruned model): random pairs of Q and K and channels of V, of each KV head
    and layer its own."""
    view, generator = ModelView(model), torch.Generator().manual_seed(seed)
    layers = []
    for number, (width, shape) in enumerate(zip(WIDTHS, view.shape.each, strict=True)):
        if view.shape.source(number) != number:  # it attends to another layer's keys and values
            layers.append(layers[view.shape.source(number)])
            continue
        qk, vo, size = [], [], shape.head_dim
        for _ in range(shape.kv_heads):
            pairs = torch.randperm(size // 2, generator=generator)[: width // 2].tolist()
            qk.append(sorted(pairs + [p + size // 2 for p in pairs]))
            vo.append(sorted(torch.randperm(size, generator=generator)[:width].tolist()))
        layers.append((qk, vo))

    def change(layer, key, value):
        layer = view.layer_at(layer)
        attention, (qk, vo) = view.attention[layer], layers[layer]
        own, shared = torch.zeros(2, key.shape[1], 1, key.shape[3]), 0
        for head in range(key.shape[1]):
            own[0, head, 0, attention.order[qk[head]]] = 1  # the family's own numbers
            own[1, head, 0, vo[head]] = 1
        if not attention.has_sinks and attention.has_bias("v") and not attention.has_normed_values:
            (_, bias) = attention.rows("v")
            shared = bias.unsqueeze(1)
        return key * own[0], (value - shared) * own[1] + shared

    return change, cut(view, make_plan(model, layers))


def one_for_each_store(view, bases):
    """The bases, where layers that attend to another's keys and values have its, with a way back of their own."""
    sources = [view.shape.source(number) for number in range(len(bases))]
    return [replace(bases[source], moments=own.moments) for source, own in zip(sources, bases, strict=True)]


def merged(model, share=0.5):
    """The same with as many KV heads merged into one as every layer can, and mixed as they are where RoPE leaves
    channels alone; share: by how much of the heads' channels WIDTHS are scaled."""
    view = ModelView(model)
    merge, plan, generator = view.shape.shared_heads, [], torch.Generator().manual_seed(0)
    slow = []
    for attention in view.attention:
        still = torch.nonzero(attention.frequencies == 0).flatten()
        slow.append(torch.stack((still, still + attention.shape.head_dim // 2), 1).flatten())
    moments = attention_moments(view, TEXT, slow, merge, lambda n: None)
    bases = [basis_of(m, a.weights(), s)[0] for m, a, s in zip(moments, view.attention, slow, strict=True)]
    bases, widths = one_for_each_store(view, bases), [int(w * merge * share) // 2 * 2 for w in WIDTHS]
    widths = [widths[view.shape.source(number)] for number in range(len(widths))]
    for number, (basis, width) in enumerate(zip(bases, widths, strict=True)):
        if view.shape.source(number) != number:
            plan.append(plan[view.shape.source(number)])
            continue
        half = basis.width // 2
        fast = width // 2 * basis.turning // half  # any of them; of those that are mixed the leading ones
        kept = []
        for _ in basis.heads:
            pairs = torch.randperm(basis.turning, generator=generator)[:fast].tolist()
            pairs += range(basis.turning, basis.turning + width // 2 - fast)
            kept.append(sorted(pairs + [p + half for p in pairs]))
        plan.append((kept, None, basis.heads.tolist()))

    def change(layer, key, value):
        layer = view.layer_at(layer)
        attention, basis = view.attention[layer], bases[layer]
        width, shared, groups = widths[layer], 0, basis.heads
        maps = basis.cut(Kept(torch.tensor(plan[layer][0]), torch.arange(width).repeat(len(groups), 1)))
        if not attention.has_sinks and attention.has_bias("v") and not attention.has_normed_values:
            (_, bias) = attention.rows("v")
            shared = bias.unsqueeze(1)
        new_key, new_value = torch.zeros_like(key), torch.zeros_like(value)
        if not attention.is_more_than_scores:
            key = key.clone()  # what never turns adds the same to all scores, and is large there and back
            channels = attention.order[slow[layer]]
            key[..., channels] -= key[..., channels].mean(2, keepdim=True)
        for group, heads in enumerate(groups):
            keys = torch.cat([key[:, h][..., attention.order] for h in heads], -1)
            values = torch.cat([(value - shared)[:, h] for h in heads], -1)
            for member, head in enumerate(heads):
                place = group * merge + member
                of_keys, of_values = maps.queries[place] @ maps.keys[group], maps.outputs[place] @ maps.values[group]
                new_key[:, head] = (keys @ of_keys.float().T)[..., attention.order.argsort()]
                new_value[:, head] = values @ of_values.float().T
        return new_key, new_value + shared

    return change, cut(view, make_plan(model, plan, merge=merge), bases)


WAYS = {"channels": without_channels, "merged": merged}


@cache
def made(name, way, attention):
    dense = family_model(name, attention)
    return dense, *WAYS[way](dense)


def by_steps(model, ids):
    """(logits of a prompt and of one token after another, the cache)."""
    cache = DynamicCache(config=model.config)
    steps = [model(ids[:, :9], **{CACHE: cache}, use_cache=True).logits]
    steps += [model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(9, 17)]
    return torch.cat(steps, 1), cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_prefill_decode_and_left_padding(name, way, attention):
    if attention == "sdpa" and not has_sdpa(name):
        pytest.skip("this family has no sdpa")
    dense, change, pruned = made(name, way, attention)
    tolerance = tolerance_of(name)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)

    ids = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"attention_mask": mask, "position_ids": positions}
    before = dense(ids).logits
    with changed(dense, change):
        expected, behind_padding = dense(ids).logits, dense(ids, **padded).logits
        in_steps, _ = by_steps(dense, ids)  # a linear attention's are rounded otherwise than a prompt
    assert (before - expected).abs().max() > 1e-2
    close(pruned(ids).logits, expected)
    close(pruned(ids, **padded).logits[mask.bool()], behind_padding[mask.bool()])
    found, cache = by_steps(pruned, ids)
    close(found, in_steps)
    view = ModelView(dense)
    for layer in view.shape.stores:
        number = view.attention_layers[layer]
        own = pruned.config.per_layer_config[number]
        assert cache.layers[number].keys.shape[1::2] == (own.num_key_value_heads, own.head_dim)
    assert sum(getattr(layer, "keys", None) is not None for layer in cache.layers) == len(view.shape.stores)
    assert torch.equal(dense(ids).logits, before)


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_saved_and_loaded_again(name, tmp_path):
    _, _, pruned = made(name, "merged", "eager")
    pruned.save_pretrained(tmp_path)
    ids = torch.randint(3, VOCABULARY, (1, 12))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(loaded(ids).logits, pruned(ids).logits, rtol=0, atol=1e-5)
    assert loaded.config.widths() == pruned.config.widths()


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_wide_heads_with_few_and_with_many_tokens(name, monkeypatch):
    """Wider than a dense head, so that Q and O stay as they were; many tokens then attend at the dense width, where the
    family's channels stand as its table's columns do."""
    dense = family_model(name)
    change, pruned = merged(dense, share=1.0)
    ids = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))
    with changed(dense, change):
        expected = dense(ids).logits
    tolerance = tolerance_of(name)
    for many in (256, 4):
        monkeypatch.setattr(modeling, "MANY", many)
        torch.testing.assert_close(pruned(ids).logits, expected, rtol=0, atol=2 * tolerance)
    family = FAMILIES[type_of(name)]
    wide = [a for a in map(family.attention_of, family.blocks(pruned)) if a is not None]
    assert any(a.o_mix is not None for a in wide)
    in_order = all(a.has_own_columns for a in ModelView(dense).attention)
    assert any(a.dense_heads is not None for a in wide) == in_order
