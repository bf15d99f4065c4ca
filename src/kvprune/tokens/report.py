"""What a token filter did: rates, bytes, rows and time, as plain numbers."""

from typing import Any

from kvprune.tokens.attention import Counts
from kvprune.tokens.cache import FilteredLayer
from kvprune.tokens.settings import Settings


def report(model: Any, settings: Settings, layers: list[tuple[int, Counts]], cache: Any) -> dict[str, Any]:
    """ratio_asked, ratio_achieved (of all attention behind the warm-up) and per_layer (a rate for every layer);
    drop_ratio_achieved the same for K/V; tokens; rows that reached each projection, over the layers that skip, and
    rows_dense; deciding_seconds. Of the last call's cache: kv_bytes (kept tokens x bytes a token, all layers),
    kv_bytes_dense (the same tokens in the dense model), allocated_bytes (with room and padding), anchor_bytes.
    """
    total = model.config.num_hidden_layers
    late = max((counts.late for _, counts in layers), default=0)
    rates = [0.0] * total
    for index, counts in layers:
        rates[index] = counts.skipped / counts.late if counts.late else 0.0
    skipped = sum(counts.skipped for _, counts in layers)
    dropped = sum(counts.dropped for _, counts in layers)
    return {
        "ratio_asked": settings.ratio,
        "ratio_achieved": skipped / (late * total) if late else 0.0,
        "drop_ratio_asked": settings.ratio if settings.drop_ratio is None else settings.drop_ratio,
        "drop_ratio_achieved": dropped / (late * total) if late else 0.0,
        "per_layer": rates,
        "tokens": max((counts.tokens for _, counts in layers), default=0),
        "tokens_after_warmup": late,
        "rows": {name: sum(counts.rows[name] for _, counts in layers) for name in "qkvo"},
        "rows_dense": sum(counts.tokens for _, counts in layers),
        "deciding_seconds": sum(counts.seconds for _, counts in layers),
        **_bytes(model, cache),
    }


def _bytes(model: Any, cache: Any) -> dict[str, int]:
    filtered = [layer for layer in cache.layers if isinstance(layer, FilteredLayer)] if cache is not None else []
    filtered = [layer for layer in filtered if layer.is_initialized]
    if not filtered:
        return dict.fromkeys(("kv_bytes", "kv_bytes_dense", "allocated_bytes", "anchor_bytes"), 0)
    config = model.config
    width = getattr(config, "dense_head_dim", None) or getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    kept = dense = allocated = anchors = 0
    for layer in cache.layers:
        tokens = filtered[0].counts
        window = layer.window if isinstance(layer, FilteredLayer) else getattr(layer, "sliding_window", None)
        if window is not None:
            tokens = tokens.clip(max=window - 1)
        a_number = layer.keys.element_size()
        dense += int(tokens.sum()) * 2 * config.num_key_value_heads * width * a_number
        if isinstance(layer, FilteredLayer):
            kept += int(layer.lengths.sum()) * layer.bytes_per_token
            allocated += layer.allocated_bytes
            anchors += sum(t.nbytes for t in (layer.anchor, layer.output_anchor) if t is not None)
        else:
            kept += int(tokens.sum()) * 2 * layer.keys.shape[1] * layer.keys.shape[3] * a_number
            allocated += layer.keys.nbytes + layer.values.nbytes
    return {"kv_bytes": kept, "kv_bytes_dense": dense, "allocated_bytes": allocated, "anchor_bytes": anchors}
