"""What every importance score is given and returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from kvprune.channels.evidence.moments import AttentionMoments
from kvprune.models.attention import AttentionWeights


@dataclass(frozen=True)
class Scores:
    """Scores of one layer's channels, float32, larger matters more: qk and vo (kv_heads, D)."""

    qk: torch.Tensor
    vo: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """What the calibration text says of one layer; which fields are set follows `Importance.needs`.

    energy: mean square of each channel's output before RoPE, biases included: q (kv_heads, groups, D), k and v
    (kv_heads, D), float32.
    gradients: d(mean loss) / d(weight), shaped like the weights, float32.
    attention: see channels/evidence/moments.py.
    """

    energy: dict[str, torch.Tensor] | None = None
    gradients: AttentionWeights | None = None
    attention: AttentionMoments | None = None


class Importance(Protocol):
    """A score: weights and statistics of one layer -> Scores."""

    @property
    def needs(self) -> Literal["nothing", "energy", "gradients", "attention"]: ...

    def scores(self, weights: AttentionWeights, statistics: Statistics, units: torch.Tensor) -> Scores:
        """units: the channels that leave Q and K together, (units, channels per unit)."""
        ...


def normalised(score: torch.Tensor) -> torch.Tensor:
    """Divided by its mean over the layer, or the projection with the larger norm would decide [ours]."""
    mean = score.mean()
    return score / mean if mean > 0 else score


def per_projection(value: Callable[[str], torch.Tensor | None], biases: Callable[[str], torch.Tensor | None]) -> Scores:
    """Sum values per weight into channel scores, and average Q with K and V with O.

    value("q") is (kv_heads, groups, D, hidden) and so on, biases("q") (kv_heads, groups, D) or None. A query
    channel's score is summed over the group that shares its KV head, and so is an O channel's.
    """
    score = {}
    for name in "qkvo":
        weight = value(name)
        assert weight is not None
        channel = weight.float().sum(-1)
        bias = biases(name) if name != "o" else None  # O's bias belongs to no channel
        if bias is not None:
            channel = channel + bias.float()
        score[name] = normalised(channel.sum(1) if name in "qo" else channel)
    return Scores((score["q"] + score["k"]) / 2, (score["v"] + score["o"]) / 2)
