"""Late admission on transformers' quantised cache: what is kept is quantised, what is not decided yet is not."""

import copy
from typing import Any

import torch

from kvprune.runtime.quantized import copied_but_stores, quantized_bytes
from kvprune.tokens.admission import Admission
from kvprune.tokens.admitted import AdmittedLayer

# Kept tokens that go to a store at once: fp8 scales all tokens by the first ones, and few of them say little.
TOGETHER = 64


class QuantizedAdmittedLayer(AdmittedLayer):
    """The rooms hold the tokens that are not decided yet, and up to TOGETHER of those that are kept; every sequence has
    a store of its own for the rest, a quantised cache layer of batch 1, so that beams can be told apart. empty: such a
    layer without tokens, which the stores are copies of. All tokens must be real."""

    def __init__(self, rule: Admission, index: int, turns: torch.Tensor | None, empty: Any):
        self.empty = empty
        super().__init__(rule, index, turns)

    def _forget(self) -> None:
        super()._forget()
        self.away = 0
        self.stores: list[Any] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.stores = [copy.copy(self.empty) for _ in key_states]

    def _needed(self, number: int) -> int:
        return min(number, self.rule.window + 2 * self.rule.block + TOGETHER)

    def _take(self, chosen: torch.Tensor, block: slice, filled: int) -> int:
        left = super()._take(chosen, block, filled)
        kept = block.start + chosen.shape[2]
        if kept < TOGETHER:
            return left
        assert self.key_room is not None
        assert self.value_room is not None
        for b, store in enumerate(self.stores):
            store.update(self.key_room[b : b + 1, :, :kept], self.value_room[b : b + 1, :, :kept])
        for room in (self.key_room, self.value_room, self.scores):
            room[:, :, : left - kept] = room[:, :, kept:left].clone()
        self.away += kept
        return left - kept

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super()._read()
        if not self.away:
            return keys, values
        nothing = keys[:1, :, :0], values[:1, :, :0]
        kept = [copy.copy(store).update(*nothing) for store in self.stores]  # at full size, while a call lasts
        own_keys, own_values = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return torch.cat((own_keys, keys), 2), torch.cat((own_values, values), 2)

    def kv_nbytes(self) -> int:
        assert self.keys is not None
        assert self.values is not None
        return sum(map(quantized_bytes, self.stores)) + self.keys.nbytes + self.values.nbytes

    def held_nbytes(self) -> int:
        return sum(map(quantized_bytes, self.stores)) + super().held_nbytes()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.stores = [copy.copy(self.stores[b]) for b in indices.tolist()]  # they replace, and never write into
            super().batch_select_indices(indices)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedAdmittedLayer":
        return copied_but_stores(self, memo)
