"""A KV cache with room to spare: a decoding step writes its token in place.

transformers' `DynamicCache` concatenates, which reads and writes the whole cache again for every token, beside the one
reading that attention needs.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

STEP = 256  # tokens: how finely room is made


class GrowingLayer(DynamicLayer):
    """`keys` and `values` (B, KV heads, tokens, width) are the filled parts of larger tensors."""

    key_room: torch.Tensor | None = None
    value_room: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Append (B, KV heads, new tokens, width), and return all that is cached."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_room = _append(self.keys, self.key_room, key_states)
        self.values, self.value_room = _append(self.values, self.value_room, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        self.key_room = self.value_room = None
        super().reset()


class GrowingCache(DynamicCache):
    """A `DynamicCache` of GrowingLayers, for inference; layers with a sliding window stay transformers' own.

    Cropped, reordered and repeated as any other. Up to an eighth more memory than the tokens in it, and STEP tokens.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def _append(kept: Any, room: torch.Tensor | None, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept with the new tokens behind it, and the tensor that this is the beginning of."""
    filled = kept.shape[-2] if kept.numel() else 0
    total = filled + new.shape[-2]
    if room is None or not _fits(kept, room, new, total):
        tokens = -(-(total + total // 8) // STEP) * STEP
        room = new.new_empty(*new.shape[:-2], tokens, new.shape[-1])
        if filled:
            room[..., :filled, :] = kept
    room[..., filled:total, :] = new
    return room[..., :total, :], room


def _fits(kept: torch.Tensor, room: torch.Tensor, new: torch.Tensor, total: int) -> bool:
    """Whether `kept` still is the beginning of `room`, not a copy of it (reordered, moved), and there is room."""
    own = kept.data_ptr() == room.data_ptr() and kept.shape[0] == room.shape[0] == new.shape[0]
    writable = not room.is_inference() or torch.is_inference_mode_enabled()
    return own and writable and room.shape[-2] >= total
