"""How many tokens each layer of a model holds at some context: all of them, or those of its sliding window."""

import bisect
from collections.abc import Callable
from typing import Any

from transformers import DynamicCache, PreTrainedConfig


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """The most tokens of each layer that has a cache: what stays of a sliding window between two steps, or None for
    all."""
    layers: list[Any] = [layer for layer in DynamicCache(config=config).layers if hasattr(layer, "is_sliding")]
    found = [layer.sliding_window - 1 if layer.is_sliding else None for layer in layers]
    return found or [None] * config.num_hidden_layers  # older transformers make plain layers as they go


def slides(config: PreTrainedConfig) -> bool:
    """Whether some layer forgets what has left its window."""
    return any(most is not None for most in windows_of(config))


def is_hybrid(config: PreTrainedConfig) -> bool:
    """Whether some layer holds a state in place of keys and values."""
    return any(DynamicCache(config=config).is_linear)


def held_tokens(config: PreTrainedConfig, context: int) -> int:
    """Tokens in the cache of one sequence, summed over layers."""
    return sum(held_each(config, context))


def held_each(config: PreTrainedConfig, context: int) -> list[int]:
    """The same of each layer that has a cache."""
    return [context if most is None else min(context, most) for most in windows_of(config)]


def longest(config: PreTrainedConfig, fits: Callable[[int], bool]) -> int:
    """The longest context that the model takes and that fits; 0 for none."""
    return bisect.bisect_left(range(1, config.max_position_embeddings + 1), True, key=lambda n: not fits(n))
