"""A dense config -> that of its pruned twin."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from kvprune.runtime import modeling


def twin_config(
    dense: PreTrainedConfig,
    head_dim: int,
    widths: Sequence[int],
    merge: int = 1,
    factored: Sequence[bool] = (),
    *,
    dropped: Sequence[int] = (),
    attention_layers: Sequence[int] | None = None,
    kv_heads: int | None = None,
    columns: int | None = None,
    per_layer: Sequence[tuple[int, int]] = (),
    words: dict[str, Any] | None = None,
    rebuilds: bool = True,
) -> Any:
    """The dense config with a head_dim per layer, of the family's pruned class; head_dim: the dense one.

    kv_heads: of the dense model, where its config does not say. merge: how many of them one of the pruned model stands
    for; factored: see PrunedAttention, by layer; dropped: the layers whose whole block is gone. attention_layers: the
    numbers of the layers that widths, factored and per_layer are of, where they are not all; the others are as in the
    dense model. columns: of the table of cos and sin, None for head_dim; per_layer: (KV heads, head_dim) of each dense
    layer, where they differ: kv_heads and head_dim are then the first layer's, and each layer's table is as wide as its
    heads. words: see modeling.py; rebuilds: whether the order of the channels is that of the table, so that many tokens
    may be read at the dense width."""
    settings = dense.to_dict()
    for name in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version"):
        settings.pop(name, None)
    kv_heads = settings["num_key_value_heads"] if kv_heads is None else kv_heads
    settings["head_dim"] = settings["dense_head_dim"] = head_dim
    if merge > 1:
        settings["dense_kv_heads"] = kv_heads
    settings["num_key_value_heads"] = kv_heads // merge  # some families have none in the dense config
    if words:
        settings["words"] = words
    if columns is not None and columns != head_dim and not per_layer:
        settings["rope_columns"] = columns
    if attention_layers is not None:
        settings["attention_layers"] = list(attention_layers)
    config = modeling.config_class(dense.model_type)(**settings)
    numbers = range(len(widths)) if attention_layers is None else attention_layers
    layers: dict[int, dict[str, Any]] = {i: {"head_dim": width} for i, width in zip(numbers, widths, strict=True)}
    for layer, (heads, channels) in zip(layers.values(), per_layer, strict=bool(per_layer)):
        layer |= {"dense_head_dim": channels, "num_key_value_heads": heads // merge}
        if merge > 1:
            layer["dense_kv_heads"] = heads
    if any(factored):
        config.rebuilds = rebuilds
        for layer, mixes in zip(layers.values(), factored, strict=True):
            layer["factored"] = bool(mixes)
    for number in dropped:
        layers[number]["block"] = False
    config.per_layer_config = layers
    return config
