"""Widths against the formula, brute force and their own promises."""

import itertools
import math
import statistics

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from kvprune.channels.widths import allocation
from kvprune.channels.widths.allocation import Grid, LayerGrid
from kvprune.errors import BadOption, UnreachableRatio

changes_of = st.lists(st.floats(-0.1, 10), min_size=1, max_size=40)


def test_by_sensitivity_is_the_formula():
    changes, ratio = [0.1, 0.4, 0.02, 1.0], 0.3
    tau = 3 * statistics.median(changes)
    e = [math.exp(-change / tau) for change in changes]
    expected = [ratio * 4 * x / sum(e) for x in e]
    assert allocation.by_sensitivity(changes, ratio, 1.0) == pytest.approx(expected)


def test_excess_over_the_largest_ratio_goes_to_the_others():
    ratios = allocation.by_sensitivity([0.0, 1.0, 1.0, 1.0], 0.5, 0.75, tau=0.5)
    assert ratios == pytest.approx([0.75, 1.25 / 3, 1.25 / 3, 1.25 / 3])


@given(changes_of, st.floats(0, 0.75), st.floats(0.1, 30))
def test_by_sensitivity_keeps_mean_limit_and_order(changes, ratio, tau):
    ratios = allocation.by_sensitivity(changes, ratio, 0.75, tau)
    assert statistics.fmean(ratios) == pytest.approx(ratio, abs=1e-6)
    assert all(-1e-12 <= r <= 0.75 + 1e-9 for r in ratios)
    for (a, ra), (b, rb) in itertools.combinations(zip(changes, ratios, strict=True), 2):
        assert not (a < b and ra < rb - 1e-9)


@given(changes_of, st.floats(0, 0.75))
def test_by_rank_keeps_mean_limit_and_order(changes, ratio):
    ratios = allocation.by_rank(changes, ratio, 0.75)
    assert statistics.fmean(ratios) == pytest.approx(ratio, abs=1e-6)
    assert all(-1e-12 <= r <= 0.75 + 1e-9 for r in ratios)
    for (a, ra), (b, rb) in itertools.combinations(zip(changes, ratios, strict=True), 2):
        assert not (a < b and ra < rb - 1e-9)


def test_no_positive_change_means_uniform():
    assert allocation.by_sensitivity([-0.1, 0.0], 0.4, 0.75) == [0.4, 0.4]


@given(
    st.lists(st.floats(0, 0.9), min_size=1, max_size=40),
    st.sampled_from([16, 64, 80, 100, 128]),
    st.sampled_from([2, 4, 8, 16]),
    st.integers(1, 32),
)
def test_rounded_widths_are_on_the_grid_and_meet_the_total(ratios, head_dim, align, min_width):
    grid = Grid(len(ratios), head_dim, align, min(min_width, head_dim), 2)
    ratio = statistics.fmean(ratios)
    assume(ratio <= grid.max_ratio)
    try:
        widths = allocation.round_widths(ratios, ratio, grid)
    except UnreachableRatio:
        assert align / (len(ratios) * head_dim) > 0.01  # only too coarse a grid is an excuse
        return
    assert set(widths) <= set(grid.widths)
    assert abs(1 - sum(widths) / (len(ratios) * head_dim) - ratio) <= 0.01


@pytest.mark.parametrize("layers", [2, 6])
def test_rounding_where_an_engine_lacks_widths(layers):
    """One layer of 32 channels, of which a width may have up to 16 or all; whatever can be met is met."""
    each = (LayerGrid(1, 16, None),) * (layers - 1) + (LayerGrid(1, 32, None),)
    grid = Grid(layers, 16, 2, 4, 2, None, each, refused=lambda width: 16 < width < 32)
    assert grid.widths_of(layers - 1) == [*range(4, 17, 2), 32]
    every = [grid.widths_of(layer) for layer in range(layers)]
    totals = {sum(widths) for widths in itertools.product(*every)}
    for total in totals:
        ratio = 1 - total / grid.total
        widths = allocation.round_widths([ratio] * layers, ratio, grid)
        assert sum(widths) == total
        assert all(width in own for width, own in zip(widths, every, strict=True))


def test_rounding_reaches_the_brute_force_total():
    """Of all combinations on a small grid, none is nearer to the asked total."""
    grid = Grid(4, 16, 2, 4, 2)
    for ratios in itertools.product([0.0, 0.3, 0.55, 0.75], repeat=4):
        ratio = statistics.fmean(ratios)
        best = min(abs(1 - sum(w) / 64 - ratio) for w in itertools.product(grid.widths, repeat=4))
        if best <= 0.01:
            found = allocation.round_widths(ratios, ratio, grid)
            assert abs(1 - sum(found) / 64 - ratio) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("ratio", [-0.1, 0.76, 1.0, math.nan, math.inf])
def test_a_ratio_out_of_reach_names_the_range(ratio):
    with pytest.raises(UnreachableRatio, match=r"0 to 0.75 "):
        allocation.round_widths([0.5] * 4, ratio, Grid(4, 64, 8, 16, 2))


def test_a_grid_too_coarse_names_the_nearest():
    with pytest.raises(UnreachableRatio, match=r"nearest is 0\.25|nearest is 0\.5"):
        allocation.round_widths([0.35] * 2, 0.35, Grid(2, 16, 8, 8, 2))


@pytest.mark.parametrize(("align", "min_width"), [(3, 16), (0, 16), (8, 0), (8, 65)])
def test_an_impossible_grid_is_a_users_mistake(align, min_width):
    with pytest.raises(BadOption):
        Grid(4, 64, align, min_width, 2)


def test_one_width_takes_the_nearest():
    assert allocation.one_width(0.3, Grid(3, 64, 8, 16, 2)) == [48] * 3
    assert allocation.one_width(0.35, Grid(3, 64, 8, 16, 2)) == [40] * 3


@given(
    costs=st.lists(st.tuples(*[st.floats(0, 1)] * 2).map(lambda c: {4: max(c), 8: min(c)}), min_size=2, max_size=4),
    ratio=st.sampled_from([0.25, 0.375, 0.5, 0.625]),
)
def test_budget_is_the_brute_force_optimum(costs, ratio):
    """All widths of all layers tried; costs in straight lines between the probed widths and (16, 0)."""
    grid = allocation.Grid(len(costs), 16, align=2, min_width=4, unit=2)

    def cost(points, width):
        return np.interp(width, [4, 8, 16], [points[4], points[8], 0.0])

    found = allocation.by_budget(costs, ratio, grid)
    total = sum(allocation.round_widths(allocation.uniform(len(costs), ratio), ratio, grid))
    assert sum(found) == total
    best = min(
        sum(cost(points, width) for points, width in zip(costs, widths, strict=True))
        for widths in itertools.product(grid.widths, repeat=len(costs))
        if sum(widths) == total
    )
    assert sum(cost(points, width) for points, width in zip(costs, found, strict=True)) == pytest.approx(best, abs=1e-9)


def test_budget_reads_noise_as_nothing():
    """A probe below zero costs nothing, and a narrower cut never less than a wider one."""
    grid = allocation.Grid(2, 16, align=4, min_width=4, unit=2)
    widths = allocation.by_budget([{8: 0.5, 4: 0.1}, {8: -0.3, 4: 0.2}], 0.5, grid)
    assert widths == [12, 4]


@given(st.integers(1, 6), st.integers(0, 3), st.floats(0.5, 0.9))
def test_no_layer_is_wider_than_kernels_take(layers, spread, ratio):
    """Whatever the probes say, of heads of 512 channels none keeps more than 256."""
    grid = Grid(layers, 512, 8, 16, 2, 256)
    assert grid.widths[-1] == 256
    costs = [{128: 1.0 + spread * i, 256: 0.5, 384: 0.2} for i in range(layers)]
    try:
        widths = allocation.by_budget(costs, ratio, grid)
    except UnreachableRatio:
        assume(False)
    assert max(widths) <= 256
    assert sum(widths) == sum(allocation.round_widths([ratio] * layers, ratio, grid))


def test_min_width_above_what_kernels_take_is_refused():
    with pytest.raises(BadOption, match=r"no width up to the 256 channels .* lower them"):
        Grid(2, 512, 8, 264, 2, 256)


# Of each layer its KV heads, their channels, and the most that one may have
DIFFERING = st.lists(
    st.sampled_from([LayerGrid(4, 16, None), LayerGrid(1, 24, None), LayerGrid(2, 32, 24)]),
    min_size=2,
    max_size=4,
)


@given(layers=DIFFERING, ratio=st.sampled_from([0.25, 0.5, 0.625]), seed=st.integers(0, 99))
def test_budget_of_layers_that_differ_is_the_brute_force_optimum(layers, ratio, seed):
    """What a width costs counts once, what it keeps as often as the layer has KV heads."""
    grid = Grid(len(layers), layers[0].channels, 4, 4, 2, each=tuple(layers))
    draws = np.random.default_rng(seed)
    costs = []
    for _, channels, _ in layers:
        few, many = sorted(draws.uniform(size=2))
        costs.append({4: many, channels // 2: few})

    def kept(widths):
        return sum(own.heads * width for own, width in zip(layers, widths, strict=True))

    def cost(widths):
        lines = zip(costs, layers, widths, strict=True)
        return sum(np.interp(w, [*points, own.channels], [*points.values(), 0.0]) for points, own, w in lines)

    try:
        even = allocation.round_widths([ratio] * len(layers), ratio, grid)
    except UnreachableRatio:
        assume(False)
    found = allocation.by_budget(costs, ratio, grid)
    assert abs(kept(even) - sum(own.heads * own.channels for own in layers) * (1 - ratio)) <= 0.01 * grid.total
    assert kept(found) == kept(even)
    every = itertools.product(*[grid.widths_of(layer) for layer in range(len(layers))])
    assert cost(found) == pytest.approx(min(cost(w) for w in every if kept(w) == kept(even)), abs=1e-9)
