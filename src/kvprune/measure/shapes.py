"""Shapes of known models, for speed where no weights are at hand: random numbers are as fast as trained ones.

Source: the models' own config.json on the hub.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvprune.channels.choice.merging import AUTO, asked_merge, is_factored, merge_of
from kvprune.errors import BadOption, UnreachableRatio
from kvprune.models.source import load_config, resolve
from kvprune.models.view import ModelView
from kvprune.runtime.twin import twin_config

_LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": _LLAMA_7B,
    "llama-3-8b": _LLAMA_7B
    | {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "mistral-7b": _LLAMA_7B
    | {
        "model_type": "mistral",
        "vocab_size": 32768,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


def dense_config(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, torch.dtype | None]:
    """The config of a name in SHAPES or of a dense checkpoint, and the dtype that `load` gives its weights, or None
    where the config does not say. A folder of a shape's name is a checkpoint. Raises a KVPruneError."""
    if str(source) in SHAPES and not Path(source).exists():
        options = dict(SHAPES[str(source)])
        return AutoConfig.for_model(options.pop("model_type"), **options), torch.bfloat16
    found = resolve(source, revision, trust_remote_code, needs_weights=False)
    if found.is_pruned:
        raise BadOption(f"{found.name} is pruned already; give the dense model it came from")
    config = load_config(found)
    own = torch.bfloat16 if found.gguf_file else getattr(config, "dtype", None)
    return config, own if isinstance(own, torch.dtype) else None


def pruned_config(dense: PreTrainedConfig, ratio: float, align: int = 8, merge: int | str = AUTO) -> PreTrainedConfig:
    """A pruned twin as `prune --layout uniform` makes it, with one width for all layers that are alike: 1 - ratio of
    the channels of the KV heads that become one. merge: how many these are, a number or auto. Raises UnreachableRatio,
    BadOption and UnsupportedArchitecture."""
    if not 0 < ratio < 1:
        raise BadOption(f"--ratio {ratio:g} must lie between 0 and 1")
    view = ModelView(random_model(dense, torch.device("meta"), torch.bfloat16))
    shape = view.shape
    merge = merge_of(asked_merge(merge), shape.shared_heads, shape.head_dims[-1], ratio)
    for head_dim in shape.head_dims:
        channels = merge * head_dim
        width = round(channels * (1 - ratio) / align) * align
        if not 0 < width <= channels or abs(1 - width / channels - ratio) > 0.5 / channels:
            raise UnreachableRatio(
                f"ratio {ratio:g} of {merge} x {head_dim} channels is no multiple of {align}; the nearest is "
                f"{1 - min(max(width, align), channels) / channels:g}"
            )
    widths = [round(merge * own.head_dim * (1 - ratio) / align) * align for own in shape.each]
    factored = [is_factored(own, width) for own, width in zip(shape.each, widths, strict=True)]
    return twin_config(dense, shape.head_dim, widths, merge, factored, **view.twin)


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that shape with random weights, in eval mode, made on `device`."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
