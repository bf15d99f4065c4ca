"""How far a token's key points from those before it."""

import torch

from kvprune.tokens.signals.base import Signal


class KeyDistance(Signal):
    """Minus the cosine of the key before RoPE and the mean of the normalised keys of all tokens before it, each KV head
    for itself. A key that points where the others do has nothing of its own to be found by; cf. the anchors of Token
    Filtering (arXiv 2512.07090) and KeyDiff (arXiv 2504.15364)."""

    tensors = ("total",)
    total: torch.Tensor | None = None  # (B, KV heads, width): the sum of the normalised keys so far

    def scores(self, keys: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        if real is not None:
            unit = unit * real[:, None, :, None]
        total = torch.zeros_like(unit[:, :, 0]) if self.total is None else self.total
        if unit.shape[2] == 1:
            found = -torch.nn.functional.cosine_similarity(unit[:, :, 0], total, dim=-1).unsqueeze(-1)
            self.total = total + unit[:, :, 0]
            return found
        sums = unit.cumsum(2) + total.unsqueeze(2)
        self.total = sums[:, :, -1]
        return -torch.nn.functional.cosine_similarity(unit, sums - unit, dim=-1)
