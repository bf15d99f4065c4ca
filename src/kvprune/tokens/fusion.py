"""How the similarities of a token's keys and values, head by head, become one number: the higher, the more alike.

One class a fusion, and a line in FUSIONS. Keys and values come as cosines (B, KV heads, T) and leave as (B, T).
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Fusion(Protocol):
    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Cosines (B, KV heads, T) each -> similarity (B, T)."""
        ...


@dataclass(frozen=True)
class Variance:
    """Means over the heads, weighted by how well the heads agree.

    w_K = (1 / (var_K + eps)) / (1 / (var_K + eps) + 1 / (var_V + eps)). Source: Token Filtering (arXiv 2512.07090),
    which weights by consistency across heads; the formula, and the plain mean for a single KV head, are ours.
    """

    eps: float = 1e-6

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if keys.shape[1] == 1:
            return Mean()(keys, values)
        (var_k, mean_k), (var_v, mean_v) = (torch.var_mean(x, dim=1, correction=0) for x in (keys, values))
        weight = (var_v + self.eps) / (var_k + var_v + 2 * self.eps)  # the formula, multiplied out
        return torch.lerp(mean_v, mean_k, weight)


@dataclass(frozen=True)
class Mean:
    """Plain mean over heads, keys and values [ours, to compare with]."""

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (keys.mean(1) + values.mean(1)) / 2


@dataclass(frozen=True)
class Key:
    """Keys only [ours, to compare with]."""

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return keys.mean(1)


@dataclass(frozen=True)
class Value:
    """Values only [ours, to compare with]."""

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.mean(1)


FUSIONS: dict[str, type[Fusion]] = {"variance": Variance, "mean": Mean, "key": Key, "value": Value}
