"""How much width each layer loses: sensitivities and a ratio -> kept widths."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from kvprune.errors import BadOption, UnreachableRatio

TOLERANCE = 0.01  # of the dense KV bytes: how far the achieved total may be from the asked one


class LayerGrid(NamedTuple):
    """Of a layer: its KV heads, the channels of each, and the most that one may have (None: no limit)."""

    heads: int
    channels: int
    widest: int | None


@dataclass(frozen=True)
class Grid:
    """The widths a layer can have: multiples of `align` from `min_width` up, and all channels, head_dim (where
    KV heads are merged, of all heads that become one).

    unit: channels that leave Q and K together; `align` must be a multiple of it. widest: a limit of attention kernels,
    for heads that can become wider than they were; None: no limit. each: what each layer has, where layers differ;
    head_dim and widest are then of no layer. refused: whether the engine that is pruned for has no such width.
    """

    layers: int
    head_dim: int
    align: int
    min_width: int
    unit: int
    widest: int | None = None
    each: tuple[LayerGrid, ...] = ()
    refused: Callable[[int], bool] = lambda width: False

    def __post_init__(self) -> None:
        if self.align < 1 or self.align % self.unit:
            raise BadOption(f"--align {self.align} must be a multiple of {self.unit}, the size of a RoPE pair")
        for _, channels, widest in set(self.all):
            if not 1 <= self.min_width <= channels:
                raise BadOption(f"--min-width {self.min_width} must lie between 1 and a KV head's {channels} channels")
            if not self._widths(channels, widest):
                limit = "" if widest is None else f" up to the {widest} channels that attention kernels take"
                raise BadOption(
                    f"--min-width {self.min_width} and --align {self.align} leave no width{limit}; lower them"
                )

    @property
    def all(self) -> tuple[LayerGrid, ...]:
        """Of every layer."""
        return self.each or (LayerGrid(1, self.head_dim, self.widest),) * self.layers

    @property
    def widths(self) -> list[int]:
        """Ascending; of all layers, where they are alike."""
        return self._widths(self.head_dim, self.widest)

    def widths_of(self, layer: int) -> list[int]:
        """Ascending."""
        _, channels, widest = self.all[layer]
        return self._widths(channels, widest)

    def _widths(self, channels: int, widest: int | None) -> list[int]:
        first = math.ceil(self.min_width / self.align) * self.align
        found = [*range(first, channels, self.align), channels]
        return [width for width in found if (widest is None or width <= widest) and not self.refused(width)]

    @property
    def total(self) -> int:
        """Channels of all layers' heads."""
        return sum(heads * channels for heads, channels, _ in self.all)

    @property
    def max_ratio(self) -> float:
        least = sum(own.heads * self.widths_of(layer)[0] for layer, own in enumerate(self.all))
        return 1 - least / self.total

    def check(self, ratio: float) -> None:
        """Raise UnreachableRatio if no widths on this grid can remove that share."""
        if not 0 <= ratio <= self.max_ratio + 1e-9:  # also refuses NaN
            share = f"; {ratio:g} % is --ratio {ratio / 100:g}" if 1 < ratio <= 100 else ""
            raise UnreachableRatio(
                f"--ratio {ratio:g} is outside what can be reached: 0 to {self.max_ratio:.4g} with KV heads "
                f"of {' and '.join(str(c) for c in sorted({own.channels for own in self.all}))} channels, "
                f"--align {self.align} and --min-width {self.min_width}{share}"
            )


def uniform(layers: int, ratio: float) -> list[float]:
    """The same ratio for every layer."""
    return [ratio] * layers


def by_sensitivity(changes: Sequence[float], ratio: float, max_ratio: float, tau: float = 3.0) -> list[float]:
    """Inverse exponential of the change: sensitive layers lose little (KVPruner, Phase A).

    changes: per layer, mean loss with that layer probed minus the dense mean loss, in nats (ours: the difference of
    log-perplexities, same order as that of perplexities and a saner scale). r_l = ratio * L * e_l / sum(e) with
    e_l = exp(-change_l / (tau * median of the positive changes)); tau is ours, since raw changes span five decades.
    No positive change: uniform. Returns ratios with mean `ratio`, none above max_ratio.
    """
    positive = [c for c in changes if c > 0]
    if not positive:
        return uniform(len(changes), ratio)
    scale = tau * statistics.median(positive)
    lowest = min(changes)  # a common factor cancels in the sum, and keeps exp from overflowing
    weights = [math.exp(-(change - lowest) / scale) for change in changes]
    return _clipped([ratio * len(weights) * w / sum(weights) for w in weights], ratio, max_ratio)


def by_rank(changes: Sequence[float], ratio: float, max_ratio: float) -> list[float]:
    """The k-th most sensitive of L layers loses 2 * ratio * k / (L - 1), k = 0 .. L - 1 (KVPruner has a rank mode;
    the straight line is ours)."""
    if len(changes) == 1:
        return [ratio]
    order = sorted(range(len(changes)), key=lambda i: -changes[i])
    ratios = [0.0] * len(changes)
    for rank, layer in enumerate(order):
        ratios[layer] = 2 * ratio * rank / (len(changes) - 1)
    return _clipped(ratios, ratio, max_ratio)


def _clipped(ratios: list[float], mean: float, top: float) -> list[float]:
    """Cut ratios at `top` and hand the excess to the others in proportion, until the mean is right again.

    Layers at 0 get their share only when nothing else is left to raise.
    """
    total = mean * len(ratios)
    result = list(ratios)
    clipped = [False] * len(ratios)
    while any(r > top + 1e-12 for r in result):
        clipped = [c or r > top for c, r in zip(clipped, result, strict=True)]
        left = total - top * sum(clipped)
        free = sum(r for r, c in zip(ratios, clipped, strict=True) if not c)
        rest = clipped.count(False)
        if free > 0:
            result = [top if c else r * left / free for r, c in zip(ratios, clipped, strict=True)]
        else:
            result = [top if c else left / max(rest, 1) for c in clipped]
    return result


def round_widths(ratios: Sequence[float], ratio: float, grid: Grid) -> list[int]:
    """Ratios per layer -> widths on the grid, whose sum is as near to the asked total as the grid allows.

    Every layer is first rounded down; then the one that fell furthest short of its wish is raised, of those whose next
    width is not too far, until the total is reached. Raises UnreachableRatio when the total stays further off than 1 %
    of the dense bytes.
    """
    grid.check(ratio)
    layers, widths = range(grid.layers), [grid.widths_of(layer) for layer in range(grid.layers)]
    heads = [own.heads for own in grid.all]
    wish = [own.channels * (1 - r) for own, r in zip(grid.all, ratios, strict=True)]
    level = [max((i for i, w in enumerate(widths[n]) if w <= wish[n] + 1e-9), default=0) for n in layers]
    target = grid.total * (1 - ratio)

    def width(layer: int) -> int:
        return widths[layer][level[layer]]

    def total() -> int:
        return sum(heads[layer] * width(layer) for layer in layers)

    def step(layer: int, up: int) -> int:
        """The channels from a layer's width to the next one, or to the one before; of all its heads."""
        return heads[layer] * abs(widths[layer][level[layer] + up] - width(layer))

    # Some widths may be far from the next: what would lead away from the target is left as it is
    while (missing := target - total()) > 1e-9:
        nearer = [i for i in layers if level[i] + 1 < len(widths[i]) and step(i, 1) <= 2 * missing]
        if not nearer:
            break
        level[max(nearer, key=lambda i: (wish[i] - width(i), -i))] += 1
    while (excess := total() - target) > grid.align * max(heads) / 2:  # the minimum width held layers above their wish
        nearer = [i for i in layers if level[i] > 0 and step(i, -1) < 2 * excess]
        if not nearer:
            break
        level[max(nearer, key=lambda i: (width(i) - wish[i], i))] -= 1
    achieved = 1 - total() / grid.total
    if abs(achieved - ratio) > TOLERANCE:
        per_step = grid.align * max(heads) / grid.total
        raise UnreachableRatio(
            f"--ratio {ratio:g} cannot be met within {TOLERANCE:.0%}: the nearest is {achieved:.4g}, in steps of "
            f"{per_step:.4g}; ask for that, or lower --align {grid.align}"
        )
    return [width(layer) for layer in layers]


def by_budget(costs: Sequence[dict[int, float]], ratio: float, grid: Grid) -> list[int]:
    """The widths that lose least for the bytes they keep, if losses add up over layers [ours].

    costs: per layer, the change of mean loss (nats) at each width that was probed; the dense width costs nothing, a
    narrower one never less than a wider one, and in between (and below the narrowest) it goes in straight lines.
    Exact, by dynamic programming over the total: the same total as a uniform cut. Raises UnreachableRatio.
    """
    even = round_widths(uniform(grid.layers, ratio), ratio, grid)
    total = sum(own.heads * width for own, width in zip(grid.all, even, strict=True))
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer, cost in enumerate(costs):
        heads, channels, _ = grid.all[layer]
        line = {width: _interpolated(cost, width, channels) for width in grid.widths_of(layer)}
        longer: dict[int, tuple[float, list[int]]] = {}
        for spent, (loss, chosen) in best.items():
            for width, extra in line.items():
                more = spent + heads * width
                if more <= total and loss + extra < longer.get(more, (math.inf,))[0]:
                    longer[more] = (loss + extra, [*chosen, width])
        best = longer
    return best[total][1]


def _interpolated(cost: dict[int, float], width: int, head_dim: int) -> float:
    """Piecewise linear through (head_dim, 0) and the probed widths, made monotone."""
    points = [(head_dim, 0.0)]
    for probed in sorted(cost, reverse=True):
        points.append((probed, max(cost[probed], points[-1][1])))
    for (wide, low), (narrow, high) in pairwise(points):
        if width >= narrow or narrow == points[-1][0]:
            return low + (high - low) * (wide - width) / (wide - narrow)
    raise AssertionError("at least one width must have been probed")


def one_width(ratio: float, grid: Grid) -> list[int]:
    """The same width for every layer, the nearest that the grid has to the asked ratio."""
    grid.check(ratio)
    nearest = min(grid.widths, key=lambda w: (abs(1 - w / grid.head_dim - ratio), -w))
    return [nearest] * grid.layers
