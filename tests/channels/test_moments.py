"""Moments of the attention against plain loops in float64."""

import copy

import pytest
import torch

from kvprune.channels.evidence import moments as moments_module
from kvprune.channels.evidence.moments import attention_moments
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
    """queries, keys, slow_queries, slow_keys, slow_means and outputs of one layer, in the order of the groups."""
    merge = len(order[0])
    queries = torch.zeros(KV, HALF, dtype=torch.float64)
    keys = torch.zeros(KV, HALF, merge, merge, dtype=torch.complex128)
    slow_queries = torch.zeros(KV, 4, 4, dtype=torch.float64)
    slow_keys = torch.zeros(KV, 4 * merge, 4 * merge, dtype=torch.float64)
    slow_means = torch.zeros(KV, 4, dtype=torch.float64)
    outputs = torch.zeros(KV, merge * D, merge * D, dtype=torch.float64)
    attention = model.model.layers[layer].self_attn
    tokens = 0
    for window, (q, k, v, cos, sin, weights) in enumerate(windows_of(model, layer)):
        draws = torch.Generator().manual_seed(layer << 32 | window)
        tokens += len(q)
        for row, (group, head) in enumerate((heads, head) for heads in order for head in heads):
            behind_rope = torch.stack([turned(k[n, group], cos[n], sin[n]) for n in range(len(k))])  # (T, m, pairs)
            before_rope = torch.stack([torch.cat([k[n, other, SLOW] for other in group]) for n in range(len(k))])
            slow_means[row] += sum(k[n, head, SLOW] for n in range(len(k)))
            values = torch.stack([torch.cat([v[n, other] for other in group]) for n in range(len(k))])
            directions = torch.randn(groups, model.config.hidden_size, generator=draws).double()
            for query_head in range(head * groups, (head + 1) * groups):
                own = attention.o_proj.weight[:, query_head * D : (query_head + 1) * D]  # (hidden, D)
                effect = torch.stack([directions[query_head % groups] @ own @ v[n, head] for n in range(len(v))])
                for t in range(len(q)):
                    seen = weights[query_head, t]  # (T,), zero at what is not seen
                    gains = seen * (effect - seen @ effect)
                    size = turned(q[t, query_head] * attention.scaling, cos[t], sin[t]).abs().square()  # (pairs,)
                    queries[row] += size
                    for pair in range(HALF):
                        c = sum(gains[n] * behind_rope[n, :, pair] for n in range(len(k)))
                        keys[row, pair] += size[pair] * torch.outer(c, c.conj())
                    slow = q[t, query_head, SLOW] * attention.scaling
                    slow_queries[row] += torch.outer(slow, slow)
                    c = sum(gains[n] * before_rope[n] for n in range(len(k)))
                    slow_keys[row] += torch.outer(c, c)
                    z = seen @ values
                    outputs[row] += torch.outer(z, z)
    stretch = model.model.rotary_emb.attention_scaling
    slow_queries *= stretch**4  # a direction counts in the unit of the pairs, which are behind RoPE
    per_token = {"queries": queries, "keys": keys, "slow_queries": slow_queries, "slow_means": slow_means}
    found = {name: total / tokens for name, total in (per_token | {"outputs": outputs}).items()}
    return found | {"slow_keys": slow_keys / (tokens * groups)}


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
    found = list(attention_moments(ModelView(model), texts(), [SLOW] * 2, merge, lambda layers: None))
    assert len(found) == 2
    for layer, moments in enumerate(found):
        assert moments.heads.tolist() == order
        for name, expected in by_plain_loops(exact, layer, groups, order).items():
            here = getattr(moments, name)
            scale = float(expected.abs().max())
            torch.testing.assert_close(here, expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_what_a_pair_decides_is_the_derivative_of_the_output():
    """E |q c|^2 over all directions at once: the squared derivative of what the head puts out, by autograd, in how much
    of the pair the scores have. The moments take q and c as unrelated in phase, so this is checked before that."""
    generator = torch.Generator().manual_seed(3)
    tokens, hidden = 5, 7
    q, k = (torch.randn(tokens, generator=generator, dtype=torch.complex128) for _ in range(2))
    others = torch.randn(tokens, tokens, generator=generator, dtype=torch.float64)
    values = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    o = torch.randn(hidden, D, generator=generator, dtype=torch.float64)
    mine = torch.outer(q.conj(), k).real  # the pair's part of the scores

    def output(share):
        return (others + share * mine).softmax(-1) @ values @ o.T

    change = torch.autograd.functional.jacobian(output, torch.tensor(1.0, dtype=torch.float64))  # (tokens, hidden)
    weights = (others + mine).softmax(-1)
    for t in range(tokens):
        total = 0.0
        for u in torch.eye(hidden, dtype=torch.float64):
            effect = values @ o.T @ u
            c = (weights[t] * (effect - weights[t] @ effect)).to(k.dtype) @ k
            total += (q[t].conj() * c).real.square()
        torch.testing.assert_close(total, change[t].square().sum())
