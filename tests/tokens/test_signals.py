"""What scores a token, against plain loops from the formulas."""

import math

import pytest
import torch

from kvprune.tokens.signals import SIGNALS, Before
from kvprune.tokens.signals.expected_attention import AHEAD
from kvprune.tokens.signals.key_distance import MEMORY


def told(tokens=70, heads=2, groups=2, width=4):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, heads, tokens, width, generator=generator)
    queries = torch.randn(1, heads * groups, tokens, width, generator=generator) + 1
    return Before(keys, queries, 0.7)


def scored(name, before, pieces, turns=None, real=None):
    signal, found, start = SIGNALS[name](3, 1, turns), [], 0
    for n in pieces:
        positions = torch.arange(start, start + n).unsqueeze(0)
        part = None if real is None else real[:, start : start + n]
        found.append(signal.scores(before.part(slice(start, start + n)), positions, part))
        start += n
    return torch.cat(found, 2)[0]


def distance(key, keys):
    """Of a token from those before it."""
    mean = sum(MEMORY ** (len(keys) - 1 - i) * k / k.norm() for i, k in enumerate(keys))
    return -float(key @ mean / key.norm() / mean.norm()) if keys else 0.0


def expected(key, queries, turns, scaling):
    """log E exp(score) of a normal query, its mean turned on by 1 to AHEAD tokens, by one head."""
    n, half = len(queries), len(key) // 2
    weights = [(1 - MEMORY) * MEMORY ** (n - 1 - i) for i in range(n)]
    total = 0.0
    for c in range(half):
        pairs = [complex(q[c], q[c + half]) for q in queries]
        mean = sum(w * p for w, p in zip(weights, pairs, strict=True))
        square = sum(w * abs(p) ** 2 for w, p in zip(weights, pairs, strict=True))
        k = complex(key[c], key[c + half])
        steps = range(1, AHEAD + 1)
        turned = sum(complex(math.cos(turns[c] * s), math.sin(turns[c] * s)) for s in steps) / AHEAD
        total += scaling * (mean * turned * k.conjugate()).real
        total += scaling**2 / 2 * max(square - abs(mean) ** 2, 0) / 2 * abs(k) ** 2
    return total


@pytest.mark.parametrize("pieces", [[70], [1] * 70, [33, 1, 36]], ids=["at once", "one by one", "in pieces"])
def test_signals_are_their_formulas(pieces):
    before, turns = told(), [0.3, 0.01]
    given = torch.tensor([turns])
    distances = scored("key-distance", before, pieces)
    attention = scored("expected-attention", before, pieces, given)
    product = scored("product", before, pieces, given)
    for head in range(2):
        for t in (0, 1, 40, 69):
            keys, own = before.keys[0, head], before.queries[0, 2 * head : 2 * head + 2]
            far = distance(keys[t], list(keys[:t]))
            near = sum(expected(keys[t], list(q[:t]), turns, 0.7) for q in own) / 2
            assert float(distances[head, t]) == pytest.approx(far, abs=1e-5)
            assert float(attention[head, t]) == pytest.approx(near, abs=1e-4)
            assert float(product[head, t]) == pytest.approx(near + math.log(max(1 + far, 1e-6)), abs=1e-3)


@pytest.mark.parametrize("name", SIGNALS)
def test_what_is_not_real_does_not_count(name):
    before = told()
    gaps = torch.zeros(1, 90, dtype=torch.bool)
    gaps[0, [*range(5, 30), *range(40, 85)]] = True
    assert gaps.sum() == 70

    def spread(x):
        found = torch.full((*x.shape[:2], 90, x.shape[3]), 7.0)
        found[:, :, gaps[0]] = x
        return found

    wide = Before(spread(before.keys), spread(before.queries), before.scaling)
    turns = torch.tensor([[0.3, 0.01]])
    signal = SIGNALS[name](3, 1, turns)
    found = signal.scores(wide, gaps.cumsum(1) - 1, gaps)[0, :, gaps[0]]
    torch.testing.assert_close(found, scored(name, before, [70], turns), rtol=0, atol=1e-4)
