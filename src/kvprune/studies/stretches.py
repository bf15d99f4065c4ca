"""Where in a text each seed reads: stretches of so many tokens, apart from each other where the text is long enough.

Three layouts are tried, and the first that fits is taken: a stretch at the beginning of each of `seeds` equal parts (so
that seeds see different subjects, and sizes begin at the same places); one right behind the other; spread evenly over
the text, overlapping. Stretches begin and end at whole words.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from kvprune.errors import TextTooShort
from kvprune.text.windows import token_ids

_FIRST_GUESS = 6  # characters per token, to begin with
_LONG_WORD = 1000  # characters, behind which a stretch may end in the middle of one
_SPACE, _WORD = re.compile(r"\s"), re.compile(r"\S")


@dataclass(frozen=True)
class Stretches:
    """spans: (first character, one past the last) by seed. overlap: the largest share of a stretch that its neighbour
    has too, in characters; 0 if none has any."""

    spans: list[tuple[int, int]]
    overlap: float


def find_stretches(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, seeds: int, what: str) -> Stretches:
    """A stretch of at least `tokens` tokens for each seed; that of seed 0 is the beginning of the text.

    No more of the text is tokenised than is needed. Raises TextTooShort if it has fewer than `tokens`, UnknownText if
    it is empty.
    """

    def enough(start: int, end: int) -> bool:
        return len(token_ids(text[start:end], tokenizer)) >= tokens if start < end else False

    def end_of(start: int) -> int | None:
        """The end of the shortest stretch from `start` on."""
        guess = tokens * _FIRST_GUESS
        while not enough(start, _word_end(text, start + guess)):
            if start + guess >= len(text):
                return None
            guess *= 2
        return _word_end(text, _first(start, start + guess, lambda at: enough(start, _word_end(text, at))))

    end = end_of(0)
    if end is None:
        count = len(token_ids(text, tokenizer))
        raise TextTooShort(f"{what} has {count} tokens, but {tokens} are needed; give a longer text or ask for fewer")

    apart = [0, *(_word_start(text, len(text) * seed // seeds) for seed in range(1, seeds))]
    spans = _spans(apart, end_of)
    if spans is not None and _overlap(spans) == 0:
        return Stretches(spans, 0.0)

    behind: list[tuple[int, int]] = [(0, end)]
    while len(behind) < seeds:
        start = _word_start(text, behind[-1][1])
        end = end_of(start)
        if end is None:
            break
        behind.append((start, end))
    else:
        return Stretches(behind, 0.0)

    last = _first(0, len(text), lambda at: not enough(_word_start(text, at), len(text))) - 1
    spans = _spans([0, *(_word_start(text, last * seed // (seeds - 1)) for seed in range(1, seeds))], end_of)
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
