"""A cache layer that holds the kept tokens only, each sequence's own in transformers' quantised form."""

import copy
from typing import Any

import torch
from torch.nn.functional import pad

from kvprune.runtime.quantized import copied_but_stores
from kvprune.tokens.cache import FilteredLayer


class QuantizedFilteredLayer(FilteredLayer):
    """Every sequence has a store of its own, a quantised cache layer of batch 1, since each keeps other tokens: the
    host decides on any device.

    empty: such a layer without tokens, which the stores are copies of. keys and values stay empty; they have the shape.
    """

    def __init__(self, empty: Any):
        self.empty = empty
        super().__init__()

    def _forget(self) -> None:
        super()._forget()
        self.stores: list[Any] = []
        self.read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # at full size, while a call lasts

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.is_on_device = False
        self.lengths, self.counts = self.lengths.to(self.home), self.counts.to(self.home)
        self.stores = [copy.copy(self.empty) for _ in key_states]

    def append(self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Keep some of the new tokens, as FilteredLayer does; the others are nowhere."""
        self.read = {}
        place, self.lengths = self.lengths, self.lengths + kept.sum(1)
        if self.columns.is_inference() and not torch.is_inference_mode_enabled():
            self.columns = self.columns.clone()  # can be written to
        room, ends = self.columns.shape[1], self.lengths.tolist()
        if max(ends) > room:
            self.columns = pad(self.columns, (0, max(max(ends) - room, room // 8)))
        for b, end in enumerate(ends):
            tokens = kept[b].nonzero()[:, 0].to(self.device)
            if len(tokens):
                self.columns[b, end - len(tokens) : end] = self.seen + tokens
                self.read[b] = self.stores[b].update(keys[b : b + 1, :, tokens], values[b : b + 1, :, tokens])
        return place

    def of(self, b: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequence b's keys and values (1, KV heads, length, head_dim) at full size, and their columns (length,)."""
        assert self.keys is not None
        assert self.values is not None
        columns = self.columns[b, :length]
        if not length:
            return self.keys[b : b + 1], self.values[b : b + 1], columns
        if b not in self.read:  # this call has kept nothing of it
            nothing = self.keys[b : b + 1], self.values[b : b + 1]
            self.read[b] = copy.copy(self.stores[b]).update(*nothing)
        return *self.read[b], columns

    def trim(self) -> None:
        """Windows, which this cache has none of, are not its business; what was read is let go."""
        self.read = {}

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.stores = [copy.copy(self.stores[b]) for b in indices.tolist()]  # they replace, and never write into
            super().batch_select_indices(indices)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedFilteredLayer":
        return copied_but_stores(self, memo)
