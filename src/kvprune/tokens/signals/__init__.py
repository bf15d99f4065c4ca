"""What scores a token for late admission, one file each. A signal sees every token once, in order, and keeps what it
needs of the past in tensors where the model is."""

from kvprune.tokens.signals.base import Signal
from kvprune.tokens.signals.key_distance import KeyDistance
from kvprune.tokens.signals.random import Random

SIGNALS: dict[str, type[Signal]] = {"key-distance": KeyDistance, "random": Random}

__all__ = ["SIGNALS", "Signal"]
