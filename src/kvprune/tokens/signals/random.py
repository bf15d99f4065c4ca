"""No signal at all: the baseline."""

import torch

from kvprune.tokens.signals.base import Before, Signal

PRIME = 2147483647  # 2^31 - 1: products of two numbers below it fit into int64


class Random(Signal):
    """Numbers that look random and depend on seed, layer, KV head and position only (three rounds of a power residue
    generator)."""

    def scores(self, before: Before, positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        heads = torch.arange(before.keys.shape[1], device=before.keys.device).view(1, -1, 1)
        x = positions.unsqueeze(1) * 48271 + heads * 69621 + (self.layer + 1) * 16807 + self.seed * 40692 + 1
        for _ in range(3):
            x = (x % PRIME + 1) % PRIME
            x = x * x % PRIME * 48271 % PRIME
        return (x.float() / PRIME).expand(len(before.keys), -1, -1)
