"""What kvprune.json says of a prune; docs/runtime.md has the list of its fields."""

from typing import Any

import torch
from transformers import PreTrainedModel

from kvprune.channels.choice.basis import slow_channels
from kvprune.channels.evidence.importance import IMPORTANCE
from kvprune.channels.plan import PruningPlan
from kvprune.channels.repair.refit import Refitted
from kvprune.channels.settings import Settings
from kvprune.measure import memory
from kvprune.models.attention import AttentionShape
from kvprune.models.family import mlp_width
from kvprune.models.view import ModelView
from kvprune.runtime.dtype import name_of, stored_dtype
from kvprune.versions import versions


def record_of(
    s: Settings,
    view: ModelView,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    perplexities: list[dict[str, Any]],
    refitted: list[Refitted],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """All but what memory it took."""
    shape, dtype = view.shape, stored_dtype(view.lm)
    full, heads = ([getattr(shape.of(i), name) for i in shape.stores] for name in ("head_dim", "kv_heads"))
    widths = [plan.widths[i] for i in shape.stores]
    return {
        "source": s.source,
        "revision": s.revision,
        "ratio": plan.ratio,
        "ratio_achieved": plan.ratio_achieved,
        "kv_bytes_per_token": {
            "dense": memory.kv_bytes_per_token(full, heads, dtype),
            "pruned": memory.kv_bytes_per_token(widths, [n // plan.merge for n in heads], dtype),
        },
        "parameters": {"dense": memory.parameters(view.lm), "pruned": memory.parameters(pruned)},
        "weights_read_bytes": {
            "dense": memory.weights_read_bytes(view.lm, dtype),
            "pruned": memory.weights_read_bytes(pruned, dtype),
        },
        "merge": plan.merge,
        "kv_heads": {"dense": max(heads), "pruned": max(heads) // plan.merge},
        "widths": plan.widths,
        "attention_layers": None if shape.attention_layers is None else list(shape.attention_layers),
        "dropped_blocks": plan.dropped_blocks,
        "head_dim": max(full),
        **({"per_layer": [list(own) for own in shape.per_layer]} if shape.per_layer else {}),
        **({"sources": list(shape.sources)} if shape.sources else {}),
        "layout": plan.layout,
        "method": plan.method,
        "calibration": plan.calibration,
        "sensitivity": plan.sensitivity,
        "refit": [vars(matrix) for matrix in refitted],
        "perplexity": perplexities,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "dtype": name_of(dtype),
        "compute_dtype": name_of(view.lm.dtype),
        "device": str(view.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seed": s.seed,
    }


def memory_of(
    s: Settings,
    view: ModelView,
    plan: PruningPlan,
    peak: memory.PeakMemory,
    batches: list[torch.Tensor],
    repaired: list[torch.Tensor],
) -> dict[str, Any]:
    """The measured peak beside what the method may need: see docs/channels.md for the formula."""
    shape, size = view.shape, view.lm.dtype.itemsize
    tokens = max((b.numel() for b in batches), default=0)
    formula = {
        "2.5 x weights": int(2.5 * memory.weight_bytes(view.lm)),
        "hidden states of one batch, all layers": tokens * shape.hidden * len(view.blocks) * size,
        "logits of one batch": tokens * view.lm.config.vocab_size * size,
    }
    if s.probes == "estimated" and batches:
        h, layers = shape.hidden, len(view.blocks)
        activations = (16 * h + 6 * mlp_width(view.lm.config)) * layers * size
        formula["a window's activations"] = min(s.calibration_window, tokens) * activations
        formula["inputs and gradients of all attentions on a batch"] = 2 * tokens * h * layers * size
    if batches:
        formula |= _of_attention(view, plan, sum(b.numel() for b in batches))
    if repaired:
        tokens = sum(batch.numel() for batch in repaired)
        formula["hidden states of the repair text, three times"] = 3 * tokens * shape.hidden * size
        formula["what reaches the MLP's last matrix of it"] = tokens * mlp_width(view.lm.config) * size
    return {"peak_memory_bytes": peak.bytes(), "memory_formula_bytes": formula}


def _of_attention(view: ModelView, plan: PruningPlan, tokens: int) -> dict[str, int]:
    """What statistics of the attention, and the bases made of them, take; nothing where the plan has neither."""
    shape, importance = view.shape.largest, IMPORTANCE.get(str(plan.method.get("importance")))
    attends = importance is not None and importance.needs == "attention"
    if not (attends or plan.is_rotated):
        return {}
    mixes = attends and plan.is_rotated
    moments = [moments_bytes(a.shape, plan.merge, len(slow_channels(a)) if mixes else 0) for a in view.attention]
    found = {"moments of one layer's attention": max(moments)}
    if plan.is_rotated and view.device.type == "cpu":  # where they are kept
        own = sum(basis_bytes(a.shape, plan.merge) for a in view.attention)
        found["bases of all layers, with moments"] = sum(moments) + own
    if 1 < plan.merge < shape.kv_heads:  # all of it is seen before the heads are grouped
        channels = shape.kv_heads * (shape.groups + 2) * shape.head_dim
        found["one layer's Q, K and V of the calibration text"] = tokens * channels * view.lm.dtype.itemsize
    return found


def moments_bytes(shape: AttentionShape, merge: int, slow: int) -> int:
    """Bytes of one layer's AttentionMoments; slow: how many channels of a head are mixed over pairs."""
    pairs = shape.head_dim // 2
    queries, keys = pairs + slow**2, 2 * pairs * merge**2 + (merge * slow) ** 2 + slow  # a complex number is two
    outputs = (merge * shape.head_dim) ** 2
    return 8 * shape.kv_heads * (1 + queries + keys + outputs)


def basis_bytes(shape: AttentionShape, merge: int) -> int:
    """Bytes of one layer's Basis beside its moments: two square matrices for each group, and a number a row."""
    size = merge * shape.head_dim
    return 8 * (shape.kv_heads // merge) * (2 * size**2 + size)
