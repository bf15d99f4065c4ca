"""`fit`: what a memory holds, and which ratio makes context and batch fit. Arithmetic only: no weights are read.

total = weights of the pruned model + (1 - ratio) * KV bytes + what is kept in reserve. K and V shrink with the ratio,
and so do Q and O; but where KV heads are merged, these grow instead, or get small matrices beside them [ours]. Of
several ranks each holds its share of both, and a KV head whole: where there are more ranks, each head several times.
"""

import math
import operator
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvprune.channels.choice.merging import AUTO, asked_merge, check_alike
from kvprune.channels.cut.portable import LAYOUTS
from kvprune.channels.widths.asked import check_drop_blocks
from kvprune.engines.targets import degrees
from kvprune.errors import BadOption
from kvprune.measure.context import held_each, longest, slides
from kvprune.measure.grid import Grid
from kvprune.measure.memory import kv_bytes_per_token
from kvprune.measure.shapes import dense_config
from kvprune.measure.weights import DENSE, Cut, Weights, copies
from kvprune.models.attention import AttentionShape
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
    weights = Weights.of(config, layout in LAYOUTS, drop_blocks, tensor_parallel)
    shape = weights.shape
    _check_ranks(config, shape, tensor_parallel)
    check_alike(shape, layout, drop_blocks)
    least = math.ceil(min_width / align) * align
    grid = Grid(shape, layout, asked_merge(merge), least, align, drop_blocks, tensor_parallel)
    if layout == "stock":  # whole heads, of the width that they have
        grid = replace(grid, least=shape.head_dim, align=1)
    sizes = _Sizes(weights, kind.itemsize, int(room * (1 - reserve)), grid)
    stores = [shape.of(layer) for layer in shape.stores]
    per_layer = [kv_bytes_per_token([own.head_dim], own.kv_heads, kind) for own in stores]

    def held(tokens: int) -> int:
        """Bytes of the cache of one sequence."""
        return sum(map(operator.mul, held_each(config, tokens), per_layer))

    kv = batch * held(context)
    cut = DENSE if sizes.parts(kv, DENSE)["fits"] else sizes.needed(lambda merge: kv)
    with_bits = [] if slides(config) else [_quantized(sizes, kind, bits, kv, context) for bits in BACKENDS]
    reached = grid.largest if cut is None else cut

    def both(of: Callable[[Cut], int]) -> dict[str, int]:
        return {"dense": of(DENSE), "pruned": of(reached)}

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
        "dense": sizes.parts(kv, DENSE),
        "pruned": None if cut is None else sizes.parts(kv, cut),
        "weights_read_bytes": both(lambda c: round(weights.read(c) * kind.itemsize)),
        "largest_batch": both(lambda c: int(sizes.left(c) / held(context))),
        "largest_context": both(lambda c: longest_in(sizes.left(c))),
        "keep": 1.0 if slides(config) else _share_kept(sizes, kv),
        "quantized": with_bits,
        "recommended": _recommended(None if cut is None else cut.ratio, with_bits),
    }


@dataclass(frozen=True)
class _Sizes:
    """Bytes, of a rank; usable: of the memory that may be used."""

    weights: Weights
    itemsize: int
    usable: int
    grid: Grid

    def held(self, kv: float, cut: Cut) -> float:
        """Of a cache of `kv` bytes with nothing removed, on one rank; layers count by their channels."""
        shape, ranks = self.grid.shape, self.grid.ranks
        stores = [shape.of(layer) for layer in shape.stores]
        copied = sum(own.kv_heads * own.head_dim * copies(own.kv_heads // cut.merge, ranks) for own in stores)
        return (1 - cut.ratio) * kv * copied / shape.channels / ranks

    def parts(self, kv: float, cut: Cut) -> dict[str, Any]:
        """What is held; kv: bytes of the cache with nothing removed."""
        weights, held = self.weights.kept(cut) * self.itemsize, self.held(kv, cut)
        total = math.ceil(round(weights + held, 3))  # a ratio is a rounded number
        return {"weights": round(weights), "kv_cache": round(held), "total": total, "fits": total <= self.usable}

    def needed(self, kv: Callable[[int], float]) -> Cut | None:
        """The least that must be removed so that it fits, None where nothing is enough; kv: bytes of the cache with
        nothing removed, by how many heads become one."""
        for merge, kept in self.grid.steps:
            first = bisect_left(kept, True, key=partial(self._fits, merge, kv(merge)))
            if first < len(kept):
                return self.grid.cut(merge, kept[first])
        return None

    def _fits(self, merge: int, kv: float, kept: int) -> bool:
        return self.parts(kv, self.grid.cut(merge, kept))["fits"]

    def left(self, cut: Cut) -> float:
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

    found = sizes.parts(max(map(held, grid.shape.head_dims)), DENSE)
    del found["weights"]
    cut = DENSE if found["fits"] else sizes.needed(worst)
    ratio, merge = (None, 1) if cut is None else (cut.ratio, cut.merge)
    return {"kv_bits": bits, **found, "ratio": ratio, "merge": merge}


def _share_kept(sizes: _Sizes, kv: float) -> float:
    """kv: bytes of the dense cache with all tokens."""
    left = sizes.left(DENSE)
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
