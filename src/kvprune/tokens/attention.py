"""The attention of a layer that skips: keys and values of all tokens, queries and outputs of the active ones.

Where the host decides, only the active tokens' queries and outputs are computed, sequence after sequence. A step of
decoding that decides where the model is computes all of them in one call, in which those that skip see no key but
their own, and reads nothing back.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvprune.runtime.attention import packed_attention
from kvprune.runtime.modeling import window_of
from kvprune.tokens.anchors import moving_average
from kvprune.tokens.cache import HOST, FilteredLayer
from kvprune.tokens.fusion import FUSIONS
from kvprune.tokens.projections import Projections, Turns, turned
from kvprune.tokens.settings import Settings
from kvprune.tokens.similarity import similarity, uniform
from kvprune.tokens.step import Step
from kvprune.tokens.threshold import THRESHOLDS, Fixed

QUERIES = 1024  # that share a mask: one for a whole long prompt would be larger than its cache


@dataclass
class Counts:
    """Of one layer, summed over sequences and calls. Tensors, where a step of decoding does not read them."""

    tokens: Any = 0  # real ones
    late: Any = 0  # of them behind the warm-up
    skipped: Any = 0
    dropped: Any = 0
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys("qkvo", 0))  # that reached each projection
    seconds: float = 0.0  # spent deciding

    def read(self) -> "Counts":
        """The same as numbers, for which the host waits."""
        numbers: dict[str, Any] = {n: int(getattr(self, n)) for n in ("tokens", "late", "skipped", "dropped")}
        return replace(self, **numbers)


class FilteredAttention:
    """Stands in for the `forward` of one attention module. Everything is per sequence: no result depends on neighbours.

    skip_rate, drop_rate: shares of this layer's tokens; drop_rate None: those that are skipped. leader: a layer before
    this one whose decisions hold here too.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Projections,
        index: int,
        settings: Settings,
        skip_rate: float,
        drop_rate: float | None,
    ):
        self.module: Any = module
        self.index, self.settings, self.parts = index, settings, parts
        self.rates = skip_rate, drop_rate
        self.leader: FilteredAttention | None = None
        self.decided: tuple[torch.Tensor, torch.Tensor] | None = None  # in the last call
        self.fusion = FUSIONS[settings.fusion]()
        self.counts = Counts()
        self.decisions: list[torch.Tensor] | None = None  # (B, T) bool a call, where they are recorded
        self.step: Step | None = None
        self.window = window_of(module, self.module.config)

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any = None, *args, **kwargs):
        """hidden_states (B, T, hidden) -> (B, T, hidden), None."""
        assert self.step is not None
        layer = self.step.layers[self.index]
        on_device = layer.decides_next(hidden_states.shape[1])
        k, v, queries = self.parts.keys_and_values(hidden_states)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        turns = self.parts.turns(position_embeddings)
        rotated = turned(k, turns)
        if not layer.is_initialized:
            layer.lazy_initialization(rotated, v)
        step = self.step.to(layer.home if on_device else HOST)
        skipped, dropped = self._decide(layer, k if self.settings.keys == "pre-rope" else rotated, v, step)
        active = step.real & ~skipped
        place = layer.append(rotated, v, active if dropped is skipped else step.real & ~dropped)
        asking = hidden_states if queries is None else queries
        if on_device:
            computed = self._attend_together(layer, asking, active, place, turns)
            output = self._next_output(layer, computed.to(hidden_states.dtype), active, skipped, step)
        else:
            found = self._attend_active(layer, asking, active, dropped, place, (rotated, v), turns)
            output = self._outputs(layer, hidden_states, found, active, skipped, step)
        layer.seen += step.tokens
        layer.counts = layer.counts + step.numbers.to(layer.home)
        if not on_device:
            layer.has_padding |= not step.all_real
            layer.trim()
        self._count(step, skipped, dropped, on_device)
        return output, None

    def _queries(self, asking: torch.Tensor, turns: Turns | None, kv_heads: int) -> torch.Tensor:
        """The rotated queries (rows, heads, head_dim) of asking: hidden (rows, hidden), or queries before RoPE, which
        came with the keys; turns: (rows or 1, KV heads or 1, head_dim)."""
        query = asking if self.parts.is_fused else self.parts.queries(asking)
        if not self.parts.is_fused:
            self.counts.rows["q"] += len(query)
        if turns is not None and turns[0].shape[1] > 1:
            cos, sin = (x.repeat_interleave(query.shape[1] // kv_heads, dim=1) for x in turns)
            turns = cos, sin
        return turned(query, turns)

    def _attend_together(
        self,
        layer: FilteredLayer,
        asking: torch.Tensor,
        active: torch.Tensor,
        place: torch.Tensor,
        turns: Turns | None,
    ) -> torch.Tensor:
        """Outputs behind O of one new token of each sequence, (B, hidden). A token that skips costs a column of the
        cache: its output is not used."""
        assert layer.keys is not None
        assert layer.values is not None
        now = None if turns is None else (turns[0][:, :, 0], turns[1][:, :, 0])
        query = self._queries(asking[:, 0], now, layer.keys.shape[1]).unsqueeze(2)
        output, _ = packed_attention(
            self.module,
            query,
            layer.keys,
            layer.values,
            layer.visible(place, active),
            scaling=self.module.scaling,
        )
        self.counts.rows["o"] += len(query)
        return cast(torch.Tensor, self.parts.outputs(output.flatten(2)[:, 0]))

    def _attend_active(
        self,
        layer: FilteredLayer,
        asking: torch.Tensor,
        active: torch.Tensor,
        dropped: torch.Tensor,
        place: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        turns: Turns | None,
    ) -> torch.Tensor | None:
        """Outputs behind O of the active tokens, sequence after sequence, (rows, hidden), if there are any. asking
        (B, T, ...): of all tokens what queries come from; new: keys and values of all new tokens."""
        b, t = (i.to(asking.device) for i in active.nonzero(as_tuple=True))
        if not len(b):
            return None
        if turns is not None:
            cos, sin = (x[b if len(x) > 1 else torch.zeros_like(b), :, t] for x in turns)
            turns = cos, sin
        query = self._queries(asking[b, t], turns, new[0].shape[1])
        return self._attend(layer, query, active, dropped, place, new)

    def _attend(
        self,
        layer: FilteredLayer,
        query: torch.Tensor,
        active: torch.Tensor,
        dropped: torch.Tensor,
        place: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The same for their queries (rows, heads, head_dim)."""
        found, row, lengths, starts = [], 0, layer.lengths.tolist(), place.tolist()
        columns = torch.arange(layer.seen, layer.seen + active.shape[1], device=query.device)
        lone = active & dropped  # tokens that attend but are not kept see themselves all the same
        numbers, alones = active.sum(1).tolist(), lone.sum(1).tolist()
        for b, (n, alone) in enumerate(zip(numbers, alones, strict=True)):
            if not n:
                continue
            mine = query[row : row + n].transpose(0, 1).unsqueeze(0)  # (1, heads, n, d)
            row += n
            keys, values, seen = layer.of(b, lengths[b])
            if alone:
                extra = lone[b].nonzero()[:, 0].to(query.device)
                keys = torch.cat((keys, new[0][b : b + 1, :, extra]), dim=2)
                values = torch.cat((values, new[1][b : b + 1, :, extra]), dim=2)
                seen = torch.cat((seen, columns[extra]))
            if self._needs_no_mask(active.shape[1], n, lengths[b] - starts[b], starts[b], bool(alone)):
                found.append(self._attention(mine, keys, values, None))
                continue
            queries = columns[active[b].nonzero()[:, 0].to(query.device)]
            for start in range(0, n, QUERIES):
                piece = slice(start, start + QUERIES)
                mask = self._mask(queries[piece], seen, alone)
                found.append(self._attention(mine[:, :, piece], keys, values, mask))
        outputs = torch.cat(found) if len(found) > 1 else found[0]
        self.counts.rows["o"] += len(outputs)
        return cast(torch.Tensor, self.parts.outputs(outputs))

    def _needs_no_mask(self, tokens: int, active: int, kept: int, before: int, alone: bool) -> bool:
        """Whether a sequence's queries see all keys (there is one new token), or each those up to its own (there was no
        token before, and those that attend are those that are kept): attention functions know that without a mask."""
        if self.window is not None or alone:
            return False
        causal = before == 0 and active == kept > 1 and self.module.config._attn_implementation != "eager"
        return tokens == 1 or causal

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

    def _outputs(
        self,
        layer: FilteredLayer,
        hidden: torch.Tensor,
        computed: torch.Tensor | None,
        active: torch.Tensor,
        skipped: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        """The computed outputs (rows, hidden), and for skipped tokens what stands for them, (B, T, hidden)."""
        if computed is not None and len(computed) == active.numel():
            output = computed.to(hidden.dtype).view_as(hidden)
        else:
            output = torch.zeros_like(hidden)
            if computed is not None:
                output[tuple(i.to(output.device) for i in active.nonzero(as_tuple=True))] = computed.to(output.dtype)
        if step.tokens == 1:
            return self._next_output(layer, output[:, 0], active, skipped, step)
        if self.settings.on_skip == "zero":
            return output
        old, anchors = self._output_anchor(layer, output), []
        for b, has_begun in enumerate(step.begun.tolist()):
            mine = output[b, active[b].nonzero()[:, 0].to(output.device)].float()
            first = old[b] if has_begun else None
            averages = moving_average(mine, first, self.settings.output_gamma) if len(mine) else old[b : b + 1]
            tokens = skipped[b].nonzero()[:, 0]
            met = active[b].cumsum(0)[tokens].to(output.device)
            output[b, tokens.to(output.device)] = averages[met].to(output.dtype)
            anchors.append(averages[len(mine)])
        layer.output_anchor = torch.stack(anchors)
        return output

    def _next_output(
        self, layer: FilteredLayer, computed: torch.Tensor, active: torch.Tensor, skipped: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """The same of one token of each sequence, (B, 1, hidden); computed (B, hidden): what does not attend is not
        used. active, skipped (B, 1)."""
        active, skipped, has_begun = (x.to(computed.device) for x in (active, skipped, step.begun.unsqueeze(1)))
        if self.settings.on_skip == "zero":
            return computed.masked_fill(~active, 0.0).unsqueeze(1)
        old, mine = self._output_anchor(layer, computed), computed.float()
        moved = torch.lerp(mine, torch.where(has_begun, old, mine), self.settings.output_gamma)
        layer.output_anchor = torch.where(active, moved, old)
        return torch.where(active, computed, old.masked_fill(~skipped, 0.0).to(computed.dtype)).unsqueeze(1)

    def _output_anchor(self, layer: FilteredLayer, output: torch.Tensor) -> torch.Tensor:
        """The layer's, (B, hidden) float32; zeros before there is one."""
        anchor = layer.output_anchor
        return output.new_zeros(len(output), output.shape[-1], dtype=torch.float32) if anchor is None else anchor

    def _decide(
        self, layer: FilteredLayer, k: torch.Tensor, v: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are skipped, and which are not cached: (B, T) bool each, where the step's decisions are made.
        Moves anchors and thresholds on."""
        started, s, place = time.perf_counter(), self.settings, step.real.device
        layer.settings = s
        if self.leader is not None:
            assert self.leader.decided is not None
            skipped, dropped = (x.to(place) for x in self.leader.decided)
            return skipped, dropped
        if layer.skip is None:
            kind = Fixed if s.signal == "random" else THRESHOLDS[s.threshold]
            skip_rate, drop_rate = self.rates
            layer.skip = kind(s.rule(skip_rate), len(step.real))
            layer.drop = None if drop_rate is None else kind(s.rule(drop_rate), len(step.real))
        if s.signal == "random":
            found = uniform(step.positions, s.seed, self.index)
        else:
            found = similarity(layer, k, v, step, s.gamma, self.fusion)
        taken = []
        for threshold in (layer.skip, layer.drop):
            if threshold is not None:
                threshold.to(place)
                taken.append(threshold.take(found, step.places))
                threshold.to(layer.home)  # behind a prompt, for the step that comes next
        self.decided = taken[0], taken[-1]
        self.counts.seconds += time.perf_counter() - started
        return self.decided

    def _count(self, step: Step, skipped: torch.Tensor, dropped: torch.Tensor, on_device: bool) -> None:
        counts = self.counts
        counts.tokens = counts.tokens + step.total
        counts.late = counts.late + step.late
        for name, flags in (("skipped", skipped), ("dropped", dropped)):
            setattr(counts, name, getattr(counts, name) + (flags.sum() if on_device else int(flags.sum())))
        for name in "qkv" if self.parts.is_fused else "kv":
            counts.rows[name] += step.real.numel()
        if self.decisions is not None:
            self.decisions.append(skipped)
