"""How much attention a token can expect from the queries that are to come."""

import torch

from kvprune.tokens.signals.base import Before, Signal
from kvprune.tokens.signals.key_distance import averages

AHEAD = 512  # tokens: how far ahead the queries are that are expected


class ExpectedAttention(Signal):
    """The mean over the KV head's queries of the logarithm of E exp(score), the queries to come being like the last
    ones: normal, with their moving mean and, pair of channels by pair, their variance. RoPE turns the mean on; over the
    next AHEAD tokens that is averaged. Cf. Expected Attention (arXiv 2510.00636), which reads the whole prompt first
    and takes all covariances; this one never looks ahead."""

    tensors = ("mean", "square")
    wants_queries = True
    mean: torch.Tensor | None = None  # (B, heads, width)
    square: torch.Tensor | None = None  # (B, heads, width / 2): of each pair

    def begin(self, keys: torch.Tensor, heads: int) -> None:
        if self.mean is None:
            batch, _, _, width = keys.shape
            self.mean = keys.new_zeros(batch, heads, width, dtype=torch.float32)
            self.square = keys.new_zeros(batch, heads, width // 2, dtype=torch.float32)

    def scores(self, before: Before, positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        assert before.queries is not None
        k, q, scaling = before.keys.float(), before.queries.float(), before.scaling
        self.begin(k, q.shape[1])
        assert self.mean is not None
        assert self.square is not None
        pairs = q.unflatten(-1, (2, -1)).square().sum(-2)
        mean, self.mean = averages(q, self.mean, real)
        square, self.square = averages(pairs, self.square, real)
        heads = k.shape[1]
        mean = mean.unflatten(1, (heads, -1))  # (B, KV heads, queries of each, T, width)
        square = square.unflatten(1, (heads, -1))
        a, b = k.unflatten(-1, (2, -1)).unsqueeze(2).unbind(-2)  # (B, KV heads, 1, T, width / 2)
        x, y = mean.unflatten(-1, (2, -1)).unbind(-2)
        turn = self._turn(k)
        ahead = turn.real * (x * a + y * b) + turn.imag * (x * b - y * a)
        variance = (square - x.square() - y.square()).clamp_min(0) / 2  # of each of a pair's two channels
        spread = variance * (a.square() + b.square())
        return (scaling * ahead.sum(-1) + scaling**2 / 2 * spread.sum(-1)).mean(2)

    def _turn(self, k: torch.Tensor) -> torch.Tensor:
        """What is left of a pair's mean when RoPE has turned it by 1 to AHEAD tokens, on average; complex, (KV heads or
        1, 1, 1, width / 2)."""
        if self.turns is None:
            return torch.ones(1, dtype=torch.complex64, device=k.device)
        steps = torch.arange(1, AHEAD + 1, device=k.device)
        angles = self.turns.to(k.device, torch.float32).unsqueeze(-1) * steps
        return torch.polar(torch.ones_like(angles), angles).mean(-1)[:, None, None]
