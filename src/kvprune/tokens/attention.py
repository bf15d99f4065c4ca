"""The attention of a layer that skips: keys and values of all tokens, queries and outputs of the active ones only."""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvprune.models.family import Family
from kvprune.runtime.modeling import rotate_half, window_of
from kvprune.tokens.anchors import cosine, moving_average
from kvprune.tokens.cache import FilteredLayer
from kvprune.tokens.fusion import FUSIONS
from kvprune.tokens.settings import Settings
from kvprune.tokens.threshold import THRESHOLDS, Fixed

TIES = 1e-5  # what similarities may differ by and count as equal: then the position decides
GOLDEN = 0.6180339887498949
QUERIES = 1024  # that share a mask: one for a whole long prompt would be larger than its cache


@dataclass(frozen=True)
class Step:
    """What one call of the model is about, worked out once for all its layers.

    real (B, T) bool: what is no padding; numbers (B,): how many that are. order (B, T): the columns, real tokens first,
    or None where all are real. positions (B, T): absolute ones, of the tokens in that order. ties (B, T): what tells
    equal similarities apart, so that text that repeats itself is not all or nothing. final (B, T) bool, in that
    order: the prompts' final tokens. total, late: how many are real, and of those behind the warm-up. layers: those of
    the cache that filters use, by number.
    """

    real: np.ndarray
    numbers: np.ndarray
    order: np.ndarray | None
    positions: np.ndarray
    ties: np.ndarray
    final: np.ndarray
    total: int
    late: int
    layers: dict[int, FilteredLayer]

    @classmethod
    def of(cls, real: np.ndarray, prompt_ends: np.ndarray, layers: dict[int, FilteredLayer], warmup: int) -> "Step":
        """prompt_ends (B,): absolute positions behind the prompts' final tokens, 0 for none; warmup: tokens."""
        some = next(iter(layers.values()))
        counts = some.counts if some.is_initialized else np.zeros(len(real), dtype=np.int64)
        order = None if real.all() else np.argsort(~real, axis=1, kind="stable")
        positions = counts[:, None] + np.arange(real.shape[1])
        ties = TIES * (positions * GOLDEN % 1)
        numbers = real.sum(1)
        late = (counts + numbers - counts.clip(min=warmup)).clip(min=0)
        final = positions == prompt_ends[:, None] - 1
        return cls(real, numbers, order, positions, ties, final, int(numbers.sum()), int(late.sum()), layers)


@dataclass
class Counts:
    """Of one layer, summed over sequences and calls."""

    tokens: int = 0  # real ones
    late: int = 0  # of them behind the warm-up
    skipped: int = 0
    dropped: int = 0
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys("qkvo", 0))  # that reached each projection
    seconds: float = 0.0  # spent deciding


class FilteredAttention:
    """Stands in for the `forward` of one attention module. Everything is per sequence: no result depends on neighbours.

    skip_rate, drop_rate: shares of this layer's tokens; drop_rate None: those that are skipped. leader: a layer before
    this one whose decisions hold here too.
    """

    def __init__(
        self,
        module: nn.Module,
        family: Family,
        index: int,
        settings: Settings,
        skip_rate: float,
        drop_rate: float | None,
    ):
        self.module: Any = module
        self.index, self.settings = index, settings
        q, self.k, self.v, o = (getattr(module, getattr(family, name)) for name in "qkvo")
        # A pruned layer may have a matrix behind Q and one before O.
        self.q, self.o = getattr(module, "queries", q), getattr(module, "outputs", o)
        self.rates = skip_rate, drop_rate
        self.leader: FilteredAttention | None = None
        self.decided: tuple[np.ndarray, np.ndarray] | None = None  # in the last call
        self.fusion = FUSIONS[settings.fusion]()
        self.counts = Counts()
        self.decisions: list[np.ndarray] | None = None  # (B, T) bool a call, where they are recorded
        self.step: Step | None = None
        self.window = window_of(module, self.module.config)

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any = None, *args, **kwargs):
        """hidden_states (B, T, hidden) -> (B, T, hidden), None."""
        assert self.step is not None
        layer, real = self.step.layers[self.index], self.step.real
        d = self.module.head_dim
        k, v = (p(hidden_states).unflatten(-1, (-1, d)).transpose(1, 2) for p in (self.k, self.v))
        cos, sin = self._rotary(position_embeddings)
        rotated = k * cos + rotate_half(k) * sin
        if not layer.is_initialized:
            layer.lazy_initialization(rotated, v)
        skipped, dropped = self._decide(layer, k if self.settings.keys == "pre-rope" else rotated, v)
        active = real & ~skipped
        columns = torch.arange(layer.seen, layer.seen + real.shape[1], device=k.device)
        before = layer.lengths.copy()
        layer.append(rotated, v, columns, real & ~dropped)
        output = torch.zeros_like(hidden_states)
        computed = None
        if active.any():
            query = self._queries(hidden_states, active, cos, sin, k.shape[1])
            computed = self._attend(layer, query, active, dropped, before, (rotated, v, columns))
        self._write(layer, output, computed, active, skipped)
        layer.seen += real.shape[1]
        layer.counts = layer.counts + self.step.numbers
        layer.trim()
        self._count(self.step, skipped, dropped)
        if self.decisions is not None:
            self.decisions.append(skipped)
        return output, None

    def _rotary(self, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each channel, (B or 1, KV heads or 1, T, head_dim)."""
        cos, sin = position_embeddings
        if hasattr(self.module, "rope_index"):  # a pruned layer: each KV head has kept its own pairs
            return cast(tuple[torch.Tensor, torch.Tensor], self.module.turns(cos, sin))
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def _queries(
        self, hidden: torch.Tensor, active: np.ndarray, cos: torch.Tensor, sin: torch.Tensor, kv_heads: int
    ) -> torch.Tensor:
        """The rotated queries of the active tokens, sequence after sequence, (rows, heads, head_dim)."""
        b, t = (torch.from_numpy(i).to(hidden.device) for i in np.nonzero(active))
        query = self.q(hidden[b, t]).unflatten(-1, (-1, self.module.head_dim))
        self.counts.rows["q"] += len(query)
        groups = query.shape[1] // kv_heads
        cos, sin = (x[b if len(x) > 1 else torch.zeros_like(b), :, t] for x in (cos, sin))  # (rows, KV heads or 1, d)
        if cos.shape[1] > 1:
            cos, sin = (x.repeat_interleave(groups, dim=1) for x in (cos, sin))
        return query * cos + rotate_half(query) * sin

    def _attend(
        self,
        layer: FilteredLayer,
        query: torch.Tensor,
        active: np.ndarray,
        dropped: np.ndarray,
        before: np.ndarray,
        new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Outputs behind O of the active tokens, (rows, hidden)."""
        found, row = [], 0
        for b, flags in enumerate(active):
            n = int(np.count_nonzero(flags))
            if n:
                mine = query[row : row + n].transpose(0, 1).unsqueeze(0)  # (1, heads, n, d)
                row += n
                keys, values, columns = layer.of(b)
                alone = flags & dropped[b]  # tokens that attend but are not kept see themselves all the same
                if alone.any():
                    extra = torch.from_numpy(np.flatnonzero(alone)).to(query.device)
                    keys = torch.cat((keys, new[0][b : b + 1, :, extra]), dim=2)
                    values = torch.cat((values, new[1][b : b + 1, :, extra]), dim=2)
                    columns = torch.cat((columns, new[2][extra]))
                if self._needs_no_mask(flags, layer.lengths[b] - before[b], before[b], bool(alone.any())):
                    found.append(self._attention(mine, keys, values, None))
                    continue
                queries = new[2][torch.from_numpy(np.flatnonzero(flags)).to(query.device)]
                for start in range(0, n, QUERIES):
                    piece = slice(start, start + QUERIES)
                    mask = self._mask(queries[piece], columns, int(alone.sum()))
                    found.append(self._attention(mine[:, :, piece], keys, values, mask))
        outputs = torch.cat(found) if len(found) > 1 else found[0]
        self.counts.rows["o"] += len(outputs)
        return cast(torch.Tensor, self.o(outputs))

    def _needs_no_mask(self, active: np.ndarray, kept: int, before: int, alone: bool) -> bool:
        """Whether a sequence's queries see all keys (there is one new token), or each those up to its own (there was no
        token before, and those that attend are those that are kept): attention functions know that without a mask."""
        if self.window is not None or alone:
            return False
        n = np.count_nonzero(active)
        causal = before == 0 and n == kept > 1 and self.module.config._attn_implementation != "eager"
        return len(active) == 1 or bool(causal)

    def _mask(self, queries: torch.Tensor, keys: torch.Tensor, alone: int) -> torch.Tensor:
        """Which keys (K,) each query (n,) sees, (1, 1, n, K), from their columns; the last `alone` are not cached."""
        queries = queries.unsqueeze(1)
        seen = keys <= queries
        if self.window is not None:
            seen &= keys > queries - self.window
        if alone:
            seen[:, -alone:] = keys[-alone:] == queries
        return seen[None, None]

    def _attention(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """One sequence's attention, (1, heads, n, d) -> (n, heads * d), by the function that the model uses."""
        module, name = self.module, self.module.config._attn_implementation
        eager = sys.modules[type(module).__module__].eager_attention_forward
        if name == "eager" and mask is not None:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        output, _ = attend(module, query, keys, values, mask, dropout=0.0, scaling=module.scaling)
        return cast(torch.Tensor, output.reshape(query.shape[2], -1))

    def _write(
        self,
        layer: FilteredLayer,
        output: torch.Tensor,
        computed: torch.Tensor | None,
        active: np.ndarray,
        skipped: np.ndarray,
    ) -> None:
        """Put the computed outputs, and for skipped tokens what stands for them, into output (B, T, hidden)."""
        if computed is not None:
            output[tuple(torch.from_numpy(i).to(output.device) for i in np.nonzero(active))] = computed.to(output.dtype)
        if self.settings.on_skip == "zero":
            return
        if layer.output_anchor is None:
            layer.output_anchor = output.new_zeros(output.shape[0], output.shape[2], dtype=torch.float32)
        if active.shape[1] == 1:
            self._write_step(layer, output, computed, active[:, 0], skipped[:, 0])
            return
        row, anchors = 0, []
        for b, flags in enumerate(active):
            n = int(np.count_nonzero(flags))
            mine = None if computed is None else computed[row : row + n].float()
            row += n
            first = None if (layer.counts[b] == 0) else layer.output_anchor[b]
            if mine is not None and n:
                averages = moving_average(mine, first, self.settings.output_gamma)
            else:
                averages = layer.output_anchor[b : b + 1]
            if skipped[b].any():
                tokens = np.flatnonzero(skipped[b])
                met = torch.from_numpy(np.cumsum(flags)[tokens]).to(output.device)
                output[b, torch.from_numpy(tokens).to(output.device)] = averages[met].to(output.dtype)
            anchors.append(averages[n])
        layer.output_anchor = torch.stack(anchors)

    def _write_step(
        self,
        layer: FilteredLayer,
        output: torch.Tensor,
        computed: torch.Tensor | None,
        active: np.ndarray,
        skipped: np.ndarray,
    ) -> None:
        """The anchors' part of `_write` for one token a sequence, without a loop over them."""
        assert layer.output_anchor is not None
        if skipped.any():
            rows = torch.from_numpy(np.flatnonzero(skipped)).to(output.device)
            output[rows, 0] = layer.output_anchor[rows].to(output.dtype)
        if computed is not None:
            rows = torch.from_numpy(np.flatnonzero(active)).to(output.device)
            mine, new = computed.float(), torch.from_numpy(layer.counts[active] == 0).to(output.device)
            moved = torch.lerp(mine, layer.output_anchor[rows], self.settings.output_gamma)
            layer.output_anchor = layer.output_anchor.index_copy(0, rows, torch.where(new[:, None], mine, moved))

    def _decide(self, layer: FilteredLayer, k: torch.Tensor, v: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are skipped, and which are not cached: (B, T) bool each. Moves anchors and thresholds on."""
        assert self.step is not None
        started, s, step = time.perf_counter(), self.settings, self.step
        layer.settings = s
        if self.leader is not None:
            assert self.leader.decided is not None
            return self.leader.decided
        if layer.skip is None:
            kind = Fixed if s.signal == "random" else THRESHOLDS[s.threshold]
            skip_rate, drop_rate = self.rates
            layer.skip = kind(s.rule(skip_rate), len(step.real))
            layer.drop = None if drop_rate is None else kind(s.rule(drop_rate), len(step.real))
        if s.signal == "random":
            similarity = uniform(step.positions, s.seed, self.index)
        else:
            mixed = torch.is_autocast_enabled(k.device.type)
            with torch.autocast(k.device.type, enabled=False) if mixed else nullcontext():
                similarity = self._similarity(layer, k, v, step.order, step.numbers) + step.ties
        if step.order is not None:
            similarity[np.arange(step.real.shape[1]) >= step.numbers[:, None]] = np.nan
        skipped = dropped = _back(layer.skip.take(similarity, layer.counts, step.final), step.order)
        if layer.drop is not None:
            dropped = _back(layer.drop.take(similarity, layer.counts, step.final), step.order)
        self.decided = skipped, dropped
        self.counts.seconds += time.perf_counter() - started
        return self.decided

    def _similarity(
        self, layer: FilteredLayer, k: torch.Tensor, v: torch.Tensor, order: np.ndarray | None, numbers: np.ndarray
    ) -> np.ndarray:
        """Similarity of every token to the anchors before it, in `order`, (B, T) float64. Moves the anchors on."""
        x = torch.stack((k, v), dim=1).float()  # (B, 2, KV heads, T, head_dim)
        if x.shape[3] == 1 and order is None and layer.anchor is not None and layer.counts.all():
            cosines = cosine(x, layer.anchor.unsqueeze(3))  # a step of decoding, with as few operations as can be
            layer.anchor = torch.lerp(x[:, :, :, 0], layer.anchor, self.settings.gamma)
            return self.fusion(cosines).cpu().double().numpy()
        if order is not None:
            index = torch.from_numpy(order).to(x.device)[:, None, None, :, None]
            x = x.gather(3, index.expand(-1, *x.shape[1:3], -1, x.shape[4]))
        start = x[:, :, :, 0]
        if layer.anchor is not None:
            new = torch.from_numpy(layer.counts == 0).to(x.device)  # padding so far: they start here
            start = torch.where(new[:, None, None, None], start, layer.anchor) if new.any() else layer.anchor
        anchors = moving_average(x, start, self.settings.gamma)
        cosines = cosine(x, anchors[..., :-1, :])
        rows = torch.arange(len(numbers), device=x.device)
        layer.anchor = anchors[rows, :, :, torch.from_numpy(numbers).to(x.device)]
        return self.fusion(cosines).cpu().double().numpy()

    def _count(self, step: Step, skipped: np.ndarray, dropped: np.ndarray) -> None:
        counts = self.counts
        counts.tokens += step.total
        counts.late += step.late
        counts.skipped += int(skipped.sum())
        counts.dropped += int(dropped.sum())
        for name in "kv":
            counts.rows[name] += step.real.size


def uniform(positions: np.ndarray, seed: int, layer: int) -> np.ndarray:
    """Numbers in [0, 1) that look random and depend on seed, layer and absolute position only (SplitMix64's mix)."""
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) + np.uint64(seed) * np.uint64(0x632BE59BD9B4E019)
        x = (x * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(layer + 1) * np.uint64(0xD1342543DE82EF95))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _back(flags: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Flags of the ordered tokens, at the tokens' own columns."""
    if order is None:
        return flags
    found = np.zeros_like(flags)
    np.put_along_axis(found, order, flags, axis=1)
    return found
