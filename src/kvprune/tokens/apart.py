"""Late admission where each sequence is at its own position: what decides is tensors, where the model is.

Nothing is read back, and a step of decoding has no more to do at a decision than elsewhere.
"""

from dataclasses import dataclass

import torch

from kvprune.tokens.rooms import New, Rooms, attention

ALIGNED = 8  # columns of a mask: what a GPU's attention reads without a copy


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


class Apart(Rooms):
    """`counts` (B,) are the real tokens of each sequence so far."""

    def _attend_one(self, query: torch.Tensor, new: New, shared: Shared, scaling: float | None) -> torch.Tensor:
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
        return attention(query, self.keys, self.values, one.mask, scaling)

    def _one(self, real: torch.Tensor | None, dtype: torch.dtype) -> One:
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

    def _attend_apart(self, query: torch.Tensor, new: New, shared: Shared, scaling: float | None) -> torch.Tensor:
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
        new: New,
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
        output = attention(query, self.key_room[:, :, :width], self.value_room[:, :, :width], mask, scaling)

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

    def _move_together(self, kept: torch.Tensor, stays: torch.Tensor) -> None:
        """Close the gaps that dropped tokens of a block leave, in the rows behind `kept`."""
        block = self.rule.block
        behind = stays.new_ones(*stays.shape[:2], self.rule.window + block)
        order = (~torch.cat((stays, behind), -1)).int().argsort(stable=True, dim=-1)
        places = kept[:, None, None] + torch.arange(order.shape[-1], device=self.device).expand_as(order)
        self._move(kept[:, None, None] + order, places)
