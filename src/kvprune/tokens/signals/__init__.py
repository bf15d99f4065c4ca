"""What scores a token for late admission, one file each. A signal sees every token once, in order, and keeps what it
needs of the past in tensors where the model is."""

from kvprune.tokens.signals.base import Before, Signal
from kvprune.tokens.signals.expected_attention import ExpectedAttention
from kvprune.tokens.signals.key_distance import KeyDistance
from kvprune.tokens.signals.product import Product
from kvprune.tokens.signals.random import Random

SIGNALS: dict[str, type[Signal]] = {
    "key-distance": KeyDistance,
    "expected-attention": ExpectedAttention,
    "product": Product,
    "random": Random,
}

__all__ = ["SIGNALS", "Before", "Signal"]
