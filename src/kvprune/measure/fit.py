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
from kvprune.measure.shapes import SHAPES, dense_config
from kvprune.models.family import dense_head_dim, family_of
from kvprune.models.source import DTYPES, load_config, resolve

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
    min_width: int = 16,
    align: int = 8,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Which fraction of the KV bytes must go so that `batch` sequences of `context` tokens fit in `memory`.

    source: a dense model, or a name in shapes.SHAPES. memory: bytes, or "24GiB", "80GB". reserve: share of it that is
    left to activations and fragments. align, min_width: of the widths, as in `prune`. Returns {"source", "dtype",
    "memory_bytes", "reserve_bytes", "context", "batch", "kv_bytes_per_token" (dense), "dense" and "pruned" ({"weights",
    "kv_cache", "total", "fits"}; pruned is None where no ratio is enough), "ratio" (0 where dense fits, None where none
    is enough), "largest_ratio", and "largest_batch", "largest_context" ({"dense", "pruned"}: with the other as asked;
    pruned at the ratio, or the largest)}. Raises a KVPruneError.
    """
    if context < 1 or batch < 1:
        raise BadOption("--context and --batch must be at least 1")
    if not 0 <= reserve < 1:
        raise BadOption(f"--reserve {reserve:g} must lie from 0 to below 1")
    room = _bytes(memory)
    config, own = _config(source, revision, trust_remote_code)
    if context > config.max_position_embeddings:
        raise BadOption(f"--context {context} is more than the {config.max_position_embeddings} that the model takes")
    kind = own if dtype == "auto" else _dtype(dtype)
    weights, shrinking = (count * kind.itemsize for count in _parameters(config))
    head_dim = dense_head_dim(config)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * kind.itemsize
    kv, usable = per_token * context * batch, int(room * (1 - reserve))
    first = math.ceil(min_width / align) * align
    largest = max(1 - first / head_dim, 0.0)
    channels = config.num_hidden_layers * head_dim  # of a KV head, all layers
    needed = max((weights + kv - usable) / (shrinking + kv), 0.0)
    left = math.floor((1 - needed) * channels / align + 1e-9) * align
    ratio = 1 - left / channels if needed else 0.0
    enough = ratio <= largest
    at = ratio if enough else largest

    def parts(removed: float) -> dict[str, Any]:
        lighter, held = weights - removed * shrinking, (1 - removed) * kv
        total = math.ceil(lighter + held)
        return {"weights": round(lighter), "kv_cache": round(held), "total": total, "fits": total <= usable}

    def most(removed: float, beside: int) -> int:
        """How many times `beside` tokens fit."""
        left = usable - (weights - removed * shrinking)
        return max(int(left / ((1 - removed) * per_token * beside)), 0)

    return {
        "source": str(source),
        "dtype": str(kind).removeprefix("torch."),
        "memory_bytes": room,
        "reserve_bytes": room - usable,
        "context": context,
        "batch": batch,
        "kv_bytes_per_token": per_token,
        "ratio": ratio if enough else None,
        "largest_ratio": largest,
        "dense": parts(0.0),
        "pruned": parts(ratio) if enough else None,
        "largest_batch": {"dense": most(0.0, context), "pruned": most(at, context)},
        "largest_context": {"dense": most(0.0, batch), "pruned": most(at, batch)},
    }


def _bytes(given: str | int) -> int:
    """ "24GiB" -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(given))
    if found is None or found[2].upper() not in UNITS:
        raise BadOption(f"--memory {given!r} is no amount of memory; give one as 24GiB or 80GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _config(source: str | Path, revision: str | None, trust_remote_code: bool) -> tuple[PreTrainedConfig, torch.dtype]:
    """The config, and the dtype that `load` would give the model."""
    if str(source) in SHAPES:
        return dense_config(str(source)), torch.bfloat16
    found = resolve(source, revision, trust_remote_code)
    if found.is_pruned:
        raise BadOption(f"{found.name} is pruned already; give the dense model it came from")
    config = load_config(found)
    own = getattr(config, "dtype", None)
    return config, own if isinstance(own, torch.dtype) and not found.gguf_file else torch.bfloat16


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise BadOption(f"unknown dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """How many numbers the model has, and how many of them are Q, K, V and O, counted on a model without memory."""
    family = family_of(config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks: Any = model.base_model.get_submodule(family.layers)
    shrinking = 0
    for block in blocks:
        attention = getattr(block, family.attention)
        projections = [getattr(attention, name) for name in (family.q, family.k, family.v, family.o)]
        shrinking += sum(p.weight.numel() for p in projections)
        shrinking += sum(p.bias.numel() for p in projections[:3] if p.bias is not None)  # O's is as wide as hidden
    return sum(p.numel() for p in model.parameters()), shrinking
