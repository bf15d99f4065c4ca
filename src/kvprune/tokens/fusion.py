"""How the similarities of a token's keys and values, head by head, become one number: the higher, the more alike.

One class a fusion, and a line in FUSIONS. Cosines come as (B, 2, KV heads, T), keys first, and leave as (B, T).
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Fusion(Protocol):
    def __call__(self, cosines: torch.Tensor) -> torch.Tensor:
        """Cosines (B, 2, KV heads, T), of keys and of values -> similarity (B, T)."""
        ...


@dataclass(frozen=True)
class Variance:
    """Means over the heads, weighted by how well the heads agree.

    w_K = (1 / (var_K + eps)) / (1 / (var_K + eps) + 1 / (var_V + eps)). Source: Token Filtering (arXiv 2512.07090),
    which weights by consistency across heads; the formula, and the plain mean for a single KV head, are ours.
    """

    eps: float = 1e-6

    def __call__(self, cosines: torch.Tensor) -> torch.Tensor:
        if cosines.shape[2] == 1:
            return Mean()(cosines)
        var, mean = torch.var_mean(cosines, dim=2, correction=0)  # (B, 2, T) each
        var += self.eps
        weight = var[:, 1] / var.sum(1)  # the formula, multiplied out
        return torch.lerp(mean[:, 1], mean[:, 0], weight)


@dataclass(frozen=True)
class Mean:
    """Plain mean over heads, keys and values [ours, to compare with]."""

    def __call__(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines.mean((1, 2))


@dataclass(frozen=True)
class Key:
    """Keys only [ours, to compare with]."""

    def __call__(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines[:, 0].mean(1)


@dataclass(frozen=True)
class Value:
    """Values only [ours, to compare with]."""

    def __call__(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines[:, 1].mean(1)


FUSIONS: dict[str, type[Fusion]] = {"variance": Variance, "mean": Mean, "key": Key, "value": Value}
