"""What every signal is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Before:
    """What a signal is told of new tokens. keys (B, KV heads, T, width) and queries (B, heads, T, width) before RoPE,
    the latter where the signal wants them; scaling: of attention's scores."""

    keys: torch.Tensor
    queries: torch.Tensor | None
    scaling: float

    def part(self, piece: slice) -> "Before":
        """Some of the tokens; a copy, since a view would hold all of a long text."""
        return self._with(lambda x: x[:, :, piece].clone())

    def of(self, sequences: torch.Tensor) -> "Before":
        return self._with(lambda x: x.index_select(0, sequences))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Before":
        return Before(change(self.keys), None if self.queries is None else change(self.queries), self.scaling)

    @classmethod
    def joined(cls, parts: list["Before"]) -> "Before":
        """One behind the other."""
        queries = [part.queries for part in parts if part.queries is not None]
        keys = torch.cat([part.keys for part in parts], 2)
        return cls(keys, torch.cat(queries, 2) if queries else None, parts[0].scaling)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + (0 if self.queries is None else self.queries.nbytes)


class Signal(ABC):
    """One layer's. Its state is what `tensors` names, each with the batch as its first dim.

    turns (KV heads or 1, width / 2): by how much RoPE turns each pair of channels from one token to the next, radians.
    """

    tensors: tuple[str, ...] = ()
    wants_queries = False

    def __init__(self, seed: int, layer: int, turns: torch.Tensor | None = None):
        self.seed, self.layer, self.turns = seed, layer, turns

    @abstractmethod
    def scores(self, before: Before, positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """How much each token is worth keeping, (B, KV heads, T) float32; moves the state on.

        positions (B or 1, T), int64, among the sequence's real tokens; real (B, T) bool, or None where all are.
        """

    def begin(self, keys: torch.Tensor, heads: int) -> None:
        """Make the state of no token, for keys like these and so many query heads, where there is none."""
        for part in self.parts():
            if part is not self:
                part.begin(keys, heads)

    def parts(self) -> list["Signal"]:
        """Those that have a state: itself, or what it is made of."""
        return [self]

    def state(self) -> dict[tuple["Signal", str], torch.Tensor]:
        """The tensors that `scores` replaces, by whose they are and their name."""
        named = {(part, name): getattr(part, name) for part in self.parts() for name in part.tensors}
        return {key: tensor for key, tensor in named.items() if tensor is not None}

    def select(self, indices: torch.Tensor) -> None:
        """Sequences `indices` of the batch."""
        for (part, name), tensor in self.state().items():
            setattr(part, name, tensor.index_select(0, indices))

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state().values())
