"""Which KV heads go together: against brute force, and against heads that are known to be alike."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import kvprune
from kvprune.channels.evidence.grouping import best_groups, likeness
from kvprune.models.attention import rope_pairs
from kvprune.models.tap import Seen
from tiny import COARSE, VOCABULARY, tiny_model, tiny_tokenizer


def partitions(heads, size):
    """All ways to put a list of heads in groups of `size`."""
    if not heads:
        yield []
        return
    for others in itertools.combinations(heads[1:], size - 1):
        group = [heads[0], *others]
        for rest in partitions([head for head in heads if head not in group], size):
            yield [group, *rest]


def within(alike, groups):
    return sum(float(alike[a, b]) for group in groups for a in group for b in group if a != b)


def in_order(heads, size):
    return torch.arange(heads).view(-1, size).tolist()


def noise(heads, seed):
    return torch.rand(heads, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from([(2, 1), (4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (9, 3)]), st.integers(0, 10**6))
def test_planted_groups_are_the_brute_force_optimum(sizes, seed):
    heads, size = sizes
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
    planted = order.view(-1, size)
    alike = 0.2 * noise(heads, seed)
    for group in planted:
        alike[group.unsqueeze(1), group] += 0.8
    found = best_groups(alike, size).tolist()
    assert found == sorted(sorted(group) for group in planted.tolist())
    assert within(alike, found) == pytest.approx(max(within(alike, p) for p in partitions([*range(heads)], size)))


@given(st.sampled_from([(3, 3), (4, 2), (6, 3), (8, 2), (8, 4), (12, 4)]), st.integers(0, 10**6), st.floats(-4, 4))
def test_never_worse_than_the_heads_in_their_order(sizes, seed, scale):
    heads, size = sizes
    alike = noise(heads, seed) * 10**scale
    found = best_groups(alike, size)
    assert sorted(found.flatten().tolist()) == [*range(heads)]
    assert found.tolist() == sorted(sorted(group) for group in found.tolist())
    assert within(alike, found.tolist()) >= within(alike, in_order(heads, size)) * (1 - 1e-6)


def test_no_swap_of_two_heads_would_gain():
    for seed in range(20):
        alike = noise(8, seed)
        found = best_groups(alike, 4).tolist()
        best = within(alike, found)
        for a, b in itertools.product(found[0], found[1]):
            swap = {a: b, b: a}
            assert within(alike, [[swap.get(head, head) for head in group] for group in found]) <= best + 1e-9


def test_where_nothing_is_alike_the_order_stays():
    for alike in (torch.eye(6), torch.zeros(6, 6), torch.full((6, 6), float("nan"))):
        assert best_groups(alike.double(), 3).tolist() == in_order(6, 3)


def what_projections_put_out(heads, head_dim, copies, seed=0):
    """Calls with keys and values of random heads. The second of each of `copies` is the first, its values turned
    by any rotation and each pair of its keys by an angle of its own."""
    generator = torch.Generator().manual_seed(seed)
    half = head_dim // 2
    mix = torch.randn(2, heads, head_dim, head_dim, generator=generator)
    k, v = torch.einsum("xbtd,xhed->xbthe", torch.randn(2, 3, 50, head_dim, generator=generator), mix)
    k = k + torch.randn(heads, head_dim, generator=generator) * 3  # a constant is not what they have in common
    for a, b in copies:
        rotation = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator)).Q
        v[:, :, b] = v[:, :, a] @ rotation
        angle = 6.28 * torch.rand(half, generator=generator)
        first, second = k[:, :, a, :half], k[:, :, a, half:]
        k[:, :, b, :half] = first * angle.cos() - second * angle.sin()
        k[:, :, b, half:] = second * angle.cos() + first * angle.sin()
    return [
        Seen(part, part.transpose(1, 2), other.transpose(1, 2), None, 1.0, None, None, None)
        for part, other in zip(k.split(2), v.split(2), strict=True)
    ]


def test_copies_are_most_alike():
    outputs = what_projections_put_out(5, 8, [(0, 3), (4, 1)])
    alike = likeness(outputs, rope_pairs(8))
    torch.testing.assert_close(alike, alike.T)
    torch.testing.assert_close(alike.diagonal(), torch.full((5,), 2.0, dtype=torch.float64))
    for a, b in itertools.combinations(range(5), 2):
        if (a, b) in ((0, 3), (1, 4)):
            assert alike[a, b] == pytest.approx(2, abs=1e-4)
        else:
            assert alike[a, b] < 1.5


def test_likeness_by_plain_loops():
    outputs = what_projections_put_out(3, 6, [])
    alike = likeness(outputs, rope_pairs(6))
    k, v = (
        torch.cat([getattr(o, name).transpose(1, 2).flatten(0, 1) for o in outputs]).double()
        for name in ("key", "value")
    )
    k, v = k - k.mean(0), v - v.mean(0)
    for a, b in itertools.product(range(3), repeat=2):
        shared = own_a = own_b = 0.0
        for i, j in itertools.product(range(6), repeat=2):
            shared += float(v[:, a, i] @ v[:, b, j]) ** 2
            own_a += float(v[:, a, i] @ v[:, a, j]) ** 2
            own_b += float(v[:, b, i] @ v[:, b, j]) ** 2
        expected = shared / (own_a * own_b) ** 0.5
        total = weights = 0.0
        for pair in range(3):
            x, y = (torch.complex(k[:, head, pair], k[:, head, pair + 3]) for head in (a, b))
            weight = float(x.abs().square().sum() * y.abs().square().sum()) ** 0.5
            total += float((x @ y.conj()).abs()) ** 2 / weight
            weights += weight
        assert float(alike[a, b]) == pytest.approx(expected + total / weights, rel=1e-6)


def test_a_head_that_puts_nothing_out_is_like_no_other():
    outputs = what_projections_put_out(4, 8, [(0, 2)])
    for part in outputs:
        part.key[:, 1] = part.value[:, 1] = 0
    alike = likeness(outputs, rope_pairs(8))
    assert torch.isfinite(alike).all()
    assert alike[1].max() < 1e-6
    assert best_groups(alike, 2).tolist() == [[0, 2], [1, 3]]


@torch.no_grad()
def test_heads_that_are_copies_are_merged_for_nothing(texts, tmp_path):
    """Heads 0 and 3 have the same keys and values, up to what merging can undo, and so have 2 and 1; Q and O differ."""
    # A context so long that no pair is slow in it: slow ones are mixed, and what turns a little is lost
    model = tiny_model("llama", kv_heads=4, groups=2, head_dim=16, layers=2, positions=65536)
    for block in model.model.layers:
        attention = block.self_attn
        k, v = (getattr(attention, f"{name}_proj").weight.data.view(4, 16, -1) for name in "kv")
        for a, b in ((0, 3), (2, 1)):
            v[b] = torch.linalg.qr(torch.randn(16, 16)).Q @ v[a]
            angle = 6.28 * torch.rand(8, 1)
            k[b, :8] = k[a, :8] * angle.cos() - k[a, 8:] * angle.sin()
            k[b, 8:] = k[a, 8:] * angle.cos() + k[a, :8] * angle.sin()
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    options = {**COARSE, "merge": 2, "allocation": "uniform", "repair": "rotate"}
    pruned = kvprune.prune(tmp_path / "dense", ratio=0.5, **options)
    assert [layer.heads for layer in pruned.plan.layers] == [((0, 3), (1, 2))] * 2
    assert pruned.plan.widths == [16, 16]
    ids = torch.randint(3, VOCABULARY, (2, 40))
    expected = model(ids).logits
    torch.testing.assert_close(pruned.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    apart = kvprune.prune(tmp_path / "dense", ratio=0.5, **{**options, "merge": 1})
    assert (apart.model(ids).logits - expected).abs().max() > 0.05
