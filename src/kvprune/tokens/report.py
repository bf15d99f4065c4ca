"""What a token filter did: rates, bytes, rows and time, as plain numbers."""

from typing import Any

from kvprune.measure.memory import held_bytes, kv_bytes
from kvprune.models.family import dense_shapes
from kvprune.runtime.quantized import stores_of
from kvprune.tokens.admitted import AdmittedLayer
from kvprune.tokens.attention import Counts
from kvprune.tokens.cache import FilteredLayer
from kvprune.tokens.settings import Settings


def report(model: Any, settings: Settings, layers: list[tuple[int, Counts]]) -> dict[str, Any]:
    """ratio_asked, ratio_achieved (of all attention behind the warm-up) and per_layer (a rate for every layer);
    drop_ratio_asked and _achieved, the same for K/V; tokens; rows that reached each projection, summed over the layers
    that skip, and rows_dense, what the dense model's would be (both with padding, which reaches K and V); and
    deciding_seconds, which on a GPU begins with waiting for what was queued before, or, in a step of decoding, is the
    time of queueing."""
    total = model.config.num_hidden_layers
    late = max((counts.late for _, counts in layers), default=0)
    rates = [0.0] * total
    for index, counts in layers:
        rates[index] = counts.skipped / counts.late if counts.late else 0.0
    skipped = sum(counts.skipped for _, counts in layers)
    dropped = sum(counts.dropped for _, counts in layers)
    rows = {name: sum(counts.rows[name] for _, counts in layers) for name in "qkvo"}
    return {
        "ratio_asked": settings.ratio,
        "ratio_achieved": skipped / (late * total) if late else 0.0,
        "drop_ratio_asked": settings.ratio if settings.drop_ratio is None else settings.drop_ratio,
        "drop_ratio_achieved": dropped / (late * total) if late else 0.0,
        "per_layer": rates,
        "tokens": max((counts.tokens for _, counts in layers), default=0),
        "tokens_after_warmup": late,
        "rows": rows,
        "rows_dense": rows["k"],
        "deciding_seconds": sum(counts.seconds for _, counts in layers),
    }


OWN = (FilteredLayer, AdmittedLayer)
BYTES = ("kv_bytes", "kv_bytes_dense", "padding_bytes", "position_bytes", "anchor_bytes")


def no_bytes() -> dict[str, int]:
    return dict.fromkeys(BYTES, 0)


def bytes_of(model: Any, cache: Any) -> dict[str, int]:
    """Of the last call's cache: kv_bytes (kept tokens x bytes a token, all layers; of a sliding window, those in it),
    kv_bytes_dense (the same tokens in the dense model), and apart from them padding_bytes (of ragged batches, and the
    room that is kept free), position_bytes (columns, or scores, of kept tokens) and anchor_bytes (what deciding goes
    by). Zeros where there was no cache, or none that every layer had begun: the first call failed."""
    filtered = [layer for layer in cache.layers if isinstance(layer, OWN)] if cache is not None else []
    layers = [layer for layer in cache.layers if hasattr(layer, "keys")] if filtered else []  # others hold a state
    if not filtered or any(layer.keys is None for layer in layers):
        return no_bytes()
    dense = [kv_heads * channels for kv_heads, channels in dense_shapes(model.config)]
    found = no_bytes()
    a_number = filtered[0].dtype.itemsize
    for index, layer in enumerate(cache.layers):
        if not hasattr(layer, "keys"):
            continue
        tokens = filtered[0].real_tokens()
        window = layer.window if isinstance(layer, FilteredLayer) else getattr(layer, "sliding_window", None)
        if window is not None:
            tokens = tokens.clip(max=window - 1)
        found["kv_bytes_dense"] += int(tokens.sum()) * 2 * dense[index] * a_number
        kept = int(tokens.sum())
        if isinstance(layer, OWN):
            kept = int(layer.kept_tokens().sum())
            found["position_bytes"] += layer.position_bytes()
            found["anchor_bytes"] += layer.anchor_bytes()
        is_known = stores_of(layer) or isinstance(layer, AdmittedLayer)
        own = kv_bytes(layer) if is_known else kept * 2 * layer.keys.shape[1] * layer.keys.shape[3] * a_number
        found["kv_bytes"] += own
        found["padding_bytes"] += held_bytes(layer) - own
    return found
