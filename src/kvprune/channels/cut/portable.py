"""The layouts that need no code of ours: one width, one set of coordinates for the model, and so a *stock* checkpoint.

It loads wherever the family does, without kvprune and without trust_remote_code.

- stock: KV heads are merged and keep the dense head_dim, with one coordinate for each RoPE pair, in the dense order.
  RoPE and softmax are the dense ones, so nothing has to be corrected: the config differs in num_key_value_heads alone.
- portable: any width. Stock code rebuilds the rotary frequencies from head_dim and scales the softmax by
  1 / sqrt(head_dim). Both are corrected in what it reads: per-pair frequency factors ("longrope") turn its frequencies
  into the kept pairs' own, and W_q is scaled by sqrt(width / dense head_dim). So it is by what YaRN multiplies the
  table of cos and sin with: vLLM and llama.cpp do not read longrope's attention_factor.
"""

import math
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from kvprune.channels.choice.basis import Basis
from kvprune.channels.plan import PruningPlan
from kvprune.errors import BadOption, PlanMismatch
from kvprune.models.view import ModelView

LAYOUTS = ("portable", "stock")


def check(view: ModelView, layout: str) -> None:
    """Raise BadOption for a model that no stock architecture can hold once it is pruned to that layout."""
    config = view.lm.config
    if layout not in LAYOUTS:
        return
    if view.family.portable_as is None:
        raise BadOption(
            f"layout {layout} holds attention like Llama's, not that of {config.model_type}; use --layout uniform"
        )
    parameters = config.rope_parameters
    rope = parameters["rope_type"]
    layer_types = getattr(config, "layer_types", None) or ()
    changes = rope == "dynamic" or (rope == "longrope" and parameters["short_factor"] != parameters["long_factor"])
    if layout == "portable" and changes:
        raise BadOption(
            f"layout portable cannot hold {rope} RoPE, whose frequencies change with the context; use --layout uniform "
            "or stock"
        )
    if view.family.portable_as != config.model_type and "sliding_attention" in layer_types:
        raise BadOption(
            f"layout {layout} writes {config.model_type} as {view.family.portable_as}, which has no sliding window; "
            "use --layout uniform"
        )


def stock_model(view: ModelView, plan: PruningPlan, basis: Basis) -> tuple[PreTrainedModel, torch.Tensor]:
    """The stock model, on the meta device, that the plan's weights fit, and the order (width,) in which it wants the
    kept coordinates of Q and K. basis: of any layer; their coordinates differ, but not in frequency.

    Raises PlanMismatch, BadOption.
    """
    check(view, plan.layout)
    first = plan.layers[0].qk[0]
    if any(kept != first for layer in plan.layers for kept in layer.qk):
        raise PlanMismatch(
            f"layout {plan.layout} needs the same qk for all heads and layers; make the plan with that layout"
        )
    kept = torch.tensor(first[: len(first) // 2])  # the first coordinates of the kept pairs
    settings = _settings(view, plan)
    if plan.layout == "stock":
        order = _stock_order(basis, kept)
    else:
        order = torch.arange(len(kept))
        settings["rope_parameters"] = _rope(view, basis.rope[0, kept], settings["max_position_embeddings"])
    assert view.family.portable_as is not None
    config = CONFIG_MAPPING[view.family.portable_as](**settings)
    config._attn_implementation = view.lm.config._attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=view.lm.dtype)
    return model, torch.cat((order, order + len(order)))


def query_scale(view: ModelView, plan: PruningPlan) -> float:
    """What W_q is multiplied by, so that the stock scores become the dense ones."""
    scale = math.sqrt(plan.widths[0] / view.shape.head_dim)
    # On queries and on keys; a dense table keeps its own
    return scale * _table_scale(view) ** 2 if plan.layout == "portable" else scale


def _table_scale(view: ModelView) -> float:
    """What cos and sin are multiplied by."""
    rotary: Any = view.lm.base_model.rotary_emb
    return float(rotary.attention_scaling)


def _stock_order(basis: Basis, kept: torch.Tensor) -> torch.Tensor:
    """Which of the kept pairs of coordinates stands at each of a dense head's pairs: the one that turns with it.

    Directions of slow pairs hardly turn, whichever of these pairs they get: each gets its own, the leading direction
    the slowest. Raises PlanMismatch unless each pair gets one.
    """
    turning, still = kept[kept < basis.turning], kept[kept >= basis.turning]
    pairs = torch.cat((basis.rope[0, turning], basis.slow[::2][: len(still)]))
    if len(pairs) != len(kept) or pairs.sort().values.tolist() != [*range(basis.width // (2 * basis.heads.shape[1]))]:
        raise PlanMismatch("layout stock needs one coordinate of each RoPE pair; make the plan with that layout")
    return pairs.argsort()


def _settings(view: ModelView, plan: PruningPlan) -> dict[str, Any]:
    """What the dense config says, as the stock architecture says it."""
    settings = view.lm.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "layer_types"):
        settings.pop(name, None)
    settings["head_dim"] = plan.widths[0]
    settings["num_key_value_heads"] //= plan.merge
    settings["tie_word_embeddings"] = view.is_tied
    if view.family.portable_as != view.lm.config.model_type:
        settings["attention_bias"] = _has_bias(view)
        for name in ("use_sliding_window", "sliding_window", "max_window_layers"):
            settings.pop(name, None)
    return settings


def _rope(view: ModelView, pairs: torch.Tensor, positions: int) -> dict[str, Any]:
    """rope_parameters that turn each pair of a narrower head by the frequency of one of the dense `pairs`."""
    base = view.lm.config.rope_parameters["rope_theta"]
    rebuilt = base ** -(torch.arange(len(pairs), dtype=torch.float64) / len(pairs))
    factors = (rebuilt / view.frequencies[pairs]).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def _has_bias(view: ModelView) -> bool:
    return any(p.dim() == 1 for p in view.attention[0].parameters())
