"""What a cut leaves of a model: how many numbers it holds, and a step of decoding reads. No weights are read."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvprune.channels.choice.merging import is_factored
from kvprune.channels.widths.asked import ratio_left
from kvprune.measure.memory import parameters, unread_embeddings
from kvprune.models.attention import AttentionShape
from kvprune.models.view import ModelView


class Cut(NamedTuple):
    """The fraction of the KV bytes that goes, how many KV heads become one, and the mean width of such a head in the
    layers that have some; of the narrowest dense heads, where layers differ, and of others in proportion."""

    ratio: float
    merge: int
    width: float


DENSE = Cut(0.0, 1, math.nan)  # of the width that it has


@dataclass(frozen=True)
class Weights:
    """How many numbers a model has: all of the dense one's, those of an input embedding of which a step reads but a
    row, and what its attention is made of; biases: which of Q, K, V and O have one. with_values: the layers with a
    projection that is V's alone. dropped: how many blocks go, and with them these many numbers. ranks: that share
    it."""

    all: int
    unread: int
    shape: AttentionShape
    biases: frozenset[str]
    is_portable: bool
    is_normed: bool
    has_normed_values: bool
    is_gated: bool
    with_values: frozenset[int]
    dropped: tuple[int, int]
    ranks: int

    @classmethod
    def of(cls, config: PreTrainedConfig, is_portable: bool, drop_blocks: int = 0, ranks: int = 1) -> "Weights":
        """Counted on a model without memory."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        view = ModelView(lm)
        biases = frozenset(name for name in "qkvo" if view.attention[0].has_bias(name))
        unread = sum(table.numel() for table in unread_embeddings(view.lm))
        ratio_left(1.0, view.shape.layers, drop_blocks)  # refuses too many
        smallest = sorted(parameters(view.blocks[number]) for number in view.attention_layers)[:drop_blocks]
        dropped = drop_blocks, sum(smallest) - drop_blocks * view.shape.hidden  # a constant stays
        first = view.attention[0]
        norms = first.is_normed, first.has_normed_values, first.is_gated
        values = frozenset(
            i
            for i, a in enumerate(view.attention)
            if a.source is None and (view.family.qkv or a.projection("v") is not a.projection("k"))
        )
        return cls(parameters(view.lm), unread, view.shape, biases, is_portable, *norms, values, dropped, ranks)

    def kept(self, cut: Cut) -> float:
        """Numbers of the pruned model that a rank holds, all its attention at the mean width: widths around it never
        make more. What does not belong to a KV head is shared evenly."""
        blocks, numbers = (0, 0) if cut is DENSE else self.dropped
        gained = [self._gained(layer, cut) for layer in range(self.shape.layers)]
        return (self.all - numbers + math.fsum(gained[blocks:])) / self.ranks  # all alike, where some are dropped

    def read(self, cut: Cut) -> float:
        """Numbers that a rank reads in a step of decoding."""
        return self.kept(cut) - self.unread / self.ranks

    def _gained(self, layer: int, cut: Cut) -> float:
        """By how many numbers one layer grows, on all ranks together."""
        shape = self.shape.of(layer)
        times = copies(shape.kv_heads // cut.merge, self.ranks)
        dense = self._dense(layer, shape, 1)
        if cut is DENSE:
            return self._dense(layer, shape, times) - dense
        width = cut.width * shape.head_dim / self.shape.head_dims[0]
        has_keys = self.shape.source(layer) == layer
        factored = not self.is_portable and is_factored(shape, width)
        has = {"k": has_keys, "v": has_keys}
        pruned = self._attention(shape, shape.kv_heads // cut.merge, width, factored, has, times)
        if "v" in self.biases and "o" not in self.biases and not self.has_normed_values:
            pruned += shape.hidden  # what V's bias loses is a constant behind O
        return pruned - dense

    def _dense(self, layer: int, shape: AttentionShape, times: int) -> float:
        has = {"k": self.shape.source(layer) == layer, "v": layer in self.with_values}
        return self._attention(shape, shape.kv_heads, shape.head_dim, None, has, times)

    def _attention(
        self,
        shape: AttentionShape,
        kv_heads: int,
        width: float,
        factored: bool | None,
        has: dict[str, bool],
        times: int,
    ) -> float:
        """Numbers of one layer's Q, K, V and O, without O's bias, norms and gate, which no cut changes; factored None:
        as it was; has: whether there is a K, a V; times: how often each KV head is held. Behind a norm Q, K and V are
        as wide as they were, with matrices of their own; so is O behind a gate."""
        columns = {name: shape.hidden + (name in self.biases) for name in "qkv"}
        query_heads, channels = shape.kv_heads * shape.groups, shape.kv_heads * shape.head_dim
        behind_norms = self.is_normed and factored is not None
        behind_gate = self.is_gated and factored is not None
        normed_values = self.has_normed_values and factored is not None
        q = query_heads * (shape.head_dim if factored or behind_norms else width) * columns["q"]
        k = (channels if behind_norms else kv_heads * width) * columns["k"]
        o = query_heads * (shape.head_dim if factored or behind_gate else width) * shape.hidden
        v = (channels if normed_values else kv_heads * width) * columns["v"]
        mixes = (behind_norms or bool(factored)) + (behind_gate or bool(factored))  # of Q and of O
        mixes += has["k"] * behind_norms + has["v"] * normed_values
        return q + o + times * (has["k"] * k + has["v"] * v + mixes * channels * width)


def copies(kv_heads: int, ranks: int) -> int:
    """How many ranks hold the same KV head."""
    return max(ranks // kv_heads, 1)
