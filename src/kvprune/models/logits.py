"""Hidden states behind the final norm -> logits, as the family makes them: some scale them, some cap them."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kvprune.models.family import family_of


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(times * embedding(states) / cap); cap None: no cap."""

    embedding: nn.Module
    times: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, lm: PreTrainedModel) -> "Head":
        """That of a dense or pruned model."""
        config: Any = lm.config
        embedding = lm.get_output_embeddings()
        how, name = family_of(config.model_type).logits or ("", "")
        value = getattr(config, name, None) if name else None
        if value is None:
            return cls(embedding)
        if how == "cap":
            return cls(embedding, cap=float(value))
        return cls(embedding, times=1 / value if how == "divide" else float(value))

    @property
    def weight(self) -> torch.Tensor:
        return cast(torch.Tensor, self.embedding.weight)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., vocabulary)"""
        logits = self.embedding(states)
        if self.times != 1.0:
            logits = logits * self.times
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """By how much these logits grow for each unit that the embedding's products grow."""
        return self.times if self.cap is None else self.times * (1 - (logits / self.cap).square())

    def back(self, gradient: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
        """The gradient in the states, (n, hidden), from that in the logits (n, vocabulary), in the states' dtype."""
        through = gradient if isinstance(slope, float) and slope == 1.0 else gradient * slope
        return through.to(self.weight.dtype) @ self.weight
