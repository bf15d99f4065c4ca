"""What every signal is."""

from abc import ABC, abstractmethod

import torch


class Signal(ABC):
    """One layer's. Its state is what `tensors` names, each with the batch as its first dim."""

    tensors: tuple[str, ...] = ()

    def __init__(self, seed: int, layer: int):
        self.seed, self.layer = seed, layer

    @abstractmethod
    def scores(self, keys: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """How much each token is worth keeping, (B, KV heads, T) float32; moves the state on.

        keys (B, KV heads, T, width), before RoPE; positions (B or 1, T), int64, among the sequence's real tokens; real
        (B, T) bool, or None where all are.
        """

    def select(self, indices: torch.Tensor) -> None:
        """Sequences `indices` of the batch."""
        for name in self.tensors:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, indices))

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.tensors if getattr(self, name) is not None)
