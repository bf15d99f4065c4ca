"""Scores of a long text."""

import torch

from kvprune.tokens.signals.base import Before, Signal

AT_ONCE = 1024  # tokens of a long text that are scored together


class Ahead:
    """Scores of a long text's whole blocks, for many of them at once: a GPU then has fewer, larger things to do."""

    def __init__(self, before: Before, signal: Signal, seen: int):
        self.before, self.signal, self.seen = before, signal, seen
        self.first = self.end = 0
        self.found: torch.Tensor | None = None

    def scores(self, piece: slice) -> torch.Tensor:
        """Of one block (B, KV heads, block); blocks come in order, none is left out."""
        if piece.start >= self.end:
            tokens, block = self.before.keys.shape[2], piece.stop - piece.start
            whole = (tokens - piece.start) // block * block
            self.first, self.end = piece.start, piece.start + min(whole, max(AT_ONCE // block, 1) * block)
            positions = torch.arange(self.seen + self.first, self.seen + self.end, device=self.before.keys.device)
            part = self.before.part(slice(self.first, self.end))
            self.found = self.signal.scores(part, positions.unsqueeze(0), None)
        assert self.found is not None
        return self.found[:, :, piece.start - self.first : piece.stop - self.first]
