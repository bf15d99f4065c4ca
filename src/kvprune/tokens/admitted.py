"""A cache layer under late admission, and the attention over it.

Keys and values are (B, KV heads, room, width); the tokens of a sequence stand in the order in which they came, kept
ones first, then those that are not decided yet. Which tokens are kept differs from KV head to KV head; how many does
not. Everything that a step of decoding decides by is a tensor where the model is, or a number that the host has
counted: nothing is read back.

Two ways lead through the same rule. Where all tokens are real, all sequences decide at the same time, and places are
numbers of the host. Otherwise (`counts` is a tensor) each sequence is at its own position, and places are tensors.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from kvprune.errors import CacheMismatch
from kvprune.runtime.attention import for_any_shape
from kvprune.tokens.admission import Admission, Schedule
from kvprune.tokens.signals import SIGNALS, Before, Signal

SPARE = 24  # a cache that must grow does by a part in so many
AT_ONCE = 1024  # tokens of a long text that are scored together
ALIGNED = 8  # columns of a mask: what a GPU's attention reads without a copy

New = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # keys, values (B, KV heads, T, width), scores (B, KV heads, T)


@dataclass(frozen=True)
class One:
    """One more token of each sequence, which is at its own position: the same for all layers.

    counts (B,): real tokens with it. chosen (B, 1, 1): how many stay of the block that is due, or all; sinks (B, 1,
    block): those that do whatever their scores. rows (B, 1, block + window): where that block and what follows it
    stand; before (B, 1, 1) is the place before them, behind (B, 1, window) where the latter go. place (B, 1, 1): of the
    token; mask (B, 1, 1, places): 0, or -inf where nothing is; room: how large the rooms must be.
    """

    counts: torch.Tensor
    sinks: torch.Tensor | None
    chosen: torch.Tensor
    rows: torch.Tensor
    before: torch.Tensor
    behind: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor
    room: int


@dataclass
class Shared:
    """What the first layer of a call finds out for all others: real (B, T) bool, positions (B, T) of the new tokens
    among the real ones, and the rest where there is one."""

    real: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    one: One | None = None


class AdmittedLayer(CacheLayerMixin):
    """keys and values are the filled part of larger tensors, `key_room` and `value_room`."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    away = 0  # how many of the kept tokens are somewhere else than in the rooms

    def __init__(self, rule: Admission, index: int, turns: torch.Tensor | None = None):
        """turns: of the signal; see Signal."""
        super().__init__()
        self.rule, self.index, self.turns = rule, index, turns
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.key_room: torch.Tensor | None = None
        self.value_room: torch.Tensor | None = None
        self.is_initialized = False
        self.seen = 0  # columns so far, with padding
        self.counts: torch.Tensor | None = None  # (B,): real tokens so far; None: all are
        self.schedule = Schedule(self.rule)
        self.table: torch.Tensor | None = None  # of the schedule, where the model is
        self.signal: Signal = SIGNALS[self.rule.signal](self.rule.seed, self.index, self.turns)
        self.scores: torch.Tensor = torch.empty(0)  # (B, KV heads, room)
        self.waiting: list[Before] = []  # the last tokens, which have no score yet

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_room, self.value_room = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = self.key_room, self.value_room
        self.scores = key_states.new_empty(key_states.shape[:3], dtype=torch.float32)[:, :, :0]
        self.is_initialized = True

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        before: Before,
        real: torch.Tensor | None,
        scaling: float | None,
        shared: "Shared | None" = None,
    ) -> torch.Tensor:
        """Take new tokens in, and let each attend to what is in the cache when it comes.

        query (B, heads, T, width); key, value (B, KV heads, T, width); real (B, T) bool, None where all are; shared: of
        the layers of one call -> (B, T, heads, width).
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if real is not None and self.counts is None:
            self._score_waiting(self.seen)
            self.counts = torch.full((len(key),), self.seen, device=key.device)
        tokens = key.shape[2]
        if self.counts is None:
            outputs = self._attend_together(query, key, value, before, scaling)
        else:
            shared = shared or Shared()
            if shared.real is None:
                shared.real = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if real is None else real
                shared.positions = self.counts.unsqueeze(1) + shared.real.cumsum(1) - 1
            assert shared.positions is not None
            new = (key, value, self.signal.scores(before, shared.positions, real))
            attend = self._attend_one if tokens == 1 else self._attend_apart
            outputs = attend(query, new, shared, scaling)
        self.seen += tokens
        return outputs.transpose(1, 2)

    # All sequences together

    def _attend_together(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        before: Before,
        scaling: float | None,
    ) -> torch.Tensor:
        """(B, heads, T, width). A piece at a time: up to the next decision."""
        tokens, outputs, start = key.shape[2], [], 0
        ahead = Ahead(before, self.signal, self.seen)
        filled = self._filled(self.seen) - self.away
        self._make_room(filled, self._needed(self.seen + tokens))
        assert self.key_room is not None
        assert self.value_room is not None
        while start < tokens:
            seen = self.seen + start
            if seen % self.rule.block == 0:
                self._score_waiting(seen)
                filled = self._decide_together(seen)
            piece = slice(start, min(start + self.rule.block - seen % self.rule.block, tokens))
            place = slice(filled, filled + piece.stop - start)
            self.key_room[:, :, place], self.value_room[:, :, place] = key[:, :, piece], value[:, :, piece]
            if seen % self.rule.block == 0 and piece.stop - piece.start == self.rule.block:
                self.scores[:, :, place] = ahead.scores(piece)
            else:
                self.waiting.append(before if tokens == 1 else before.part(piece))
            filled, start = place.stop, piece.stop
            self.keys, self.values = self.key_room[:, :, :filled], self.value_room[:, :, :filled]
            keys, values = self._read()
            mask = _causal(keys.shape[2], piece.stop - piece.start, self.device) if key.shape[2] > 1 else None
            outputs.append(_attention(query[:, :, piece], keys, values, mask, scaling))
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    def _score_waiting(self, seen: int) -> None:
        """Score the last of `seen` tokens that have no score yet: a block at once, which costs a step less than each
        token by itself."""
        if self.waiting:
            block, filled = Before.joined(self.waiting), self._filled(seen) - self.away
            tokens = block.keys.shape[2]
            positions = torch.arange(seen - tokens, seen, device=self.device).unsqueeze(0)
            self.scores[:, :, filled - tokens : filled] = self.signal.scores(block, positions, None)
            self.waiting = []

    def _filled(self, seen: int) -> int:
        """Tokens stored behind the last call, when the decision that is due there has not been made."""
        return self.schedule.stored(seen - 1) + 1 if seen else 0

    def _decide_together(self, seen: int) -> int:
        """Drop tokens of the block that is due, if one is; how many tokens are left in the rooms."""
        schedule, filled = self.schedule, self._filled(seen) - self.away
        before, kept = schedule.kept(seen - 1) if seen else 0, schedule.kept(seen)
        if schedule.decided(seen) == (schedule.decided(seen - 1) if seen else 0):
            return filled
        block = slice(before - self.away, before - self.away + self.rule.block)
        chosen = self._ranked(self.scores[:, :, block], self._sinks(seen))[..., : kept - before].sort(-1).values
        return self._take(chosen, block, filled)

    def _take(self, chosen: torch.Tensor, block: slice, filled: int) -> int:
        """Keep the chosen tokens (B, KV heads, n) of a block in the rooms, in place; how many are left there."""
        n = chosen.shape[2]
        if n == block.stop - block.start:
            return filled
        for room in (self.key_room, self.value_room, self.scores.unsqueeze(-1)):
            assert room is not None
            index = chosen.unsqueeze(-1).expand(-1, -1, -1, room.shape[-1])
            room[:, :, block.start : block.start + n] = room[:, :, block].gather(2, index)
            room[:, :, block.start + n : filled - block.stop + block.start + n] = room[
                :, :, block.stop : filled
            ].clone()
        return filled - block.stop + block.start + n

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that are there."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _needed(self, number: int) -> int:
        """How many tokens the rooms must hold, up to so many tokens of text."""
        return self.schedule.most(number)

    def _sinks(self, seen: int | torch.Tensor) -> torch.Tensor | None:
        """Of a block (B or 1, 1, block): what stays whatever its score, the text's first tokens; None where nothing
        does. seen: how many tokens there were when it is decided, a number or (B,)."""
        is_first = seen == self.rule.window + self.rule.block
        if is_first is False:
            return None
        sinks = torch.arange(self.rule.block, device=self.device) < self.rule.sinks
        return sinks.view(1, 1, -1) if isinstance(is_first, bool) else is_first.view(-1, 1, 1) & sinks

    def _ranked(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """The tokens of a block (B, KV heads, block), best first."""
        scores = scores if sinks is None else scores.masked_fill(sinks, torch.inf)
        return scores.argsort(stable=True, dim=-1, descending=True)

    def _make_room(self, filled: int, needed: int) -> None:
        """For `needed` tokens; the first `filled` are there."""
        assert self.key_room is not None
        assert self.value_room is not None
        is_own = not self.key_room.is_inference() or torch.is_inference_mode_enabled()
        if needed <= self.key_room.shape[2] and is_own:
            return
        if filled:  # it grows as it decodes
            needed += max(needed // SPARE, 1)
        names = ("key_room", "value_room", "scores")
        for name in names:
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], needed, *old.shape[3:])
            new[:, :, :filled] = old[:, :, :filled]
            setattr(self, name, new)

    # Each sequence at its own position

    def _attend_one(self, query: torch.Tensor, new: "New", shared: "Shared", scaling: float | None) -> torch.Tensor:
        """(B, heads, 1, width). Decide, where a decision is due; write the token; attend."""
        one = shared.one = shared.one or self._one(shared.real, query.dtype)
        self._make_room(self.scores.shape[2], one.room)
        assert self.key_room is not None
        assert self.value_room is not None
        kv_heads = self.scores.shape[1]
        due = self.scores.gather(2, one.rows[..., : self.rule.block].expand(-1, kv_heads, -1))
        stays = self._ranked(due, one.sinks).argsort(-1) < one.chosen  # (B, KV heads, block)
        to = torch.where(stays, stays.cumsum(-1) + one.before, self.scores.shape[2] - 1)
        self._move(one.rows.expand(-1, kv_heads, -1), torch.cat((to, one.behind.expand(-1, kv_heads, -1)), -1))
        self._put(new, one.place.expand(-1, kv_heads, -1))
        self.counts = one.counts
        width = one.mask.shape[-1]
        self.keys, self.values = self.key_room[:, :, :width], self.value_room[:, :, :width]
        return _attention(query, self.keys, self.values, one.mask, scaling)

    def _one(self, real: torch.Tensor | None, dtype: torch.dtype) -> "One":
        """What the rule says of one more token (B, 1) of each sequence."""
        assert self.counts is not None
        assert real is not None
        rule, columns = self.rule, self.seen + 1
        width = -(-self._reach(columns, 1) // ALIGNED) * ALIGNED
        room = max(width, self._reach(columns, rule.block)) + rule.block + rule.window + 1
        table, behind = self._table(columns), self.counts - 1
        number = behind.clamp_min(0) // rule.block
        stored = torch.where(self.counts > 0, table[1][number] + behind % rule.block + 1, 0)
        kept, is_due = table[0][number], self.counts % rule.block == 0
        decides = is_due & real[:, 0] & (self.counts >= rule.window + rule.block)
        chosen = torch.where(decides, table[0][self.counts // rule.block] - kept, rule.block)
        stored = stored - rule.block + chosen
        last = max(room, self.scores.shape[2]) - 1
        slots = torch.arange(max(width, rule.block + rule.window), device=self.device)
        mask = torch.zeros(len(stored), 1, 1, width, dtype=dtype, device=self.device)
        rows = (kept[:, None] + slots[: rule.block + rule.window]).unsqueeze(1)
        return One(
            counts=self.counts + real[:, 0],
            sinks=self._sinks(self.counts),
            chosen=chosen[:, None, None],
            before=kept[:, None, None] - 1,
            rows=rows,
            behind=rows[..., rule.block :] - rule.block + chosen[:, None, None],
            place=torch.where(real[:, 0], stored, last)[:, None, None],
            mask=mask.masked_fill(slots[:width] > stored[:, None, None, None], -torch.inf),
            room=room,
        )

    def _attend_apart(self, query: torch.Tensor, new: "New", shared: "Shared", scaling: float | None) -> torch.Tensor:
        """(B, heads, T, width). In pieces in which no sequence decides twice."""
        outputs, real = [], shared.real
        assert real is not None
        for start in range(0, query.shape[2], self.rule.block):
            piece = slice(start, start + self.rule.block)
            key, value, scores = (x[:, :, piece] for x in new)
            columns = self.seen + min(piece.stop, query.shape[2])
            part = self._attend_piece(query[:, :, piece], (key, value, scores), real[:, piece], columns, scaling)
            outputs.append(part)
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    def _attend_piece(
        self,
        query: torch.Tensor,
        new: "New",
        real: torch.Tensor,
        columns: int,
        scaling: float | None,
    ) -> torch.Tensor:
        """Decide, where that falls into the piece, for the queries behind it; write, attend, and move together.
        columns: how many there are with the piece."""
        assert self.counts is not None
        block, table = self.rule.block, self._table(columns)
        behind = self.counts - 1  # of the last call's tokens; the decision that is due at `counts` is not made
        number = behind.clamp_min(0) // block
        kept, stored = table[0][number], torch.where(self.counts > 0, table[1][number] + behind % block + 1, 0)
        width = self._reach(columns, block)
        self._make_room(self.scores.shape[2], width + block + self.rule.window + 1)

        due = -(-self.counts // block) * block  # where this piece may decide
        decides = (due < self.counts + real.sum(1)) & (due >= self.rule.window + block)
        chosen = torch.where(decides, table[0][due // block] - kept, block)
        at = kept[:, None, None] + torch.arange(block, device=self.device)
        ranked = self._ranked(self.scores.gather(2, at.expand(-1, self.scores.shape[1], -1)), self._sinks(due))
        stays = ranked.argsort(-1) < chosen[:, None, None]  # (B, KV heads, block)

        rank = real.cumsum(1)  # (B, T): which of the piece's real tokens, from 1
        self._write(new, stored, rank, real)
        slots = torch.arange(width, device=self.device)
        seen = slots < (stored[:, None] + rank.clamp_min(1)).unsqueeze(-1)  # (B, T, room)
        gone = torch.zeros(*stays.shape[:2], self.scores.shape[2], dtype=torch.bool, device=self.device)
        gone = gone.scatter(2, at.expand_as(stays), ~stays)[..., :width]
        is_behind = self.counts[:, None] + rank - 1 >= due[:, None]  # (B, T)
        mask = seen.unsqueeze(1) & ~(gone.unsqueeze(2) & is_behind[:, None, :, None])
        assert self.key_room is not None
        assert self.value_room is not None
        output = _attention(query, self.key_room[:, :, :width], self.value_room[:, :, :width], mask, scaling)

        self._move_together(kept, stays)
        self.counts = self.counts + real.sum(1)
        self.keys, self.values = self.key_room[:, :, :width], self.value_room[:, :, :width]
        return output

    def _reach(self, columns: int, more: int) -> int:
        """How many places may be filled, by what is there and `more`: what a piece adds, before anything is dropped."""
        return self.schedule.most(columns) + more

    def _table(self, columns: int) -> torch.Tensor:
        """(2, decisions): kept, and stored behind it, at each multiple of block up to so many tokens and a block."""
        needed = columns // self.rule.block + 2
        if self.table is None or self.table.shape[1] < needed:
            numbers = range(0, 2 * needed * self.rule.block, self.rule.block)
            rows = [[self.schedule.kept(n) for n in numbers], [self.schedule.stored(n) for n in numbers]]
            self.table = torch.tensor(rows, device=self.device)
        return self.table

    def _write(self, new, stored: torch.Tensor, rank: torch.Tensor, real: torch.Tensor) -> None:
        """New tokens behind those that are stored; padding goes where nothing is read."""
        last = self.scores.shape[2] - 1
        place = torch.where(real, stored[:, None] + rank - 1, last)[:, None].expand(-1, self.scores.shape[1], -1)
        self._put(new, place)

    def _put(self, new: "New", place: torch.Tensor) -> None:
        """New tokens where `place` (B, KV heads, T) says."""
        for room, tokens in zip((self.key_room, self.value_room, self.scores), new, strict=True):
            assert room is not None
            room.scatter_(2, _over(place, room), tokens.to(room.dtype))

    def _move(self, source: torch.Tensor, to: torch.Tensor) -> None:
        """Rows of the rooms, both (B, KV heads, rows)."""
        for room in (self.key_room, self.value_room, self.scores):
            assert room is not None
            room.scatter_(2, _over(to, room), room.gather(2, _over(source, room)))

    def _move_together(self, kept: torch.Tensor, stays: torch.Tensor) -> None:
        """Close the gaps that dropped tokens of a block leave, in the rows behind `kept`."""
        block = self.rule.block
        behind = stays.new_ones(*stays.shape[:2], self.rule.window + block)
        order = (~torch.cat((stays, behind), -1)).int().argsort(stable=True, dim=-1)
        places = kept[:, None, None] + torch.arange(order.shape[-1], device=self.device).expand_as(order)
        self._move(kept[:, None, None] + order, places)

    def real_tokens(self) -> np.ndarray:
        """How many each sequence has had, (B,)."""
        return np.full(len(self.scores), self.seen) if self.counts is None else self.counts.cpu().numpy()

    def kept_tokens(self) -> np.ndarray:
        """How many of each sequence's are held, (B,)."""
        return np.array([self._filled(n) for n in self.real_tokens().tolist()])

    def kv_nbytes(self) -> int:
        """Of the keys and values of the tokens that are held."""
        if self.key_room is None:
            return 0
        return int(self.kept_tokens().sum()) * 2 * self.key_room.shape[1] * self.key_room.shape[3] * self.dtype.itemsize

    def held_nbytes(self) -> int:
        """Of the tensors that hold them, room included."""
        return 0 if self.key_room is None else 2 * self.key_room.nbytes

    def position_bytes(self) -> int:
        return self.scores.nbytes

    def anchor_bytes(self) -> int:
        return self.signal.nbytes() + sum(block.nbytes for block in self.waiting)

    # What transformers asks of a layer of a cache.

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """What is new is given back as it is: `attend`, which the attention calls, takes it in."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: where the next one stands."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def reset(self) -> None:
        self._forget()

    def crop(self, *args, **kwargs) -> None:
        raise CacheMismatch(
            "a filtered cache cannot be cropped: what was dropped is not in it; leave out what crops it"
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.scores)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Sequences `indices` of the batch, with all that is known of them."""
        if not self.is_initialized:
            return
        assert self.keys is not None
        chosen, filled = indices.to(self.device), self.keys.shape[2]
        for name in ("key_room", "value_room", "scores", "counts"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, chosen))
        assert self.key_room is not None
        assert self.value_room is not None
        self.keys, self.values = self.key_room[:, :, :filled], self.value_room[:, :, :filled]
        self.signal.select(chosen)
        self.waiting = [block.of(chosen) for block in self.waiting]


class Ahead:
    """Scores of a long text's whole blocks, for many of them at once: a GPU then has fewer, larger things to do."""

    def __init__(self, before: Before, signal: Signal, seen: int):
        self.before, self.signal, self.seen = before, signal, seen
        self.first = self.end = 0
        self.found: torch.Tensor | None = None

    def scores(self, piece: slice) -> torch.Tensor:
        """Of one block (B, KV heads, block); blocks come in order, none is left out."""
        if piece.start >= self.end:
            tokens, block = self.before.keys.shape[2], piece.stop - piece.start
            whole = (tokens - piece.start) // block * block
            self.first, self.end = piece.start, piece.start + min(whole, max(AT_ONCE // block, 1) * block)
            positions = torch.arange(self.seen + self.first, self.seen + self.end, device=self.before.keys.device)
            part = self.before.part(slice(self.first, self.end))
            self.found = self.signal.scores(part, positions.unsqueeze(0), None)
        assert self.found is not None
        return self.found[:, :, piece.start - self.first : piece.stop - self.first]


def _over(index: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """(B, KV heads, rows), for each number of a row where it has some."""
    return index if room.dim() == 3 else index.unsqueeze(-1).expand(-1, -1, -1, room.shape[3])


def _causal(stored: int, new: int, device: torch.device) -> torch.Tensor:
    """(new, stored): the last tokens, which are new, see everything up to themselves."""
    slots = torch.arange(stored, device=device)
    return slots <= slots[stored - new :].unsqueeze(-1)


def _attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """(B, heads, T, width), with the query heads of a KV head side by side, so that keys are read once. mask (T, S), or
    (B, 1 or KV heads, T, S)."""
    batch, kv_heads, _, width = keys.shape
    tokens = query.shape[2]
    packed = query.reshape(batch, kv_heads, -1, width)  # (B, KV heads, groups * T, width)
    if mask is not None and tokens > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), query.shape[1] // kv_heads, 1)
    with for_any_shape(query.device):
        found = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return found.reshape(batch, -1, tokens, width)
