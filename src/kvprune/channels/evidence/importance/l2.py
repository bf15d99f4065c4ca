"""Squared L2 norm of a channel's weights."""

from dataclasses import dataclass
from typing import Literal

import torch

from kvprune.channels.evidence.importance.base import Scores, Statistics, per_projection
from kvprune.channels.evidence.importance.l1 import magnitudes
from kvprune.models.attention import AttentionWeights


@dataclass(frozen=True)
class L2:
    """sum w^2 over the channel's row of Q, K, V and column of O (KVPruner, arXiv 2409.11057). Needs no text."""

    needs: Literal["nothing"] = "nothing"

    def scores(self, weights: AttentionWeights, statistics: Statistics, units: torch.Tensor) -> Scores:
        return per_projection(*magnitudes(weights, torch.square))
