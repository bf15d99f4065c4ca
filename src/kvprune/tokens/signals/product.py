"""Expected attention and key distance together."""

import torch

from kvprune.tokens.signals.base import Before, Signal
from kvprune.tokens.signals.expected_attention import ExpectedAttention
from kvprune.tokens.signals.key_distance import KeyDistance

TINY = 1e-6


class Product(Signal):
    """The logarithm of expected attention times (1 - cosine): what is looked at, and is not there already [ours]."""

    wants_queries = True

    def __init__(self, seed: int, layer: int, turns: torch.Tensor | None = None):
        super().__init__(seed, layer, turns)
        self.attention, self.distance = ExpectedAttention(seed, layer, turns), KeyDistance(seed, layer, turns)

    def parts(self) -> list[Signal]:
        return [self.attention, self.distance]

    def scores(self, before: Before, positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        distance = 1 + self.distance.scores(before, positions, real)
        return self.attention.scores(before, positions, real) + distance.clamp_min(TINY).log()
