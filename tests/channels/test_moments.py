"""Moments of the attention against plain loops in float64."""

import copy

import pytest
import torch

from kvprune.channels import moments as moments_module
from kvprune.channels.moments import attention_moments
from kvprune.models.view import ModelView
from tiny import FAMILIES, VOCABULARY, tiny_model

D, KV = 8, 4
HALF = D // 2
SLOW = torch.tensor([3, 7, 2, 6])  # pair by pair
ORDERS = {1: [[0], [1], [2], [3]], 2: [[3, 0], [1, 2]], 4: [[0, 1, 2, 3]]}  # 2: as grouping might have it


def texts():
    return list(torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1)).split(2))


def windows_of(model, layer):
    """Per window: q, k, v without V's bias, each (T, heads, D), the rotary table (T, D) twice, and the attention's
    weights (heads, T, T)."""
    block = model.model.layers[layer]
    attention = block.self_attn
    for ids in torch.cat(texts()):
        out = model(ids[None], output_hidden_states=True, output_attentions=True)
        x = block.input_layernorm(out.hidden_states[layer][0])
        v = torch.nn.functional.linear(x, attention.v_proj.weight)
        table = [t[0] for t in model.model.rotary_emb(x[None], torch.arange(len(ids))[None])]
        projected = [t.unflatten(-1, (-1, D)) for t in (attention.q_proj(x), attention.k_proj(x), v)]
        yield *projected, *table, out.attentions[layer][0]


def turned(x, cos, sin):
    """One token's channels (..., D) behind RoPE, as complex numbers (..., D / 2)."""
    a, b = x[..., :HALF], x[..., HALF:]
    return torch.complex(a * cos[:HALF] - b * sin[:HALF], b * cos[HALF:] + a * sin[HALF:])


def by_plain_loops(model, layer, groups, order):
    """queries, keys, slow_queries, slow_keys and outputs of one layer, in the order of the groups."""
    merge = len(order[0])
    queries = torch.zeros(KV, HALF, dtype=torch.float64)
    keys = torch.zeros(KV, HALF, merge, merge, dtype=torch.complex128)
    slow_queries = torch.zeros(KV, 4, 4, dtype=torch.float64)
    slow_keys = torch.zeros(KV, 4 * merge, 4 * merge, dtype=torch.float64)
    outputs = torch.zeros(KV, merge * D, merge * D, dtype=torch.float64)
    scaling = model.model.layers[layer].self_attn.scaling
    tokens = 0
    for q, k, v, cos, sin, weights in windows_of(model, layer):
        tokens += len(q)
        for row, (group, head) in enumerate((heads, head) for heads in order for head in heads):
            behind_rope = torch.stack([turned(k[n, group], cos[n], sin[n]) for n in range(len(k))])  # (T, m, pairs)
            before_rope = torch.stack([torch.cat([k[n, other, SLOW] for other in group]) for n in range(len(k))])
            values = torch.stack([torch.cat([v[n, other] for other in group]) for n in range(len(k))])
            for query_head in range(head * groups, (head + 1) * groups):
                for t in range(len(q)):
                    seen = weights[query_head, t]  # (T,), zero at what is not seen
                    size = turned(q[t, query_head] * scaling, cos[t], sin[t]).abs().square()  # (pairs,)
                    queries[row] += size
                    for pair in range(HALF):
                        kappa = behind_rope[..., pair]
                        centred = kappa - seen.to(kappa.dtype) @ kappa
                        for n in range(len(k)):
                            keys[row, pair] += size[pair] * seen[n] * torch.outer(centred[n], centred[n].conj())
                    slow = q[t, query_head, SLOW] * scaling
                    slow_queries[row] += torch.outer(slow, slow)
                    centred = before_rope - seen @ before_rope
                    for n in range(len(k)):
                        slow_keys[row] += seen[n] * torch.outer(centred[n], centred[n])
                    z = seen @ values
                    outputs[row] += torch.outer(z, z)
    stretch = model.model.rotary_emb.attention_scaling
    slow_queries *= stretch**4  # a direction counts in the unit of the pairs, which are behind RoPE
    found = queries / tokens, keys / tokens, slow_queries / tokens, slow_keys / (tokens * groups), outputs / tokens
    return dict(zip(("queries", "keys", "slow_queries", "slow_keys", "outputs"), found, strict=True))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("merge", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama-bias", "qwen2-sliding"])
def test_moments_equal_plain_loops(family, merge, groups, monkeypatch):
    check(family, merge, groups, monkeypatch)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_moments_of_every_family_equal_plain_loops(family, monkeypatch):
    check(family, 2, 1, monkeypatch)


@torch.no_grad()
def check(family, merge, groups, monkeypatch):
    model = tiny_model(family, kv_heads=KV, groups=groups, head_dim=D, attention="eager")
    exact = copy.deepcopy(model).double()
    assert (model.model.rotary_emb.attention_scaling != 1) == (family in ("yarn", "longrope"))
    order = ORDERS[merge]
    monkeypatch.setattr(moments_module, "group_heads", lambda *_: torch.tensor(order))
    found = list(attention_moments(ModelView(model), texts(), SLOW, merge, lambda layers: None))
    assert len(found) == 2
    for layer, moments in enumerate(found):
        assert moments.heads.tolist() == order
        for name, expected in by_plain_loops(exact, layer, groups, order).items():
            here = getattr(moments, name)
            scale = float(expected.abs().max())
            torch.testing.assert_close(here, expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")
