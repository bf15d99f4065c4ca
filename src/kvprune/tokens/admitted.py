"""A cache layer under late admission, and the attention over it.

Everything that a step of decoding decides by is a tensor where the model is, or a number that the host has counted:
nothing is read back. Two ways lead through the same rule. Where all tokens are real, all sequences decide at the same
time, and places are numbers of the host: that is here. Otherwise (`counts` is a tensor) each sequence is at its own
position, and places are tensors: apart.py.
"""

import torch

from kvprune.tokens.apart import Apart, Shared
from kvprune.tokens.rooms import attention
from kvprune.tokens.signals import Before
from kvprune.tokens.signals.ahead import Ahead


class AdmittedLayer(Apart):
    """See Rooms."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        before: Before,
        real: torch.Tensor | None,
        scaling: float | None,
        shared: Shared | None = None,
    ) -> torch.Tensor:
        """Take new tokens in, and let each attend to what is in the cache when it comes.

        query (B, heads, T, width); key, value (B, KV heads, T, width); real (B, T) bool, None where all are; shared: of
        the layers of one call -> (B, T, heads, width).
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if real is not None and self.counts is None:
            self._score_waiting(self.seen)
            self.counts = torch.full((len(key),), self.seen, device=key.device)
        tokens = key.shape[2]
        if self.counts is None:
            outputs = self._attend_together(query, key, value, before, scaling)
        else:
            shared = shared or Shared()
            if shared.real is None:
                shared.real = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if real is None else real
                shared.positions = self.counts.unsqueeze(1) + shared.real.cumsum(1) - 1
            assert shared.positions is not None
            new = (key, value, self.signal.scores(before, shared.positions, real))
            attend = self._attend_one if tokens == 1 else self._attend_apart
            outputs = attend(query, new, shared, scaling)
        self.seen += tokens
        return outputs.transpose(1, 2)

    # All sequences together

    def _attend_together(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        before: Before,
        scaling: float | None,
    ) -> torch.Tensor:
        """(B, heads, T, width). A piece at a time: up to the next decision."""
        tokens, outputs, start = key.shape[2], [], 0
        ahead = Ahead(before, self.signal, self.seen)
        filled = self._filled(self.seen) - self.away
        self._make_room(filled, self._needed(self.seen + tokens))
        assert self.key_room is not None
        assert self.value_room is not None
        while start < tokens:
            seen = self.seen + start
            if seen % self.rule.block == 0:
                self._score_waiting(seen)
                filled = self._decide_together(seen)
            piece = slice(start, min(start + self.rule.block - seen % self.rule.block, tokens))
            place = slice(filled, filled + piece.stop - start)
            self.key_room[:, :, place], self.value_room[:, :, place] = key[:, :, piece], value[:, :, piece]
            if seen % self.rule.block == 0 and piece.stop - piece.start == self.rule.block:
                self.scores[:, :, place] = ahead.scores(piece)
            else:
                self.waiting.append(before if tokens == 1 else before.part(piece))
            filled, start = place.stop, piece.stop
            self.keys, self.values = self.key_room[:, :, :filled], self.value_room[:, :, :filled]
            keys, values = self._read()
            mask = _causal(keys.shape[2], piece.stop - piece.start, self.device) if key.shape[2] > 1 else None
            outputs.append(attention(query[:, :, piece], keys, values, mask, scaling))
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    def _score_waiting(self, seen: int) -> None:
        """Score the last of `seen` tokens that have no score yet: a block at once, which costs a step less than each
        token by itself."""
        if self.waiting:
            block, filled = Before.joined(self.waiting), self._filled(seen) - self.away
            tokens = block.keys.shape[2]
            positions = torch.arange(seen - tokens, seen, device=self.device).unsqueeze(0)
            self.scores[:, :, filled - tokens : filled] = self.signal.scores(block, positions, None)
            self.waiting = []

    def _decide_together(self, seen: int) -> int:
        """Drop tokens of the block that is due, if one is; how many tokens are left in the rooms."""
        schedule, filled = self.schedule, self._filled(seen) - self.away
        before, kept = schedule.kept(seen - 1) if seen else 0, schedule.kept(seen)
        if schedule.decided(seen) == (schedule.decided(seen - 1) if seen else 0):
            return filled
        block = slice(before - self.away, before - self.away + self.rule.block)
        chosen = self._ranked(self.scores[:, :, block], self._sinks(seen))[..., : kept - before].sort(-1).values
        return self._take(chosen, block, filled)

    def _take(self, chosen: torch.Tensor, block: slice, filled: int) -> int:
        """Keep the chosen tokens (B, KV heads, n) of a block in the rooms, in place; how many are left there."""
        n = chosen.shape[2]
        if n == block.stop - block.start:
            return filled
        for room in (self.key_room, self.value_room, self.scores.unsqueeze(-1)):
            assert room is not None
            index = chosen.unsqueeze(-1).expand(-1, -1, -1, room.shape[-1])
            room[:, :, block.start : block.start + n] = room[:, :, block].gather(2, index)
            room[:, :, block.start + n : filled - block.stop + block.start + n] = room[
                :, :, block.stop : filled
            ].clone()
        return filled - block.stop + block.start + n

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that are there."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _needed(self, number: int) -> int:
        """How many tokens the rooms must hold, up to so many tokens of text."""
        return self.schedule.most(number)


def _causal(stored: int, new: int, device: torch.device) -> torch.Tensor:
    """(new, stored): the last tokens, which are new, see everything up to themselves."""
    slots = torch.arange(stored, device=device)
    return slots <= slots[stored - new :].unsqueeze(-1)
