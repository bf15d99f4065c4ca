"""What a channel decides in the attention: variance over the keys as the attention weighs them."""

from dataclasses import dataclass
from typing import Literal

import torch

from kvprune.channels.evidence.importance.base import Scores, Statistics
from kvprune.models.attention import AttentionWeights


@dataclass(frozen=True)
class Variance:
    """Expected loss of attention, to second order [ours].

    Q/K, a RoPE pair: E of the squared change of the attention's output, behind O, when the pair's contribution to the
    scores goes, to first order, summed over the group, if the phases of q and k are unrelated. What a pair adds to all
    keys alike costs nothing, unlike in `energy`, nor what it adds where the values are alike. Across heads: see
    basis.key_basis. V/O, a
    channel c: E z_c^2 times |W_o column|^2, each summed over the group, of the attention outputs z, which are values
    mixed over tokens. One pass over the calibration text, no gradients. Takes pairs as unrelated.
    """

    needs: Literal["attention"] = "attention"

    def scores(self, weights: AttentionWeights, statistics: Statistics, units: torch.Tensor) -> Scores:
        moments = statistics.attention
        assert moments is not None
        pairs = moments.keys[:, :, 0, 0].real.clamp_min(0) / 4  # half the energy, halved between two channels
        qk = torch.zeros(len(pairs), units.numel(), dtype=torch.float64, device=pairs.device)
        for channels in units.T:
            qk[:, channels] = pairs
        size = weights.o.double().square().sum((1, 3))  # (kv_heads, D)
        return Scores(qk, moments.outputs.diagonal(dim1=1, dim2=2) * size)
