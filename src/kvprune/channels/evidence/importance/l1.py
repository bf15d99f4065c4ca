"""L1 norm of a channel's weights."""

from dataclasses import dataclass
from typing import Literal

import torch

from kvprune.channels.evidence.importance.base import Scores, Statistics, per_projection
from kvprune.models.attention import AttentionWeights


@dataclass(frozen=True)
class L1:
    """sum |w| over the channel's row of Q, K, V and column of O (KVPruner, arXiv 2409.11057).

    Needs no text, and knows nothing of what the model does with it: by far the weakest with l2.
    """

    needs: Literal["nothing"] = "nothing"

    def scores(self, weights: AttentionWeights, statistics: Statistics, units: torch.Tensor) -> Scores:
        return per_projection(*magnitudes(weights, torch.abs))


def magnitudes(weights: AttentionWeights, size):
    """The two look-ups that per_projection asks for, of `size` applied to each weight."""

    def value(name: str) -> torch.Tensor:
        return size(getattr(weights, name).float())

    def bias(name: str) -> torch.Tensor | None:
        tensor = getattr(weights, name + "_bias")
        return None if tensor is None else size(tensor.float())

    return value, bias
