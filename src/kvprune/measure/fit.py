"""`fit`: what a memory holds, and which ratio makes context and batch fit. Arithmetic only: no weights are read.

total(ratio) = weights - ratio * attention projections + (1 - ratio) * KV bytes + what is kept in reserve, since Q, K, V
and O all shrink with the width [ours].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvprune.errors import BadOption
from kvprune.measure.context import held_tokens, longest, slides
from kvprune.measure.memory import kv_bytes_per_token
from kvprune.measure.shapes import dense_config
from kvprune.models.family import dense_head_dim, family_of
from kvprune.options import size_in_bytes
from kvprune.runtime.dtype import find_dtype, name_of
from kvprune.runtime.quantized import BACKENDS, bytes_per_number, recent_tokens

TWO_BITS = 0.35  # of the width, recovered, beside 4 bits: more loses more than 2 bits alone


def fit(
    source: str | Path,
    *,
    memory: str | int,
    context: int,
    batch: int = 1,
    dtype: str = "auto",
    reserve: float = 0.1,
    layout: str = "per-layer",
    min_width: int = 16,
    align: int = 8,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Which fraction of the KV bytes must go so that `batch` sequences of `context` tokens fit in `memory`.

    source: a dense model, or a name in shapes.SHAPES. memory: bytes, or "24GiB", "80GB". reserve: share of it that is
    left to activations, fragments, and room that a cache keeps free (GrowingCache: up to an eighth of its tokens).
    layout, align, min_width: of the widths, as in `prune`. Returns {"source", "dtype", "memory_bytes",
    "reserve_bytes", "context", "batch", "kv_bytes_per_token" (dense), "dense" and "pruned" ({"weights", "kv_cache",
    "total", "fits"}; pruned is None where no ratio is enough), "ratio" (0 where dense fits, None where none is
    enough), "largest_ratio", and "largest_batch", "largest_context" ({"dense", "pruned"}: with the other as asked, no
    longer than the model takes; pruned at the ratio, or the largest)}. Raises a KVPruneError.
    """
    _check(context, batch, reserve, align, min_width)
    room = size_in_bytes(memory)
    asked = None if dtype == "auto" else find_dtype(dtype)
    config, own = dense_config(source, revision, trust_remote_code)
    kind = asked or own
    if kind is None:
        raise BadOption(f"{source} does not say which dtype its weights have; give --dtype")
    if context > config.max_position_embeddings:
        raise BadOption(f"--context {context} is more than the {config.max_position_embeddings} that the model takes")
    weights, shrinking = (count * kind.itemsize for count in _parameters(config))
    head_dim, layers = dense_head_dim(config), config.num_hidden_layers
    per_layer = kv_bytes_per_token([head_dim], config.num_key_value_heads, kind)
    grid = _Grid(layout, layers, head_dim, math.ceil(min_width / align) * align, align)
    sizes = _Sizes(weights, shrinking, int(room * (1 - reserve)), grid)
    kv = batch * held_tokens(config, context) * per_layer
    ratio = sizes.needed(kv)
    with_bits = [] if slides(config) else [_quantized(sizes, kind, bits, kv, context) for bits in BACKENDS]

    def both(of: Callable[[float], int]) -> dict[str, int]:
        return {"dense": of(sizes.left(0.0)), "pruned": of(sizes.left(grid.largest if ratio is None else ratio))}

    return {
        "source": str(source),
        "dtype": name_of(kind),
        "memory_bytes": room,
        "reserve_bytes": room - sizes.usable,
        "context": context,
        "batch": batch,
        "kv_bytes_per_token": layers * per_layer,
        "ratio": ratio,
        "largest_ratio": grid.largest,
        "dense": sizes.parts(kv, 0.0),
        "pruned": None if ratio is None else sizes.parts(kv, ratio),
        "largest_batch": both(lambda n: int(n / (held_tokens(config, context) * per_layer))),
        "largest_context": both(
            lambda n: longest(config, lambda tokens: batch * held_tokens(config, tokens) * per_layer <= n)
        ),
        "quantized": with_bits,
        "recommended": _recommended(ratio, with_bits),
    }


@dataclass(frozen=True)
class _Grid:
    """The widths that a KV head may be cut to: multiples of `align`, from `least` on."""

    layout: str
    layers: int
    head_dim: int
    least: int
    align: int

    @property
    def largest(self) -> float:
        """The largest ratio."""
        return max(1 - self.least / self.head_dim, 0.0)

    def round_up(self, needed: float) -> float:
        """The ratio that widths on the grid reach: as needed, or a little more."""
        if needed <= 0:
            return 0.0
        channels = self.head_dim * self.layers
        step = self.align if self.layout == "per-layer" else self.align * self.layers  # otherwise layers have one width
        return 1 - math.floor((1 - needed) * channels / step + 1e-9) * step / channels


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the dense weights, of those of them that shrink with the width, and of the memory that may be used."""

    weights: int
    shrinking: int
    usable: int
    grid: _Grid

    def parts(self, kv: float, removed: float) -> dict[str, Any]:
        """What is held with so much removed; kv: bytes of the cache with nothing removed."""
        lighter, held = self.weights - removed * self.shrinking, (1 - removed) * kv
        total = math.ceil(lighter + held)
        return {"weights": round(lighter), "kv_cache": round(held), "total": total, "fits": total <= self.usable}

    def needed(self, kv: float) -> float | None:
        """The ratio that makes a cache of `kv` bytes fit, 0 where all fits as it is, None where none is enough."""
        ratio = self.grid.round_up((self.weights + kv - self.usable) / (self.shrinking + kv))
        return ratio if ratio <= self.grid.largest + 1e-9 else None

    def left(self, removed: float) -> float:
        """Bytes of a cache, nothing removed, for which there is room once so much of it is."""
        return max(self.usable - (self.weights - removed * self.shrinking), 0) / (1 - removed)


def _quantized(sizes: _Sizes, dtype: torch.dtype, bits: int, kv: float, context: int) -> dict[str, Any]:
    """The dense model with a cache of so many bits, and the ratio needed beside them: counted with the scales of the
    width that has most of them, since it is not known which layer gets which."""
    grid = sizes.grid
    recent = kv * min(recent_tokens(bits) / context, 1)  # as it is

    def held(width: int) -> float:
        return recent + (kv - recent) * bytes_per_number(bits, width, dtype) / dtype.itemsize

    found = sizes.parts(held(grid.head_dim), 0.0)
    del found["weights"]
    worst = max(map(held, range(grid.least, grid.head_dim + 1, grid.align)), default=kv)
    return {"kv_bits": bits, **found, "ratio": 0.0 if found["fits"] else sizes.needed(worst)}


def _recommended(ratio: float | None, quantized: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What loses least of what fits: nothing, fewer bits down to 4, width beside 4 bits, 2 bits where that would take
    more than TWO_BITS of the width, then width again [ours, docs/results.md]."""
    options: list[dict[str, Any]] = [{"kv_bits": None, "ratio": ratio}]
    options += [{"kv_bits": q["kv_bits"], "ratio": q["ratio"]} for q in quantized if q["kv_bits"] >= 4]
    reachable = [option for option in options if option["ratio"] is not None]
    best = min(reachable, key=lambda option: option["ratio"], default=None)  # the first of equals has most bits
    two_fit = any(q["kv_bits"] == 2 and q["fits"] for q in quantized)
    return {"kv_bits": 2, "ratio": 0.0} if two_fit and (best is None or best["ratio"] > TWO_BITS) else best


def _check(context: int, batch: int, reserve: float, align: int, min_width: int) -> None:
    least = {"context": context, "batch": batch, "align": align, "min-width": min_width}
    for name, value in least.items():
        if value < 1:
            raise BadOption(f"--{name} must be at least 1, not {value}")
    if not 0 <= reserve < 1:
        raise BadOption(f"--reserve {reserve:g} must lie from 0 to below 1")


def _parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """How many numbers the model has, and how many of them are Q, K, V and O, counted on a model without memory."""
    family = family_of(config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shrinking = 0
    for block in family.blocks(model):
        attention = getattr(block, family.attention)
        projections = [getattr(attention, name) for name in (family.q, family.k, family.v, family.o)]
        shrinking += sum(p.weight.numel() for p in projections)
        shrinking += sum(p.bias.numel() for p in projections[:3] if p.bias is not None)  # O's is as wide as hidden
    return sum(p.numel() for p in model.parameters()), shrinking
