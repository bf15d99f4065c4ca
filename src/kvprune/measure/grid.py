"""Which cuts of a model there are: how many KV heads become one, and what of their channels may be kept."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

from kvprune.channels.choice.merging import AUTO, divisors, for_ranks, is_within, merge_of
from kvprune.channels.widths.asked import ratio_left
from kvprune.measure.weights import DENSE, Cut
from kvprune.models.attention import AttentionShape


@dataclass(frozen=True)
class Grid:
    """What the KV heads may be cut to: multiples of `align`, from `least` on."""

    shape: AttentionShape
    layout: str
    merge: int | str
    least: int
    align: int
    dropped: int  # whole blocks
    ranks: int

    @property
    def is_free(self) -> bool:
        """Whether each layer may have a width of its own."""
        return self.layout == "per-layer"

    def widest(self, merge: int) -> int:
        """Channels of a head that stands for so many."""
        return self.shape.head_dims[-1] * (1 if self.layout == "stock" else merge)

    def cut(self, merge: int, kept: int) -> Cut:
        """With so many steps kept: of `align` channels of one layer, or of all."""
        layers = self.shape.layers
        channels = kept * self.align * (1 if self.is_free else layers)
        return Cut(1 - channels / (merge * self.narrowest * layers), merge, channels / (layers - self.dropped))

    @property
    def narrowest(self) -> int:
        """Channels of the narrowest dense heads; wider ones are cut in proportion."""
        return self.shape.head_dims[0]

    @cached_property
    def steps(self) -> list[tuple[int, range]]:
        """For each number of KV heads that may become one, what of them may be kept, so that ratios ascend."""
        shape = self.shape
        if self.merge == AUTO:
            return [(merge, self._steps(merge)) for merge in divisors(shape.shared_heads)]
        merge = merge_of(self.merge, shape.shared_heads, shape.head_dims[-1], 1.0)  # refuses what does not divide
        return [(self._for_ranks(merge), self._steps(merge))]

    def _for_ranks(self, merge: int) -> int:
        may_change = self.merge == AUTO and self.layout != "stock"
        return for_ranks(merge, may_change, self.shape.shared_heads, self.ranks, lambda message: None)

    def _steps(self, merge: int) -> range:
        shape, unit = self.shape, self.shape.layers - self.dropped if self.is_free else 1
        if self.layout == "stock":
            left = shape.kv_heads // merge
            can_be = merge > 1 and (left % self.ranks == 0 or self.ranks % left == 0)
            return range(shape.head_dim, shape.head_dim + can_be)
        most = merge * self.narrowest * unit - (not self.dropped)  # something must go
        every = range(most // self.align, self.least // self.align * unit - 1, -1)

        def merged(kept: int) -> int:
            ratio = ratio_left(self.cut(merge, kept).ratio, shape.layers, self.dropped)
            if self.merge == AUTO and ratio < 1e-9:  # as prune does where the others keep all
                return 1
            if self.merge == AUTO:
                return self._for_ranks(merge_of(AUTO, shape.shared_heads, shape.head_dims[-1], ratio))
            return merge if is_within(merge, shape.head_dims[-1], ratio) else 0

        return every[bisect_left(every, merge, key=merged) : bisect_right(every, merge, key=merged)]

    @property
    def largest(self) -> Cut:
        """At the largest ratio."""
        return max((self.cut(merge, kept[-1]) for merge, kept in self.steps if kept), default=DENSE)
