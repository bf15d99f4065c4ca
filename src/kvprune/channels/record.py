"""What kvprune.json says of a prune; docs/runtime.md has the list of its fields."""

from typing import Any

import torch
from transformers import PreTrainedModel

from kvprune.channels.plan import PruningPlan
from kvprune.channels.repair.refit import Refitted
from kvprune.channels.settings import Settings
from kvprune.measure import memory
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
    full = [shape.head_dim] * shape.layers
    return {
        "source": s.source,
        "revision": s.revision,
        "ratio": plan.ratio,
        "ratio_achieved": plan.ratio_achieved,
        "kv_bytes_per_token": {
            "dense": memory.kv_bytes_per_token(full, shape.kv_heads, dtype),
            "pruned": memory.kv_bytes_per_token(plan.widths, shape.kv_heads, dtype),
        },
        "parameters": {"dense": memory.parameters(view.lm), "pruned": memory.parameters(pruned)},
        "widths": plan.widths,
        "head_dim": shape.head_dim,
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
    s: Settings, view: ModelView, peak: memory.PeakMemory, batches: list[torch.Tensor], repaired: list[torch.Tensor]
) -> dict[str, Any]:
    """The measured peak beside what the method may need: see docs/channels.md for the formula."""
    tokens = max((b.numel() for b in batches), default=0)
    size = view.lm.dtype.itemsize
    formula = {
        "2.5 x weights": int(2.5 * memory.weight_bytes(view.lm)),
        "hidden states of one batch, all layers": tokens * view.shape.hidden * view.shape.layers * size,
        "logits of one batch": tokens * view.lm.config.vocab_size * size,
    }
    if s.probes == "estimated" and batches:
        h, layers = view.shape.hidden, view.shape.layers
        activations = (16 * h + 6 * view.lm.config.intermediate_size) * layers * size
        formula["a window's activations"] = min(s.calibration_window, tokens) * activations
        formula["inputs and gradients of all attentions on a batch"] = 2 * tokens * h * layers * size
    if repaired:
        tokens = sum(batch.numel() for batch in repaired)
        formula["hidden states of the repair text, three times"] = 3 * tokens * view.shape.hidden * size
        formula["what reaches the MLP's last matrix of it"] = tokens * view.lm.config.intermediate_size * size
    return {"peak_memory_bytes": peak.bytes(), "memory_formula_bytes": formula}
