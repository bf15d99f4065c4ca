"""Where in a text each seed reads: stretches of so many tokens, apart from each other where the text is long enough.

Three layouts are tried, and the first that fits is taken: a stretch at the beginning of each of `seeds` equal parts (so
that seeds see different subjects, and sizes begin at the same places); one right behind the other; spread evenly over
the text, overlapping. Stretches begin and end at whole words, whole conversations, or whole windows that were given.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import TextTooShort
from kvprune.text.conversations import stream
from kvprune.text.corpus import Split
from kvprune.text.given import Conversations, Documents, Text, Tokens
from kvprune.text.windows import token_ids

_LONG_WORD = 1000  # characters, behind which a stretch may end in the middle of one
_SPACE, _WORD = re.compile(r"\s"), re.compile(r"\S")


class Pieces:
    """A text as `length` pieces, of which a stretch is made: characters, of words that stay whole.

    unit: what one of them is called; per_token: how many to begin with in search of a token.
    """

    unit, per_token = "character", 6

    def __init__(self, text: Text, tokenizer: PreTrainedTokenizerBase, split: Split):
        self.text: Any = text
        self.tokenizer = tokenizer
        self.all: Any = self._all(split)
        self.length = len(self.all)

    def _all(self, split: Split) -> Any:
        return self.text.read(split)

    @property
    def content(self) -> bytes:
        """By which two texts are told apart."""
        return self.all.encode()

    def ids(self, start: int, end: int) -> torch.Tensor:
        """Of the pieces from `start` to before `end`, (n,). Raises UnknownText and BadOption."""
        return token_ids(self.all[start:end], self.tokenizer)

    def first(self, at: int) -> int:
        """Where a stretch may begin, at `at` or later."""
        return _word_start(self.all, at)

    def end(self, at: int) -> int:
        """Where one may end, at `at` or later."""
        return _word_end(self.all, at)

    def behind(self, start: int) -> Text:
        """The text from `start` on, for `prune` to read as much of it as it wants."""
        return Documents(self.text.known_as, documents=(self.all[start:],))


class WholePieces(Pieces):
    """Of pieces that are not divided."""

    per_token = 1

    @property
    def content(self) -> bytes:
        return self.text.content

    def first(self, at: int) -> int:
        return at

    def end(self, at: int) -> int:
        return min(at, self.length)


class Chats(WholePieces):
    """Of conversations."""

    unit = "conversation"

    def _all(self, split: Split) -> Any:
        self.of = cache(lambda number: stream(self.text.conversations[number : number + 1], self.tokenizer, None))
        return self.text.conversations

    def ids(self, start: int, end: int) -> torch.Tensor:
        return torch.cat([self.of(number) for number in range(start, end)])

    def behind(self, start: int) -> Text:
        return replace(self.text, conversations=self.all[start:])


class Windows(WholePieces):
    """Of token ids, or windows of them."""

    def _all(self, split: Split) -> Any:
        self.unit = "token" if self.text.row is None else "window"
        return self.text.given.view(-1, self.text.row or 1)

    def ids(self, start: int, end: int) -> torch.Tensor:
        return self.all[start:end].flatten()

    def behind(self, start: int) -> Text:
        return replace(self.text, given=self.all[start:].flatten())


def pieces_of(text: Text, tokenizer: PreTrainedTokenizerBase, split: Split = "valid") -> Pieces:
    """split: of a named text. Raises UnknownText for what cannot be read."""
    kind = Chats if isinstance(text, Conversations) else Windows if isinstance(text, Tokens) else Pieces
    return kind(text, tokenizer, split)


@dataclass(frozen=True)
class Stretches:
    """spans: (first piece, one past the last) by seed. overlap: the largest share of a stretch that its neighbour has
    too, in pieces; 0 if none has any."""

    spans: list[tuple[int, int]]
    overlap: float


def find_stretches(text: Pieces, tokens: int, seeds: int, what: str) -> Stretches:
    """A stretch of at least `tokens` tokens for each seed; that of seed 0 is the beginning of the text.

    No more of the text is tokenised than is needed. Raises TextTooShort if it has fewer than `tokens`, UnknownText if
    it is empty.
    """
    length = text.length

    def enough(start: int, end: int) -> bool:
        return len(text.ids(start, end)) >= tokens if start < end else False

    def end_of(start: int) -> int | None:
        """The end of the shortest stretch from `start` on."""
        guess = tokens * text.per_token
        while not enough(start, text.end(start + guess)):
            if start + guess >= length:
                return None
            guess *= 2
        return text.end(_first(start, start + guess, lambda at: enough(start, text.end(at))))

    end = end_of(0)
    if end is None:
        count = len(text.ids(0, length))
        raise TextTooShort(f"{what} has {count} tokens, but {tokens} are needed; give a longer text or ask for fewer")

    apart = [0, *(text.first(length * seed // seeds) for seed in range(1, seeds))]
    spans = _spans(apart, end_of)
    if spans is not None and _overlap(spans) == 0:
        return Stretches(spans, 0.0)

    behind: list[tuple[int, int]] = [(0, end)]
    while len(behind) < seeds:
        start = text.first(behind[-1][1])
        end = end_of(start)
        if end is None:
            break
        behind.append((start, end))
    else:
        return Stretches(behind, 0.0)

    last = _first(0, length, lambda at: not enough(text.first(at), length)) - 1
    spans = _spans([0, *(text.first(last * seed // (seeds - 1)) for seed in range(1, seeds))], end_of)
    assert spans is not None  # from `last` on, and so from before it, there are enough tokens
    return Stretches(spans, _overlap(spans))


def _spans(starts: list[int], end_of: Callable[[int], int | None]) -> list[tuple[int, int]] | None:
    """Each start with its end; None if the text ends too early for one."""
    spans = []
    for start in starts:
        end = end_of(start)
        if end is None:
            return None
        spans.append((start, end))
    return spans


def _overlap(spans: list[tuple[int, int]]) -> float:
    shared = [max(end - following, 0) / (end - start) for (start, end), (following, _) in pairwise(spans)]
    return max(shared, default=0.0)


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first number at which `holds` becomes true, which is false at `low` and true at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _word_end(text: str, at: int) -> int:
    """Where the word that `at` lies in ends; `at` itself if that is too far."""
    found = _SPACE.search(text, at, at + _LONG_WORD)
    if found is not None:
        return found.start()
    return len(text) if at + _LONG_WORD >= len(text) else at


def _word_start(text: str, at: int) -> int:
    """Where the first word that begins at `at` or later begins."""
    if 0 < at < len(text) and not text[at - 1].isspace():
        at = _word_end(text, at)
    found = _WORD.search(text, at)
    return len(text) if found is None else found.start()
