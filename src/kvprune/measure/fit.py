"""`fit`: what a memory holds, and which ratio makes context and batch fit. Arithmetic only: no weights are read.

total = weights of the pruned model + (1 - ratio) * KV bytes + what is kept in reserve. K and V shrink with the ratio,
and so do Q and O; but where KV heads are merged, these grow instead, or get small matrices beside them [ours]. Of
several ranks each holds its share of both, and a KV head whole: where there are more ranks, each head several times.
"""

import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvprune.channels.choice.merging import (
    AUTO,
    asked_merge,
    check_alike,
    divisors,
    for_ranks,
    is_factored,
    is_within,
    merge_of,
)
from kvprune.channels.cut.portable import LAYOUTS
from kvprune.channels.widths.asked import check_drop_blocks, ratio_left
from kvprune.engines.targets import degrees
from kvprune.errors import BadOption
from kvprune.measure.context import held_each, longest, slides
from kvprune.measure.memory import kv_bytes_per_token, parameters, unread_embeddings
from kvprune.measure.shapes import dense_config
from kvprune.models.attention import AttentionShape
from kvprune.models.view import ModelView
from kvprune.options import size_in_bytes
from kvprune.runtime.dtype import find_dtype, name_of
from kvprune.runtime.quantized import BACKENDS, bytes_per_number, recent_tokens

KEEP_STEP = 1 / 20
# Of the width, recovered, beside 4 bits: more loses more than 2 bits alone. Where heads stay apart, and merged ones.
TWO_BITS, TWO_BITS_MERGED = 0.35, 0.55


def fit(
    source: str | Path,
    *,
    memory: str | int,
    context: int,
    batch: int = 1,
    dtype: str = "auto",
    reserve: float = 0.1,
    layout: str = "per-layer",
    merge: int | str = AUTO,
    tensor_parallel: int = 1,
    min_width: int = 16,
    align: int = 8,
    drop_blocks: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Which fraction of the KV bytes must go so that `batch` sequences of `context` tokens fit in `memory`.

    source: a dense model, or a name in shapes.SHAPES. memory: bytes, or "24GiB", "80GB". reserve: share of it that is
    left to activations, fragments, and room that a cache keeps free (GrowingCache: up to an eighth of its tokens).
    layout, merge, align, min_width: of heads and widths, as in `prune`; drop_blocks: whole blocks that go too, counted
    as the smallest ones. tensor_parallel: ranks that share the model, each with such a memory, and all sequences; what
    is held is then what each rank holds. Returns {"source", "dtype", "memory_bytes", "reserve_bytes", "context",
    "batch", "drop_blocks", "tensor_parallel", "kv_bytes_per_token" (dense, of all ranks' different heads together),
    "kv_bytes_per_token_of_a_rank" ({"dense", "pruned"}), "dense" and "pruned" ({"weights", "kv_cache", "total",
    "fits"}; pruned is None where no ratio is enough), "ratio" (0 where dense fits, None where none is enough), "keep"
    (the largest share of the tokens, in steps of KEEP_STEP, that a TokenFilter can keep of the dense model's so that it
    fits; 0 where none does, and 1 for a model with sliding windows, which are not filtered),
    "largest_ratio", "merge" (how many KV heads become one), "weights_read_bytes" (by a step of decoding), and
    "largest_batch", "largest_context" (the last three {"dense", "pruned"}; the last two with the other as asked, no
    longer than the model takes); merge and pruned at the ratio, or the largest}. Raises a KVPruneError.
    """
    _check(context, batch, reserve, align, min_width)
    check_drop_blocks(drop_blocks, layout)
    room = size_in_bytes(memory)
    asked = None if dtype == "auto" else find_dtype(dtype)
    config, own = dense_config(source, revision, trust_remote_code)
    kind = asked or own
    if kind is None:
        raise BadOption(f"{source} does not say which dtype its weights have; give --dtype")
    if context > config.max_position_embeddings:
        raise BadOption(f"--context {context} is more than the {config.max_position_embeddings} that the model takes")
    weights = _Weights.of(config, layout in LAYOUTS, drop_blocks, tensor_parallel)
    shape = weights.shape
    _check_ranks(config, shape, tensor_parallel)
    check_alike(shape, layout, drop_blocks)
    least = math.ceil(min_width / align) * align
    grid = _Grid(shape, layout, asked_merge(merge), least, align, drop_blocks, tensor_parallel)
    if layout == "stock":  # whole heads, of the width that they have
        grid = replace(grid, least=shape.head_dim, align=1)
    sizes = _Sizes(weights, kind.itemsize, int(room * (1 - reserve)), grid)
    stores = [shape.of(layer) for layer in shape.stores]
    per_layer = [kv_bytes_per_token([own.head_dim], own.kv_heads, kind) for own in stores]

    def held(tokens: int) -> int:
        """Bytes of the cache of one sequence."""
        return sum(map(operator.mul, held_each(config, tokens), per_layer))

    kv = batch * held(context)
    cut = _DENSE if sizes.parts(kv, _DENSE)["fits"] else sizes.needed(lambda merge: kv)
    with_bits = [] if slides(config) else [_quantized(sizes, kind, bits, kv, context) for bits in BACKENDS]
    reached = grid.largest if cut is None else cut

    def both(of: Callable[[_Cut], int]) -> dict[str, int]:
        return {"dense": of(_DENSE), "pruned": of(reached)}

    def longest_in(left: float) -> int:
        return longest(config, lambda tokens: batch * held(tokens) <= left)

    return {
        "source": str(source),
        "dtype": name_of(kind),
        "memory_bytes": room,
        "reserve_bytes": room - sizes.usable,
        "context": context,
        "batch": batch,
        "drop_blocks": drop_blocks,
        "tensor_parallel": tensor_parallel,
        "kv_bytes_per_token": sum(per_layer),
        "kv_bytes_per_token_of_a_rank": both(lambda c: round(sizes.held(sum(per_layer), c))),
        "ratio": None if cut is None else cut.ratio,
        "largest_ratio": grid.largest.ratio,
        "merge": reached.merge,
        "dense": sizes.parts(kv, _DENSE),
        "pruned": None if cut is None else sizes.parts(kv, cut),
        "weights_read_bytes": both(lambda c: round(weights.read(c) * kind.itemsize)),
        "largest_batch": both(lambda c: int(sizes.left(c) / held(context))),
        "largest_context": both(lambda c: longest_in(sizes.left(c))),
        "keep": 1.0 if slides(config) else _share_kept(sizes, kv),
        "quantized": with_bits,
        "recommended": _recommended(None if cut is None else cut.ratio, with_bits),
    }


class _Cut(NamedTuple):
    """The fraction of the KV bytes that goes, how many KV heads become one, and the mean width of such a head in the
    layers that have some; of the narrowest dense heads, where layers differ, and of others in proportion."""

    ratio: float
    merge: int
    width: float


_DENSE = _Cut(0.0, 1, math.nan)  # of the width that it has


@dataclass(frozen=True)
class _Weights:
    """How many numbers a model has: all of the dense one's, those of an input embedding of which a step reads but a
    row, and what its attention is made of; biases: which of Q, K, V and O have one. with_values: the layers with a
    projection that is V's alone. dropped: how many blocks go, and with them these many numbers. ranks: that share
    it."""

    all: int
    unread: int
    shape: AttentionShape
    biases: frozenset[str]
    is_portable: bool
    is_normed: bool
    has_normed_values: bool
    is_gated: bool
    with_values: frozenset[int]
    dropped: tuple[int, int]
    ranks: int

    @classmethod
    def of(cls, config: PreTrainedConfig, is_portable: bool, drop_blocks: int = 0, ranks: int = 1) -> "_Weights":
        """Counted on a model without memory."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        view = ModelView(lm)
        biases = frozenset(name for name in "qkvo" if view.attention[0].has_bias(name))
        unread = sum(table.numel() for table in unread_embeddings(view.lm))
        ratio_left(1.0, view.shape.layers, drop_blocks)  # refuses too many
        smallest = sorted(parameters(view.blocks[number]) for number in view.attention_layers)[:drop_blocks]
        dropped = drop_blocks, sum(smallest) - drop_blocks * view.shape.hidden  # a constant stays
        first = view.attention[0]
        norms = first.is_normed, first.has_normed_values, first.is_gated
        values = frozenset(
            i
            for i, a in enumerate(view.attention)
            if a.source is None and (view.family.qkv or a.projection("v") is not a.projection("k"))
        )
        return cls(parameters(view.lm), unread, view.shape, biases, is_portable, *norms, values, dropped, ranks)

    def kept(self, cut: _Cut) -> float:
        """Numbers of the pruned model that a rank holds, all its attention at the mean width: widths around it never
        make more. What does not belong to a KV head is shared evenly."""
        blocks, numbers = (0, 0) if cut is _DENSE else self.dropped
        gained = [self._gained(layer, cut) for layer in range(self.shape.layers)]
        return (self.all - numbers + math.fsum(gained[blocks:])) / self.ranks  # all alike, where some are dropped

    def read(self, cut: _Cut) -> float:
        """Numbers that a rank reads in a step of decoding."""
        return self.kept(cut) - self.unread / self.ranks

    def _gained(self, layer: int, cut: _Cut) -> float:
        """By how many numbers one layer grows, on all ranks together."""
        shape = self.shape.of(layer)
        times = copies(shape.kv_heads // cut.merge, self.ranks)
        dense = self._dense(layer, shape, 1)
        if cut is _DENSE:
            return self._dense(layer, shape, times) - dense
        width = cut.width * shape.head_dim / self.shape.head_dims[0]
        has_keys = self.shape.source(layer) == layer
        factored = not self.is_portable and is_factored(shape, width)
        has = {"k": has_keys, "v": has_keys}
        pruned = self._attention(shape, shape.kv_heads // cut.merge, width, factored, has, times)
        if "v" in self.biases and "o" not in self.biases and not self.has_normed_values:
            pruned += shape.hidden  # what V's bias loses is a constant behind O
        return pruned - dense

    def _dense(self, layer: int, shape: AttentionShape, times: int) -> float:
        has = {"k": self.shape.source(layer) == layer, "v": layer in self.with_values}
        return self._attention(shape, shape.kv_heads, shape.head_dim, None, has, times)

    def _attention(
        self,
        shape: AttentionShape,
        kv_heads: int,
        width: float,
        factored: bool | None,
        has: dict[str, bool],
        times: int,
    ) -> float:
        """Numbers of one layer's Q, K, V and O, without O's bias, norms and gate, which no cut changes; factored None:
        as it was; has: whether there is a K, a V; times: how often each KV head is held. Behind a norm Q, K and V are
        as wide as they were, with matrices of their own; so is O behind a gate."""
        columns = {name: shape.hidden + (name in self.biases) for name in "qkv"}
        query_heads, channels = shape.kv_heads * shape.groups, shape.kv_heads * shape.head_dim
        behind_norms = self.is_normed and factored is not None
        behind_gate = self.is_gated and factored is not None
        normed_values = self.has_normed_values and factored is not None
        q = query_heads * (shape.head_dim if factored or behind_norms else width) * columns["q"]
        k = (channels if behind_norms else kv_heads * width) * columns["k"]
        o = query_heads * (shape.head_dim if factored or behind_gate else width) * shape.hidden
        v = (channels if normed_values else kv_heads * width) * columns["v"]
        mixes = (behind_norms or bool(factored)) + (behind_gate or bool(factored))  # of Q and of O
        mixes += has["k"] * behind_norms + has["v"] * normed_values
        return q + o + times * (has["k"] * k + has["v"] * v + mixes * channels * width)


def copies(kv_heads: int, ranks: int) -> int:
    """How many ranks hold the same KV head."""
    return max(ranks // kv_heads, 1)


@dataclass(frozen=True)
class _Grid:
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

    def cut(self, merge: int, kept: int) -> _Cut:
        """With so many steps kept: of `align` channels of one layer, or of all."""
        layers = self.shape.layers
        channels = kept * self.align * (1 if self.is_free else layers)
        return _Cut(1 - channels / (merge * self.narrowest * layers), merge, channels / (layers - self.dropped))

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
    def largest(self) -> _Cut:
        """At the largest ratio."""
        return max((self.cut(merge, kept[-1]) for merge, kept in self.steps if kept), default=_DENSE)


@dataclass(frozen=True)
class _Sizes:
    """Bytes, of a rank; usable: of the memory that may be used."""

    weights: _Weights
    itemsize: int
    usable: int
    grid: _Grid

    def held(self, kv: float, cut: _Cut) -> float:
        """Of a cache of `kv` bytes with nothing removed, on one rank; layers count by their channels."""
        shape, ranks = self.grid.shape, self.grid.ranks
        stores = [shape.of(layer) for layer in shape.stores]
        copied = sum(own.kv_heads * own.head_dim * copies(own.kv_heads // cut.merge, ranks) for own in stores)
        return (1 - cut.ratio) * kv * copied / shape.channels / ranks

    def parts(self, kv: float, cut: _Cut) -> dict[str, Any]:
        """What is held; kv: bytes of the cache with nothing removed."""
        weights, held = self.weights.kept(cut) * self.itemsize, self.held(kv, cut)
        total = math.ceil(round(weights + held, 3))  # a ratio is a rounded number
        return {"weights": round(weights), "kv_cache": round(held), "total": total, "fits": total <= self.usable}

    def needed(self, kv: Callable[[int], float]) -> _Cut | None:
        """The least that must be removed so that it fits, None where nothing is enough; kv: bytes of the cache with
        nothing removed, by how many heads become one."""
        for merge, kept in self.grid.steps:
            first = bisect_left(kept, True, key=partial(self._fits, merge, kv(merge)))
            if first < len(kept):
                return self.grid.cut(merge, kept[first])
        return None

    def _fits(self, merge: int, kv: float, kept: int) -> bool:
        return self.parts(kv, self.grid.cut(merge, kept))["fits"]

    def left(self, cut: _Cut) -> float:
        """Bytes of a cache, nothing removed, for which there is room once the cut is made."""
        return max(self.usable - self.weights.kept(cut) * self.itemsize, 0) / self.held(1.0, cut)


def _quantized(sizes: _Sizes, dtype: torch.dtype, bits: int, kv: float, context: int) -> dict[str, Any]:
    """The dense model with a cache of so many bits, and the ratio needed beside them: counted with the scales of the
    width that has most of them, since it is not known which layer gets which."""
    grid = sizes.grid
    recent = kv * min(recent_tokens(bits) / context, 1)  # as it is

    def held(width: int) -> float:
        return recent + (kv - recent) * bytes_per_number(bits, width, dtype) / dtype.itemsize

    def worst(merge: int) -> float:
        widths = range(grid.least, grid.widest(merge) + 1, grid.align)
        return max(map(held, widths), default=kv)

    found = sizes.parts(max(map(held, grid.shape.head_dims)), _DENSE)
    del found["weights"]
    cut = _DENSE if found["fits"] else sizes.needed(worst)
    ratio, merge = (None, 1) if cut is None else (cut.ratio, cut.merge)
    return {"kv_bits": bits, **found, "ratio": ratio, "merge": merge}


def _share_kept(sizes: _Sizes, kv: float) -> float:
    """kv: bytes of the dense cache with all tokens."""
    left = sizes.left(_DENSE)
    return min(math.floor(left / kv / KEEP_STEP + 1e-9) * KEEP_STEP, 1.0)


def _recommended(ratio: float | None, quantized: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What loses least of what fits: nothing, fewer bits down to 4, width beside 4 bits, 2 bits where that would take
    too much of the width, then width again [ours, docs/results-bits.md]."""
    options: list[dict[str, Any]] = [{"kv_bits": None, "ratio": ratio}]
    options += [{"kv_bits": q["kv_bits"], "ratio": q["ratio"]} for q in quantized if q["kv_bits"] >= 4]
    reachable = [option for option in options if option["ratio"] is not None]
    best = min(reachable, key=lambda option: option["ratio"], default=None)  # the first of equals has most bits
    two_fit = any(q["kv_bits"] == 2 and q["fits"] for q in quantized)
    is_merged = any(q["kv_bits"] == 4 and q["merge"] > 1 for q in quantized)
    most = TWO_BITS_MERGED if is_merged else TWO_BITS
    return {"kv_bits": 2, "ratio": 0.0} if two_fit and (best is None or best["ratio"] > most) else best


def _check_ranks(config: PreTrainedConfig, shape: AttentionShape, ranks: int) -> None:
    heads, kv_heads = shape.kv_heads * shape.groups, shape.shared_heads
    others = [getattr(config, "intermediate_size", None) or 0]
    possible = degrees(heads, kv_heads, kv_heads, others, most=max(ranks, 16))
    if ranks not in possible:
        raise BadOption(
            f"--tensor-parallel {ranks} cannot share {heads} query heads, {kv_heads} KV heads and the MLP evenly; "
            f"choose {', '.join(map(str, possible))}"
        )


def _check(context: int, batch: int, reserve: float, align: int, min_width: int) -> None:
    least = {"context": context, "batch": batch, "align": align, "min-width": min_width}
    for name, value in least.items():
        if value < 1:
            raise BadOption(f"--{name} must be at least 1, not {value}")
    if not 0 <= reserve < 1:
        raise BadOption(f"--reserve {reserve:g} must lie from 0 to below 1")
