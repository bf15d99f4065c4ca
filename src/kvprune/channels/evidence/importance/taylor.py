"""First-order Taylor expansion of the loss in a channel's weights."""

from dataclasses import dataclass
from typing import Literal

import torch

from kvprune.channels.evidence.importance.base import Scores, Statistics, per_projection
from kvprune.models.attention import AttentionWeights


@dataclass(frozen=True)
class Taylor:
    """sum |w * dLoss/dw| over the channel's row of Q, K, V and column of O (KVPruner, arXiv 2409.11057).

    The gradient is that of the mean loss over the whole calibration text; first order is our reading, the
    paper says only "Taylor".
    """

    needs: Literal["gradients"] = "gradients"

    def scores(self, weights: AttentionWeights, statistics: Statistics, units: torch.Tensor) -> Scores:
        gradients = statistics.gradients
        assert gradients is not None

        def product(name: str) -> torch.Tensor | None:
            weight, gradient = getattr(weights, name), getattr(gradients, name)
            return None if weight is None else (weight.float() * gradient.float()).abs()

        return per_projection(product, lambda name: product(name + "_bias"))
