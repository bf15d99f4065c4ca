"""Thresholds: which tokens of a layer are alike enough, so that the asked share of them is taken.

A threshold is kept per layer and sequence and moves at fixed absolute positions, every `block` tokens, so that a prompt
gives the same decisions whether it comes at once, in pieces or token by token. All of this is a few float64 numbers a
sequence, in tensors that stand where decisions are made; what a token does to them is arithmetic on tensors alone.

One class a rule, and a line in THRESHOLDS.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

HISTORY = 256  # similarities that are remembered, in each layer and sequence
CATCH_UP = 32  # tokens


@dataclass(frozen=True)
class Rule:
    """What all thresholds are told.

    target: the share to take. first: tokens before this absolute position, a multiple of block, are never taken. block:
    tokens between two moves. alpha, eta: step and tolerance of `adaptive`; beta: memory of its running rate, per token.
    """

    target: float
    first: int
    block: int
    alpha: float
    beta: float
    eta: float


class Piece(NamedTuple):
    """Some tokens of a call, of every sequence those of one block, or a part of it.

    free (B, n) bool: may be taken; slot (B, n): where each is remembered, HISTORY for nowhere; over (B,) bool: the
    block ends with them; behind (B,): the absolute position that it ends before; moves: whether some block may end, so
    False only where the host knows.
    """

    free: torch.Tensor
    slot: torch.Tensor
    over: torch.Tensor
    behind: torch.Tensor
    moves: bool


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call stand in blocks, worked out once for all layers.

    pieces: one after the other. index (B, T): the column of each token in all pieces side by side, and the one behind
    the last for padding; None: one piece, which holds the tokens as they are.
    """

    pieces: list[Piece]
    index: torch.Tensor | None = None

    @classmethod
    def of(
        cls, real: torch.Tensor, start: torch.Tensor, never: torch.Tensor, first: int, block: int, on_host: bool
    ) -> "Places":
        """real (B, T) bool: what is no padding; start (B,): the absolute position of each sequence's next token; never
        (B, T): tokens that must not be taken; first, block: of the rule; on_host: whether values may be looked at, as
        they must for more than one token."""
        if real.shape[1] > 1:
            return cls._of_many(real, start, never, first, block)
        position = start.unsqueeze(1)
        free = real & (position >= first) & ~never
        slot = torch.where(real & (position > 0), position % HISTORY, HISTORY)  # the first token is its own anchor
        behind = start + 1
        over = real[:, 0] & (behind % block == 0)
        return cls([Piece(free, slot, over, behind, not on_host or bool(over.any()))])

    @classmethod
    def _of_many(cls, real: torch.Tensor, start: torch.Tensor, never: torch.Tensor, first: int, block: int) -> "Places":
        shift, numbers = start % block, real.sum(1)
        stop = shift + numbers
        width = max(-(-int(stop.max()) // block), 1) * block
        index = torch.where(real, shift.unsqueeze(1) + real.cumsum(1) - 1, width)
        columns = torch.arange(width)
        position = (start - shift).unsqueeze(1) + columns
        is_there = (columns >= shift.unsqueeze(1)) & (columns < stop.unsqueeze(1))
        forbidden = torch.zeros(len(real), width + 1, dtype=torch.bool).scatter(1, index, never)[:, :width]
        free = is_there & (position >= first) & ~forbidden
        behind = position[:, block - 1 :: block] + 1
        last = torch.minimum(behind, (start + numbers).unsqueeze(1)).repeat_interleave(block, 1)
        remembered = is_there & (position > 0) & (position >= last - HISTORY)
        slot = torch.where(remembered, position % HISTORY, HISTORY)
        over = behind <= (start + numbers).unsqueeze(1)
        of_blocks = free.split(block, 1), slot.split(block, 1), over.unbind(1), behind.unbind(1), over.any(0).tolist()
        return cls([Piece(*piece) for piece in zip(*of_blocks, strict=True)], index)

    def to(self, device: torch.device) -> "Places":
        moved = [
            Piece(p.free.to(device), p.slot.to(device), p.over.to(device), p.behind.to(device), p.moves)
            for p in self.pieces
        ]
        return replace(self, pieces=moved, index=None if self.index is None else self.index.to(device))


class Threshold:
    """The state of a layer, entry b of every tensor for sequence b of the batch. Tensors are replaced, not written to:
    some may have been made in inference mode."""

    def __init__(self, rule: Rule, batch: int, device: torch.device | None = None):
        zeros = torch.zeros(batch, dtype=torch.float64, device=device)
        self.rule = rule
        self.level = zeros + torch.inf  # take what is above it; nothing before it is set
        self.rate = zeros + rule.target
        self.taken = zeros  # so far
        self.before = zeros  # of them, up to the last block's end
        self.history = torch.full((batch, HISTORY + 1), torch.inf, dtype=torch.float64, device=device)

    def select(self, sequences: torch.Tensor) -> None:
        """Keep these sequences, in this order; one may come twice (beam search)."""
        self._replace(lambda state: state.index_select(0, sequences))

    def to(self, device: torch.device) -> None:
        if self.level.device != device:
            self._replace(lambda state: state.to(device))

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, change(value))

    def take(self, similarity: torch.Tensor, places: Places) -> torch.Tensor:
        """Which tokens are taken, (B, T) bool; similarity (B, T) float64."""
        if places.index is None:
            return self._piece(similarity, places.pieces[0])
        width = sum(piece.free.shape[1] for piece in places.pieces)
        grid = similarity.new_zeros(len(similarity), width + 1).scatter(1, places.index, similarity)
        parts = grid[:, :width].split(places.pieces[0].free.shape[1], 1)
        taken = [self._piece(part, piece) for part, piece in zip(parts, places.pieces, strict=True)]
        nothing = torch.zeros_like(taken[0][:, :1])
        return torch.cat((*taken, nothing), 1).gather(1, places.index)

    def _piece(self, similarity: torch.Tensor, piece: Piece) -> torch.Tensor:
        taken = piece.free & (similarity > self.level.unsqueeze(1))
        self.taken = self.taken + taken.sum(1)
        self.history = self.history.scatter(1, piece.slot, similarity)
        if piece.moves and self.rule.target:
            moves = piece.over & (piece.behind >= self.rule.first)
            self.level = torch.where(moves, self._moved(moves, piece.behind), self.level)
            self.before = torch.where(piece.over, self.taken, self.before)
        return taken

    def _moved(self, moves: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """The thresholds (B,) from absolute position `behind` (B,) on; those of sequences that `moves` (B,) leaves out
        are not used."""
        raise NotImplementedError

    def _quantile(self, share: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """The similarity that `share` (B,) of the remembered ones are above: of 0 or less no one can be, of 1 any is;
        behind (B,): how many tokens there have been, of which the first is not remembered."""
        ranked = self.history[:, :HISTORY].sort(1).values  # what is not known is infinite
        last = (behind - 1).clamp(max=HISTORY) - 1
        rank = (1 - share).clamp(0, 1) * last.clamp(min=0)
        low = rank.floor()
        near = torch.stack((low, (low + 1).minimum(last)), 1).clamp(min=0).long()
        below, above = ranked.gather(1, near).unbind(1)
        found = torch.lerp(below, above, rank - low)
        found = found.masked_fill((share <= 0) | (last < 0), torch.inf)
        return found.masked_fill(share >= 1, -torch.inf)


class Adaptive(Threshold):
    """A step against the error of the running rate.

    rate <- beta * rate + (1 - beta) * taken; where |rate - target| > eta: level += alpha * (rate - target). Source:
    Token Filtering (arXiv 2512.07090), which has step and tolerance; the running rate, the start at the quantile of the
    warm-up, and the move every block instead of every token are ours.
    """

    def _moved(self, moves: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        rule, has_begun = self.rule, self.level.isfinite()
        memory = rule.beta**rule.block
        rate = memory * self.rate + (1 - memory) * (self.taken - self.before) / rule.block
        self.rate = torch.where(moves & has_begun, rate, self.rate)
        error = self.rate - rule.target
        stepped = self.level + torch.where(error.abs() > rule.eta, rule.alpha * error, 0.0)
        return torch.where(has_begun, stepped, self._quantile(torch.full_like(error, rule.target), behind))


class Quantile(Threshold):
    """The running quantile of the last HISTORY similarities, moved so that what is missing of the target, or too much,
    is made up for within CATCH_UP tokens [ours]."""

    def _moved(self, moves: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        missing = self.rule.target * (behind - self.rule.first).double() - self.taken
        return self._quantile(self.rule.target + missing / CATCH_UP, behind)


class Fixed(Threshold):
    """A level that does not move: for similarities that are uniform in [0, 1], as the random baseline's are."""

    def _moved(self, moves: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        return torch.full_like(self.level, 1 - self.rule.target)


THRESHOLDS: dict[str, type[Threshold]] = {"adaptive": Adaptive, "quantile": Quantile}
