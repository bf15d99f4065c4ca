"""What a channel contributes to the attention scores and to the output, from second moments."""

from dataclasses import dataclass
from typing import Literal

import torch

from kvprune.channels.evidence.importance.base import Scores, Statistics
from kvprune.models.attention import AttentionWeights


@dataclass(frozen=True)
class Energy:
    """Expected energy of a RoPE pair in the scores and of a channel in the output [ours].

    Q/K, a pair p: E|q_p|^2 summed over the group * E|k_p|^2 (RoPE turns a pair and leaves its length). The two
    channels of a pair share its score evenly. V/O, a channel c: E v_c^2 * sum over the group of |W_o column|^2.
    One forward pass over the calibration text, no gradients. Takes queries and keys, and tokens, as unrelated.
    """

    needs: Literal["energy"] = "energy"

    def scores(self, weights: AttentionWeights, statistics: Statistics, units: torch.Tensor) -> Scores:
        energy = statistics.energy
        assert energy is not None
        q = energy["q"].sum(1)[:, units].sum(-1)  # (kv_heads, units)
        k = energy["k"][:, units].sum(-1)
        qk = torch.zeros_like(energy["k"])
        qk[:, units] = (q * k / units.shape[1]).unsqueeze(-1).expand(*q.shape, units.shape[1])
        vo = energy["v"] * weights.o.float().square().sum((1, 3))
        return Scores(qk, vo)
