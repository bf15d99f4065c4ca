"""The portable layout: one width, one set of RoPE pairs for the whole model, and so a *stock* checkpoint.

Stock code rebuilds the rotary frequencies from head_dim and scales the softmax by 1 / sqrt(head_dim). Both are
corrected in what it reads: per-pair frequency factors ("longrope") turn its frequencies into the kept pairs' own, and
W_q is scaled by sqrt(width / dense head_dim). It loads wherever the family does, without kvprune and without
trust_remote_code, and costs most quality, since all layers lose the same pairs.
"""

import math
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from kvprune.channels.plan import PruningPlan
from kvprune.errors import BadOption, PlanMismatch
from kvprune.models.view import ModelView


def check(view: ModelView) -> None:
    """Raise BadOption for a model that no stock architecture can hold once it is pruned."""
    config = view.lm.config
    parameters = config.rope_parameters
    rope = parameters["rope_type"]
    layer_types = getattr(config, "layer_types", None) or ()
    if rope == "dynamic" or (rope == "longrope" and parameters["short_factor"] != parameters["long_factor"]):
        raise BadOption(
            f"layout portable cannot hold {rope} RoPE, whose frequencies change with the context; use --layout uniform"
        )
    if view.family.portable_as != config.model_type and "sliding_attention" in layer_types:
        raise BadOption(
            f"layout portable writes {config.model_type} as {view.family.portable_as}, which has no sliding window; "
            "use --layout uniform"
        )


def stock_model(view: ModelView, plan: PruningPlan) -> PreTrainedModel:
    """The stock model, on the meta device, that the plan's weights fit. Raises PlanMismatch, BadOption."""
    check(view)
    first = plan.layers[0].qk[0]
    if any(kept != first for layer in plan.layers for kept in layer.qk):
        raise PlanMismatch("layout portable needs the same qk for all heads and layers; make the plan with that layout")
    config = _config(view, first)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=view.lm.dtype)


def query_scale(view: ModelView, plan: PruningPlan) -> float:
    """What W_q is multiplied by, so that the stock softmax scale becomes the dense one."""
    return math.sqrt(plan.widths[0] / view.shape.head_dim)


def _config(view: ModelView, kept: tuple[int, ...]) -> Any:
    settings = view.lm.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "layer_types"):
        settings.pop(name, None)
    width = len(kept)
    rotary: Any = view.lm.base_model.rotary_emb
    base = view.lm.config.rope_parameters["rope_theta"]
    own = rotary.inv_freq.double().cpu()[list(kept[: width // 2])]
    rebuilt = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors = (rebuilt / own).tolist()
    settings["head_dim"] = width
    settings["tie_word_embeddings"] = view.is_tied
    settings["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": float(rotary.attention_scaling),
        "original_max_position_embeddings": settings["max_position_embeddings"],
    }
    if view.family.portable_as != view.lm.config.model_type:
        settings["attention_bias"] = _has_bias(view)
        for name in ("use_sliding_window", "sliding_window", "max_window_layers"):
            settings.pop(name, None)
    config = CONFIG_MAPPING[view.family.portable_as](**settings)
    config._attn_implementation = view.lm.config._attn_implementation
    return config


def _has_bias(view: ModelView) -> bool:
    return any(p.dim() == 1 for p in view.attention[0].parameters())
