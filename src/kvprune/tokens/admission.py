"""Late admission: which tokens stay in the cache, as a rule of positions and scores [ours].

Every token is attended to at first. At each multiple of `block` tokens, the block that ended `window` tokens ago is
decided: its tokens with the highest scores stay, as many as the running budget leaves. Nothing depends on how the text
came (at once, in pieces, token by token) or on the other sequences of a batch, and how many stay depends on the
position alone, so that all KV heads, layers and sequences keep equally many.
"""

import math
from dataclasses import dataclass
from typing import Any

from kvprune.errors import BadOption
from kvprune.tokens.signals import SIGNALS


@dataclass(frozen=True)
class Admission:
    """keep: share of the KV bytes that is kept, over 0 and at most 1. block: tokens that are decided together. window:
    tokens behind a block when it is decided, a multiple of block. sinks: first tokens, which stay. signal: what scores
    a token, a name of SIGNALS; seed: of "random". length: tokens of text to make room for at once, so that every step
    of decoding has the same shapes; None: the cache grows. Raises BadOption."""

    keep: float
    block: int = 64
    window: int = 64
    sinks: int = 4
    signal: str = "key-distance"
    seed: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.keep) or not 0 < self.keep <= 1:
            raise BadOption(f"keep must be a share of the KV bytes, above 0 and at most 1, not {self.keep!r}")
        for name, least in {"block": 1, "window": 1, "sinks": 0, "seed": 0}.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise BadOption(f"{name} must be a whole number, at least {least}, not {value!r}")
        if self.window % self.block:
            raise BadOption(f"window must be a multiple of block ({self.block}), not {self.window}")
        if self.sinks > self.block:
            raise BadOption(f"sinks must be at most a block ({self.block}), not {self.sinks}")
        if self.length is not None and (not _is_whole(self.length) or self.length < self.block + self.window):
            raise BadOption(
                f"length must be a whole number of tokens, at least block and window ({self.block + self.window}), not "
                f"{self.length!r}"
            )
        if self.signal not in SIGNALS:
            raise BadOption(f"unknown signal {self.signal!r}; choose {', '.join(SIGNALS)}")


class Schedule:
    """How many tokens are kept of those that are decided: numbers of positions alone."""

    def __init__(self, rule: Admission):
        self.rule = rule
        self._kept, self._most = [0], [0]  # behind the decision at each multiple of block, and up to it

    def kept(self, number: int) -> int:
        """Of the decided tokens when `number` have been seen and the decision there, if any, is made."""
        rule = self.rule
        while len(self._kept) <= number // rule.block:
            seen = len(self._kept) * rule.block
            before = self._kept[-1]
            if seen < rule.window + rule.block:
                self._kept.append(before)
                continue
            least = rule.sinks if seen == rule.window + rule.block else 0
            # A share like 0.7 is a rounded number: 0.7 * 640 is 448
            budget = math.floor(rule.keep * seen + 1e-6) - rule.window - before
            self._kept.append(before + min(max(budget, least), rule.block))
        return self._kept[number // rule.block]

    def decided(self, number: int) -> int:
        """Tokens that are decided when `number` have been seen."""
        return max(number // self.rule.block * self.rule.block - self.rule.window, 0)

    def stored(self, number: int) -> int:
        """Tokens in the cache, kept and undecided ones."""
        return self.kept(number) + number - self.decided(number)

    def most(self, number: int) -> int:
        """The most that have been stored at any time up to `number` tokens, just before a decision."""
        block = self.rule.block
        while len(self._most) <= number // block:
            end = len(self._most) * block
            self._most.append(max(self._most[-1], self.stored(end - 1) + 1))
        return max(self._most[number // block], self.stored(number))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
