"""Speed of two models side by side: prefill and decoding, in alternating runs [ours].

A ratio is the median over rounds of first / second seconds, each round timing both, one after the other and in turns
as to who begins; what a machine does beside it then hits both. What comes first, to warm up, is not counted.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprune.measure import memory
from kvprune.measure.context import is_hybrid, slides
from kvprune.models.family import family_of
from kvprune.runtime.cache import GrowingCache, GrowingLayer
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import is_quantized, quantized_cache
from kvprune.tokens.cache import decides_on

ENOUGH = 120.0  # seconds of timing, behind which no further round begins


@dataclass
class Side:
    """One of two models under comparison, with its cache. token_filter: the TokenFilter that it runs under, if any;
    kv_bits: those of a quantised cache."""

    model: PreTrainedModel
    token_filter: Any = None
    kv_bits: int | None = None
    cache: Any = None
    filled: Any = None  # the cache with the prompt in it, where it cannot be cut back to that

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.no_grad(), nullcontext() if self.token_filter is None else self.token_filter(self.model):
            yield

    def prefill(self, ids: torch.Tensor) -> None:
        """ids (B, T) into a fresh cache."""
        config = self.model.config
        self.cache = GrowingCache(config) if self.kv_bits is None else quantized_cache(config, self.kv_bits)
        self.filled = None
        self.feed(ids)

    def decode(self, ids: torch.Tensor, steps: int) -> None:
        """`steps` times one token, ids (B, 1) to begin with, then the likeliest."""
        for _ in range(steps):
            ids = self.feed(ids)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Next tokens (B, 1) behind ids (B, T)."""
        return self.model(ids, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1:].argmax(-1)

    def rewind(self, context: int) -> None:
        """Back to the cache with `context` tokens of prompt in it; windows, filters and states forget and bits
        round, so theirs is copied; what is quantised is replaced, never written to."""
        if all(type(layer) is GrowingLayer for layer in self.cache.layers):
            surplus = self.cache.get_seq_length() - context
            if surplus:
                self.cache.crop(-surplus)
            return
        self.filled = self.cache if self.filled is None else self.filled
        self.cache = copy.copy(self.filled)
        self.cache.layers = [copy.copy(i) if is_quantized(i) else copy.deepcopy(i) for i in self.filled.layers]

    @property
    def copies(self) -> bool:
        """Whether `rewind` copies what it goes back to."""
        config = self.model.config
        return self.token_filter is not None or slides(config) or is_hybrid(config)

    def forget(self) -> None:
        self.cache = self.filled = None

    def bytes_read(self) -> float:
        """Bytes that a step of decoding reads, with the cache as it is: weights, keys and values."""
        return self.weight_bytes_read() + self.kv_bytes_read()

    def weight_bytes_read(self) -> float:
        """Weights of them: under a filter no Q and O, nor what merged heads have between them, where all sequences
        skip, each for itself."""
        layers, read = self.cache.layers, float(memory.weights_read_bytes(self.model))
        family = family_of(self.model.config.model_type)
        blocks = family.blocks(self.model)
        for i, rate in self._rates().items():
            attention = getattr(blocks[i], family.attention)
            skipped = [getattr(attention, name, None) for name in (family.q, family.o, "q_mix", "o_mix")]
            size = sum(module.weight.nbytes for module in skipped if module is not None)
            read -= rate ** layers[i].keys.shape[0] * size
        return read

    def kv_bytes_read(self) -> float:
        """Keys and values of them; under a filter those of the share of tokens that do not skip."""
        rates = self._rates()
        return sum((1 - rates.get(i, 0.0)) * memory.kv_bytes(layer) for i, layer in enumerate(self.cache.layers))

    def _rates(self) -> dict[int, float]:
        """The share of tokens whose rows are not computed, of the layers in which some skip."""
        f = self.token_filter
        is_whole = self.kv_bits is None and decides_on(self.model.device)  # then all rows are, whatever skips
        return {} if f is None or is_whole else f.rates(len(self.cache.layers))


@dataclass(frozen=True)
class Timing:
    """Seconds of all rounds, (first, second) in each."""

    rounds: list[tuple[float, float]]

    @property
    def seconds(self) -> tuple[float, float]:
        """Medians."""
        return statistics.median(a for a, _ in self.rounds), statistics.median(b for _, b in self.rounds)

    @property
    def ratios(self) -> list[float]:
        """first / second of every round, the least first."""
        return sorted(a / b for a, b in self.rounds)

    @property
    def ratio(self) -> float:
        """Their median: how many times as fast the second is."""
        return statistics.median(self.ratios)


def alternate(
    sides: tuple[Side, Side],
    work: Callable[[Side], Any],
    rounds: int,
    before: Callable[[Side], Any] = lambda side: None,
    warm: bool = False,
) -> Timing:
    """Time work(side) for both in every round, behind an untimed before(side). One round more is not counted, unless
    both are warm: they have done such work already. Long work gets fewer rounds, at least one: see ENOUGH."""
    found: list[tuple[float, float]] = []
    begin, uncounted = time.perf_counter(), 0 if warm else 1
    for i in range(rounds + uncounted):
        taken = [0.0, 0.0]
        for j in (0, 1) if i % 2 else (1, 0):
            before(sides[j])
            taken[j] = seconds_of(sides[j], partial(work, sides[j]))
        if i >= uncounted:
            found.append((taken[0], taken[1]))
            if time.perf_counter() - begin > ENOUGH:
                break
    return Timing(found)


def seconds_of(side: Side, work: Callable[[], Any]) -> float:
    """Wall time of work(), on a GPU until all that it queued is done."""
    device = side.model.device
    with side.running():
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
