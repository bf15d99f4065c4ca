"""`fit`: what a memory holds, and which ratio makes context and batch fit. Arithmetic only: no weights are read.

total(ratio) = weights - ratio * attention projections + (1 - ratio) * KV bytes + what is kept in reserve, since Q, K, V
and O all shrink with the width [ours].
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvprune.errors import BadOption
from kvprune.measure.context import held_tokens, longest
from kvprune.measure.memory import kv_bytes_per_token
from kvprune.measure.shapes import dense_config
from kvprune.models.family import dense_head_dim, family_of
from kvprune.models.source import find_dtype

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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
    room = _bytes(memory)
    usable = int(room * (1 - reserve))
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
    largest = max(1 - math.ceil(min_width / align) * align / head_dim, 0.0)
    kv = batch * held_tokens(config, context) * per_layer
    ratio = _round_up((weights + kv - usable) / (shrinking + kv), head_dim * layers, align, layers, layout)
    enough = ratio <= largest + 1e-9

    def parts(removed: float) -> dict[str, Any]:
        lighter, held = weights - removed * shrinking, (1 - removed) * kv
        total = math.ceil(lighter + held)
        return {"weights": round(lighter), "kv_cache": round(held), "total": total, "fits": total <= usable}

    def left(removed: float) -> float:
        """Bytes of the dense cache for which there is room once so much of it is removed."""
        return max(usable - (weights - removed * shrinking), 0) / (1 - removed)

    def both(of: Any) -> dict[str, int]:
        return {"dense": of(left(0.0)), "pruned": of(left(ratio if enough else largest))}

    return {
        "source": str(source),
        "dtype": str(kind).removeprefix("torch."),
        "memory_bytes": room,
        "reserve_bytes": room - usable,
        "context": context,
        "batch": batch,
        "kv_bytes_per_token": layers * per_layer,
        "ratio": ratio if enough else None,
        "largest_ratio": largest,
        "dense": parts(0.0),
        "pruned": parts(ratio) if enough else None,
        "largest_batch": both(lambda n: int(n / (held_tokens(config, context) * per_layer))),
        "largest_context": both(
            lambda n: longest(config, lambda tokens: batch * held_tokens(config, tokens) * per_layer <= n)
        ),
    }


def _check(context: int, batch: int, reserve: float, align: int, min_width: int) -> None:
    least = {"context": context, "batch": batch, "align": align, "min-width": min_width}
    for name, value in least.items():
        if value < 1:
            raise BadOption(f"--{name} must be at least 1, not {value}")
    if not 0 <= reserve < 1:
        raise BadOption(f"--reserve {reserve:g} must lie from 0 to below 1")


def _round_up(needed: float, channels: int, align: int, layers: int, layout: str) -> float:
    """The ratio that widths on the grid reach: as needed, or a little more. channels: of a KV head, all layers."""
    if needed <= 0:
        return 0.0
    step = align if layout == "per-layer" else align * layers  # otherwise all layers have one width
    return 1 - math.floor((1 - needed) * channels / step + 1e-9) * step / channels


def _bytes(given: str | int) -> int:
    """ "24GiB" -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(given))
    if found is None or found[2].upper() not in UNITS:
        raise BadOption(f"--memory {given!r} is no amount of memory; give one as 24GiB or 80GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


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
