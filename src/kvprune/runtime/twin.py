"""A dense config -> that of its pruned twin."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from kvprune.runtime import modeling


def twin_config(
    dense: PreTrainedConfig, head_dim: int, widths: Sequence[int], merge: int = 1, factored: Sequence[bool] = ()
) -> Any:
    """The dense config with a head_dim per layer, of the family's pruned class; head_dim: the dense one.

    merge: how many dense KV heads one of the pruned model stands for; factored: see PrunedAttention, by layer."""
    settings = dense.to_dict()
    for name in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version"):
        settings.pop(name, None)
    settings["head_dim"] = settings["dense_head_dim"] = head_dim
    if merge > 1:
        settings["dense_kv_heads"] = settings["num_key_value_heads"]
        settings["num_key_value_heads"] //= merge
    config = modeling.config_class(dense.model_type)(**settings)
    layers: dict[int, dict[str, Any]] = {i: {"head_dim": width} for i, width in enumerate(widths)}
    if any(factored):
        config.rebuilds = True
        for layer, mixes in zip(layers.values(), factored, strict=True):
            layer["factored"] = bool(mixes)
    config.per_layer_config = layers
    return config
