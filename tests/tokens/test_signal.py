"""Anchors, fusion and thresholds against plain loops written from the formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprune.tokens.anchors import BLOCK, cosine, moving_average
from kvprune.tokens.fusion import FUSIONS
from kvprune.tokens.similarity import uniform
from kvprune.tokens.threshold import HISTORY, THRESHOLDS, Fixed, Places, Rule


@given(
    tokens=st.integers(1, 3 * BLOCK + 5),
    gamma=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    cut=st.integers(0, 3 * BLOCK + 5),
    fresh=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_moving_average_is_the_loop_at_once_and_in_two_pieces(tokens, gamma, cut, fresh):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64)
    start = None if fresh else torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    anchor = x[:, :, 0] if start is None else start
    expected = [anchor]
    for t in range(tokens):
        anchor = gamma * anchor + (1 - gamma) * x[:, :, t]
        expected.append(anchor)
    found = moving_average(x, start, gamma)
    torch.testing.assert_close(found, torch.stack(expected, dim=2), rtol=1e-9, atol=1e-12)
    cut = min(cut, tokens - 1)
    if cut:
        left = moving_average(x[:, :, :cut], start, gamma)
        right = moving_average(x[:, :, cut:], left[:, :, -1], gamma)
        torch.testing.assert_close(torch.cat((left[:, :, :-1], right), dim=2), found, rtol=1e-9, atol=1e-12)


def test_moving_average_of_a_long_text_stays_finite():
    x = torch.randn(1, 1, 5000, 2)
    assert torch.isfinite(moving_average(x, None, 0.9)).all()


def test_cosine_is_the_formula():
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    torch.testing.assert_close(cosine(x, y), expected)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_fusions_are_their_formulas(heads):
    keys, values = torch.rand(2, heads, 7).double(), torch.rand(2, heads, 7).double()
    for b in range(2):
        for t in range(7):
            k, v = keys[b, :, t].tolist(), values[b, :, t].tolist()
            mean_k, mean_v = sum(k) / heads, sum(v) / heads
            var_k, var_v = (sum((x - m) ** 2 for x in xs) / heads for xs, m in ((k, mean_k), (v, mean_v)))
            a, c = 1 / (var_k + 1e-6), 1 / (var_v + 1e-6)
            weight = a / (a + c) if heads > 1 else 0.5
            expected = {
                "variance": weight * mean_k + (1 - weight) * mean_v,
                "mean": (mean_k + mean_v) / 2,
                "key": mean_k,
                "value": mean_v,
            }
            for name, fusion in FUSIONS.items():
                assert fusion()(torch.stack((keys, values), dim=1))[b, t].item() == pytest.approx(
                    expected[name], abs=1e-9
                )


def loop(kind, rule, similarity, never):
    """One sequence, token by token, from the rules' own words."""
    level, rate, taken, counted = math.inf, rule.target, 0, 0
    block, history, flags = [], [], []
    for position, s in enumerate(similarity):
        late = position >= rule.first
        flag = late and s > level and not never[position]
        flags.append(flag)
        history = [*history, s][-HISTORY:] if position else []
        if late:
            block.append(flag)
        if (position + 1) % rule.block == 0:
            taken, counted = taken + sum(block), counted + len(block)
            if position + 1 >= rule.first:
                if kind == "quantile":
                    share = rule.target + (rule.target * counted - taken) / 32
                    inside = 0 < share < 1 and history
                    level = float(np.quantile(history, 1 - share)) if inside else math.inf if share < 1 else -math.inf
                elif math.isinf(level):
                    level = float(np.quantile(history, 1 - rule.target)) if history else math.inf
                else:
                    if block:
                        memory = rule.beta ** len(block)
                        rate = memory * rate + (1 - memory) * sum(block) / len(block)
                    if abs(rate - rule.target) > rule.eta:
                        level += rule.alpha * (rate - rule.target)
            block = []
    return flags


def take(threshold, similarity, start, never, on_host=True):
    """NumPy: similarity (B, T), with NaN behind the last token of a shorter sequence, start (B,), never (B, T)."""
    similarity, start, never = map(torch.from_numpy, (similarity, start, never))
    rule = threshold.rule
    places = Places.of(~similarity.isnan(), start, never, rule.first, rule.block, on_host)
    return threshold.take(similarity, places).numpy()


@pytest.mark.parametrize("kind", list(THRESHOLDS))
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_thresholds_are_their_loops_in_any_pieces_and_any_batch(kind, data):
    """Sequences of different lengths, fed in pieces that cross the blocks, each as if it were alone."""
    block = data.draw(st.sampled_from([1, 4, 16, 300]))  # the last is longer than what is remembered
    rule = Rule(
        data.draw(st.sampled_from([0.2, 0.5, 0.9])), block * data.draw(st.integers(1, 3)), block, 0.1, 0.97, 0.01
    )
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=3))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    texts = [generator.random(n) for n in lengths]
    never = [generator.random(n) < 0.05 for n in lengths]
    threshold = THRESHOLDS[kind](rule, len(texts))
    done = np.zeros(len(texts), dtype=np.int64)
    found = [[] for _ in texts]
    while any(done < lengths):
        left = np.array(lengths) - done
        step = np.minimum(left, data.draw(st.sampled_from([1, 3, 17, 64, 400])))
        piece = np.full((len(texts), max(int(step.max()), 1)), np.nan)
        forbidden = np.zeros(piece.shape, dtype=bool)
        for b, n in enumerate(step):
            piece[b, :n] = texts[b][done[b] : done[b] + n]
            forbidden[b, :n] = never[b][done[b] : done[b] + n]
        taken = take(threshold, piece, done, forbidden, data.draw(st.booleans()))
        for b, n in enumerate(step):
            found[b] += taken[b, :n].tolist()
        done = done + step
    for b, text in enumerate(texts):
        assert found[b] == loop(kind, rule, text, never[b])


@pytest.mark.parametrize("kind", list(THRESHOLDS))
@pytest.mark.parametrize("shape", ["uniform", "drift", "repeated", "equal"])
def test_thresholds_reach_their_target(kind, shape):
    """Within 0.02 behind the warm-up, whatever the similarities do."""
    n = 4096
    noise = np.random.default_rng(0).random(n)
    similarity = {
        "uniform": noise,
        "drift": 0.2 * noise + np.linspace(0, 0.5, n),
        "repeated": np.resize(noise[:7], n),
        "equal": 0.5 + 1e-5 * (np.arange(n) * 0.6180339887498949 % 1),  # as the filter hands them over
    }[shape]
    for target in (0.0, 0.2, 0.5, 0.8):
        threshold = THRESHOLDS[kind](Rule(target, 32, 16, 0.1, 0.98, 0.005), 1)
        taken = take(threshold, similarity[None], np.zeros(1, dtype=np.int64), np.zeros((1, n), dtype=bool))
        assert taken[0, 32:].mean() == pytest.approx(target, abs=0.02)
        assert not taken[0, :32].any()
        assert target or not taken.any()


def split_mix(position, seed, layer):
    """In whole numbers of Python, cut to 64 bits."""
    x = (position + seed * 0x632BE59BD9B4E019) % 2**64
    x = x * 0x9E3779B97F4A7C15 % 2**64 ^ (layer + 1) * 0xD1342543DE82EF95 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) >> 11) / 2**53


def test_the_random_baseline_is_uniform_and_knows_seed_and_layer_only():
    positions = torch.arange(20000)[None]
    x = uniform(positions, 0, 3).numpy()
    assert np.histogram(x, 10, (0, 1))[0] == pytest.approx(2000, rel=0.1)
    assert np.array_equal(uniform(positions[:, 500:], 0, 3), x[:, 500:])
    for seed, layer in ((1, 3), (0, 4)):
        other = uniform(positions, seed, layer).numpy()
        assert other[0, :99].tolist() == [split_mix(t, seed, layer) for t in range(99)]
        assert abs(np.corrcoef(x[0], other[0])[0, 1]) < 0.03
    assert abs(np.corrcoef(x[0, 1:], x[0, :-1])[0, 1]) < 0.03
    threshold = Fixed(Rule(0.3, 16, 16, 0.1, 0.9, 0.01), 1)
    taken = take(threshold, x, np.zeros(1, dtype=np.int64), np.zeros(x.shape, dtype=bool))
    assert taken.mean() == pytest.approx(0.3, abs=0.01)
