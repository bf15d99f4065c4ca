"""What a channel decides in the loss: the variance importance, with the loss's own gradients as weights."""

from dataclasses import dataclass
from typing import Literal

from kvprune.channels.importance.variance import Variance


@dataclass(frozen=True)
class Fisher(Variance):
    """Expected loss of the model, to second order, with the Fisher information as curvature [ours].

    Q/K, a RoPE pair: E of the square of what the loss changes by, to first order, when the pair's contribution to a
    query's scores goes. Unlike in `variance` a score counts by what its value does behind the attention. V/O as in
    `variance`. A forward and a backward pass over the calibration text, and the pass of `variance`.
    """

    needs: Literal["attention+gradients"] = "attention+gradients"  # type: ignore[assignment]
