"""Speed of two models side by side: prefill and decoding, in alternating runs [ours].

A ratio is the median over rounds of first / second seconds, each round timing both, one after the other and in turns
as to who begins; what a machine does beside it then hits both. Warm-up rounds are not counted.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from kvprune.measure import memory
from kvprune.runtime.cache import GrowingCache

ENOUGH = 20.0  # seconds: a run that takes longer is timed three times, however many rounds were asked for


@dataclass
class Side:
    """One of two models under comparison, with its cache. token_filter: the TokenFilter that it runs under, if any."""

    model: PreTrainedModel
    token_filter: Any = None
    cache: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.no_grad(), nullcontext() if self.token_filter is None else self.token_filter(self.model):
            yield

    def prefill(self, ids: torch.Tensor) -> None:
        """ids (B, T) into a fresh cache."""
        self.cache = GrowingCache(self.model.config)
        self.feed(ids)

    def decode(self, ids: torch.Tensor, steps: int) -> None:
        """`steps` times one token, ids (B, 1) to begin with, then the likeliest."""
        for _ in range(steps):
            ids = self.feed(ids)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Next tokens (B, 1) behind ids (B, T)."""
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    @property
    def weight_bytes_read(self) -> int:
        """Bytes of weights that a step of decoding reads: all but an input embedding of its own."""
        embedding = cast(torch.Tensor, self.model.get_input_embeddings().weight)
        head = cast(torch.Tensor, self.model.get_output_embeddings().weight)
        own = embedding.nbytes if embedding.data_ptr() != head.data_ptr() else 0
        return memory.weight_bytes(self.model) - own

    def kv_bytes_read(self) -> float:
        """Bytes of keys and values that a step reads, as full as the cache is now."""
        rates = self.token_filter.report["per_layer"] if self.token_filter else [0.0] * len(self.cache.layers)
        return sum((1 - rate) * layer_bytes(layer) for rate, layer in zip(rates, self.cache.layers, strict=True))


def layer_bytes(layer: Any) -> int:
    """Bytes of the keys and values that a layer of a cache holds; of a filtered one without the room it keeps free."""
    held = layer.keys.nbytes + layer.values.nbytes
    lengths = getattr(layer, "lengths", None)
    if lengths is None:
        return held
    room = layer.keys.shape[0] * layer.keys.shape[2]
    return int(held * lengths.sum() / room) if room else 0


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
    after: Callable[[Side], Any] = lambda side: None,
) -> Timing:
    """Time work(side) for both in every round, and undo it with after(side); one round before is not counted."""
    found: list[tuple[float, float]] = []
    for i in range(rounds + 1):
        taken = [0.0, 0.0]
        for j in (0, 1) if i % 2 else (1, 0):
            taken[j] = seconds_of(sides[j], partial(work, sides[j]))
        for side in sides:
            after(side)
        if i:
            found.append((taken[0], taken[1]))
        if i >= 3 and sum(taken) > 2 * ENOUGH:
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
