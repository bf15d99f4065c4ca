"""Thresholds: which tokens of a layer are alike enough, so that the asked share of them is taken.

A threshold is kept per layer and sequence and moves at fixed absolute positions, every `block` tokens, so that a prompt
gives the same decisions whether it comes at once, in pieces or token by token. All of this is a few numbers a layer: it
lives on the host, in float64 NumPy arrays with one entry a sequence.

One class a rule, and a line in THRESHOLDS.
"""

from dataclasses import dataclass

import numpy as np

HISTORY = 256  # similarities that are remembered, in each layer and sequence
CATCH_UP = 32  # tokens


@dataclass(frozen=True)
class Rule:
    """What all thresholds are told.

    target: the share to take. first: tokens before this absolute position are never taken. block: tokens between two
    moves. alpha, eta: step and tolerance of `adaptive`; beta: memory of its running rate, per token.
    """

    target: float
    first: int
    block: int
    alpha: float
    beta: float
    eta: float


class Threshold:
    """The state of a layer, entry b of every array for sequence b of the batch."""

    def __init__(self, rule: Rule, batch: int):
        self.rule = rule
        self.level = np.full(batch, np.inf)  # take what is above it; nothing before it is set
        self.rate = np.full(batch, rule.target)
        self.taken = np.zeros(batch)  # of all tokens from `first` on
        self.counted = np.zeros(batch)
        self.block_taken = np.zeros(batch)  # of the block that is not complete yet
        self.block_counted = np.zeros(batch)
        self.history = np.full((batch, HISTORY), np.nan)

    def select(self, sequences: np.ndarray) -> None:
        """Keep these sequences, in this order; one may come twice (beam search)."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[sequences].copy())

    def take(self, similarity: np.ndarray, start: np.ndarray, never: np.ndarray) -> np.ndarray:
        """Which tokens are taken, (B, T) bool.

        similarity (B, T), with NaN behind the last token of a shorter sequence; start (B,): the absolute position of
        each sequence's first token; never (B, T): tokens that must not be taken.
        """
        block = self.rule.block
        batch, tokens = similarity.shape
        if tokens == 1 and not np.isnan(similarity).any():
            return self._step(similarity[:, 0], start, never[:, 0])[:, None]
        shift = start % block
        blocks = int((shift.max() + tokens + block - 1) // block)
        rows, places = np.arange(batch)[:, None], shift[:, None] + np.arange(tokens)
        grid = np.full((batch, blocks * block), np.nan)
        grid[rows, places] = similarity
        forbidden = np.ones((batch, blocks * block), dtype=bool)
        forbidden[rows, places] = never
        lengths = shift + (~np.isnan(similarity)).sum(1)
        taken = np.zeros((batch, blocks * block), dtype=bool)
        for j in range(blocks):
            piece = slice(j * block, (j + 1) * block)
            positions = (start - shift)[:, None] + np.arange(piece.start, piece.stop)
            here = lengths > piece.start
            complete = lengths >= piece.stop
            taken[:, piece] = self._block(grid[:, piece], positions, forbidden[:, piece], complete, here)
        return taken[rows, places]

    def _step(self, similarity: np.ndarray, position: np.ndarray, never: np.ndarray) -> np.ndarray:
        """One token of every sequence, (B,) each: what `_block` does, with as few operations as can be."""
        counted = position >= self.rule.first
        taken = counted & ~never & (similarity > self.level)
        self.block_taken += taken
        self.block_counted += counted
        known = np.flatnonzero(position)  # the first token is its own anchor
        self.history[known, position[known] % HISTORY] = similarity[known]
        complete = (position + 1) % self.rule.block == 0
        if complete.any():
            self._complete(complete, position + 1)
        return taken

    def _block(
        self, similarity: np.ndarray, positions: np.ndarray, never: np.ndarray, complete: np.ndarray, here: np.ndarray
    ) -> np.ndarray:
        """One block, or a part of one: (B, n) each, complete and here (B,)."""
        counted = ~np.isnan(similarity) & (positions >= self.rule.first)
        taken = counted & ~never & (similarity > self.level[:, None])
        self.block_taken += taken.sum(1)
        self.block_counted += counted.sum(1)
        self._remember(similarity, positions)
        over = complete & here
        if over.any():
            self._complete(over, positions[:, -1] + 1)
        return taken

    def _remember(self, similarity: np.ndarray, positions: np.ndarray) -> None:
        rows, columns = np.nonzero(~np.isnan(similarity) & (positions > 0))  # the first token is its own anchor
        self.history[rows, positions[rows, columns] % HISTORY] = similarity[rows, columns]

    def _complete(self, complete: np.ndarray, position: np.ndarray) -> None:
        """The block before absolute `position` (B,) is over for the sequences that `complete` marks."""
        self.taken[complete] += self.block_taken[complete]
        self.counted[complete] += self.block_counted[complete]
        for b in np.flatnonzero(complete & (position >= self.rule.first)):
            self.level[b] = self._move(int(b)) if self.rule.target else np.inf
        self.block_taken[complete] = self.block_counted[complete] = 0.0

    def _move(self, b: int) -> float:
        """The threshold of sequence b from the next block on."""
        raise NotImplementedError

    def _quantile(self, b: int, share: float) -> float:
        """The similarity that `share` of the remembered ones are above: of 0 or less no one can be, of 1 any is."""
        if not 0 < share < 1:
            return np.inf if share <= 0 else -np.inf
        known = self.history[b][~np.isnan(self.history[b])]
        return float(np.quantile(known, 1 - share)) if len(known) else np.inf


class Adaptive(Threshold):
    """A step against the error of the running rate.

    rate <- beta * rate + (1 - beta) * taken; where |rate - target| > eta: level += alpha * (rate - target). Source:
    Token Filtering (arXiv 2512.07090), which has step and tolerance; the running rate, the start at the quantile of the
    warm-up, and the move every block instead of every token are ours.
    """

    def _move(self, b: int) -> float:
        rule = self.rule
        if not np.isfinite(self.level[b]):
            return self._quantile(b, rule.target)
        if self.block_counted[b]:
            memory = rule.beta ** self.block_counted[b]
            mean = self.block_taken[b] / self.block_counted[b]
            self.rate[b] = memory * self.rate[b] + (1 - memory) * mean
        error = self.rate[b] - rule.target
        return float(self.level[b] + (rule.alpha * error if abs(error) > rule.eta else 0.0))


class Quantile(Threshold):
    """The running quantile of the last HISTORY similarities, moved so that what is missing of the target, or too much,
    is made up for within CATCH_UP tokens [ours]."""

    def _move(self, b: int) -> float:
        missing = self.rule.target * self.counted[b] - self.taken[b]
        return self._quantile(b, self.rule.target + missing / CATCH_UP)


class Fixed(Threshold):
    """A level that does not move: for similarities that are uniform in [0, 1], as the random baseline's are."""

    def _move(self, b: int) -> float:
        return 1 - self.rule.target


THRESHOLDS: dict[str, type[Threshold]] = {"adaptive": Adaptive, "quantile": Quantile}
