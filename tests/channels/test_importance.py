"""Every score against a plain loop from its formula."""

import copy

import pytest
import torch

from kvprune.channels.choice.selection import select
from kvprune.channels.evidence.importance import IMPORTANCE
from kvprune.channels.evidence.statistics import score_layers
from kvprune.errors import NotFinite
from kvprune.models.view import ModelView
from tiny import VOCABULARY, tiny_model

KV, GROUPS, D = 2, 3, 8


@pytest.fixture(params=["llama", "qwen2"])
def model(request):
    return tiny_model(request.param, kv_heads=KV, groups=GROUPS, head_dim=D, layers=2)


def batches():
    return list(torch.randint(3, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(1)).split(3))


def scores(model, name):
    return score_layers(ModelView(model), IMPORTANCE[name], batches(), lambda n: None)


def loop_scores(attention, value):
    """qk, vo from value(parameter): normalised per projection, Q averaged with K, V with O."""
    table = {name: torch.zeros(KV, D) for name in "qkvo"}
    for kv in range(KV):
        for c in range(D):
            for name in "kv":
                linear = getattr(attention, f"{name}_proj")
                row = kv * D + c
                table[name][kv, c] = value(linear.weight)[row].sum()
                if linear.bias is not None:
                    table[name][kv, c] += value(linear.bias)[row]
            for g in range(GROUPS):
                row = (kv * GROUPS + g) * D + c
                table["q"][kv, c] += value(attention.q_proj.weight)[row].sum()
                if attention.q_proj.bias is not None:
                    table["q"][kv, c] += value(attention.q_proj.bias)[row]
                table["o"][kv, c] += value(attention.o_proj.weight)[:, row].sum()
    table = {name: t / t.mean() for name, t in table.items()}
    return (table["q"] + table["k"]) / 2, (table["v"] + table["o"]) / 2


def check(found, expected):
    torch.testing.assert_close(found.qk, expected[0].detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.vo, expected[1].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("l1", torch.abs), ("l2", torch.square)])
def test_l1_and_l2(model, name, size):
    for found, block in zip(scores(model, name), model.model.layers, strict=True):
        check(found, loop_scores(block.self_attn, size))


def test_taylor_is_the_plain_gradient_of_the_mean_loss(model):
    found = scores(model, "taylor")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())  # left as it was
    ids = torch.cat(batches())
    model(ids, labels=ids).loss.backward()
    for score, block in zip(found, model.model.layers, strict=True):
        check(score, loop_scores(block.self_attn, lambda p: (p * p.grad).abs()))


def test_energy_from_captured_projections(model):
    found = scores(model, "energy")
    captured = {}

    def keep(index):
        return lambda _m, args, kwargs: captured.__setitem__(index, kwargs["hidden_states"])

    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(keep(index), with_kwargs=True)
    model(torch.cat(batches()))
    for index, (score, block) in enumerate(zip(found, model.model.layers, strict=True)):
        a = block.self_attn
        x = captured[index].reshape(-1, model.config.hidden_size)
        q, k, v = a.q_proj(x), a.k_proj(x), a.v_proj(x)
        qk, vo = torch.zeros(KV, D), torch.zeros(KV, D)
        for kv in range(KV):
            for c in range(D):
                pair = [c % (D // 2), c % (D // 2) + D // 2]
                key = sum(k[:, kv * D + p].square().mean() for p in pair)
                query, column = 0.0, 0.0
                for g in range(GROUPS):
                    head = (kv * GROUPS + g) * D
                    query += sum(q[:, head + p].square().mean() for p in pair)
                    column += a.o_proj.weight[:, head + c].square().sum()
                qk[kv, c] = query * key / 2
                vo[kv, c] = v[:, kv * D + c].square().mean() * column
        check(score, (qk, vo))


@torch.no_grad()
def test_variance_is_half_of_what_each_pair_changes_behind_the_attention(model):
    """A pair: half of E |q|^2 |c|^2, c as AttentionMoments has it; a channel of V: E z^2 times |W_o|^2, each summed
    over the query heads of a KV head. A pair's is halved between its channels."""
    found = scores(model, "variance")
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    half = D // 2
    qk, squares = (torch.zeros(2, KV, D, dtype=torch.float64) for _ in range(2))
    tokens = 0
    for window, ids in enumerate(torch.cat(batches())):
        out = exact(ids[None], output_hidden_states=True, output_attentions=True)
        tokens += len(ids)
        for layer, block in enumerate(exact.model.layers):
            draws = torch.Generator().manual_seed(layer << 32 | window)
            a = block.self_attn
            x = block.input_layernorm(out.hidden_states[layer][0])
            cos, sin = (t[0, :, :half] for t in exact.model.rotary_emb(x[None], torch.arange(len(ids))[None]))
            q, k = a.q_proj(x).unflatten(-1, (-1, D)), a.k_proj(x).unflatten(-1, (-1, D))
            v = torch.nn.functional.linear(x, a.v_proj.weight).unflatten(-1, (-1, D))
            for head in range(KV * GROUPS):
                kv = head // GROUPS
                if head % GROUPS == 0:
                    directions = torch.randn(GROUPS, exact.config.hidden_size, generator=draws).double()
                effect = v[:, kv] @ (directions[head % GROUPS] @ a.o_proj.weight[:, head * D : (head + 1) * D])
                weights = out.attentions[layer][0, head]
                for pair in range(half):
                    one, other = k[:, kv, pair], k[:, kv, pair + half]
                    turned = torch.complex(
                        one * cos[:, pair] - other * sin[:, pair], other * cos[:, pair] + one * sin[:, pair]
                    )
                    for t in range(len(ids)):
                        c = (weights[t] * (effect - weights[t] @ effect) * turned).sum()
                        size = (q[t, head, [pair, pair + half]] * a.scaling).square().sum()
                        qk[layer, kv, [pair, pair + half]] += size * c.abs().square() / 4
                for channel in range(D):
                    squares[layer, kv, channel] += (weights @ v[:, kv, channel]).square().sum()
    for layer, score in enumerate(found):
        columns = exact.model.layers[layer].self_attn.o_proj.weight.square().sum(0).view(KV, GROUPS, D).sum(1)
        check(score, (qk[layer].float() / tokens, (squares[layer] * columns).float() / tokens))


def test_bfloat16_statistics_stay_close_to_float32(model):
    exact = scores(model, "energy")
    for found, expected in zip(scores(model.to(torch.bfloat16), "energy"), exact, strict=True):
        torch.testing.assert_close(found.vo, expected.vo, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("name", sorted(IMPORTANCE))
def test_nan_names_the_layer(model, name):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFinite, match="layer 1"):
        scores(model, name)


@pytest.mark.parametrize("joint", [False, True])
def test_selection_by_brute_force(joint):
    from itertools import combinations

    from kvprune.channels.evidence.importance import Scores

    generator = torch.Generator().manual_seed(3)
    score = Scores(torch.rand(KV, D, generator=generator), torch.rand(KV, D, generator=generator))
    units = [[c, c + D // 2] for c in range(D // 2)]
    kept = select(score, 4, torch.tensor(units), joint)
    for head in range(KV):
        mixed = score.qk[head] / score.qk.mean() + score.vo[head] / score.vo.mean()
        by_units = [sorted(a + b) for a, b in combinations(units, 2)]
        singles = [list(c) for c in combinations(range(D), 4)]
        qk = max(by_units, key=lambda c: (mixed if joint else score.qk[head])[c].sum())
        vo = qk if joint else max(singles, key=lambda c: score.vo[head][c].sum())
        assert kept.qk[head].tolist() == qk
        assert kept.vo[head].tolist() == vo
