"""The rooms of a cache layer under late admission: keys, values and scores, and all that is asked of a cache of them.

Keys and values are (B, KV heads, room, width); the tokens of a sequence stand in the order in which they came, kept
ones first, then those that are not decided yet. Which tokens are kept differs from KV head to KV head; how many does
not.
"""

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from kvprune.errors import CacheMismatch
from kvprune.runtime.attention import for_any_shape
from kvprune.tokens.admission import Admission, Schedule
from kvprune.tokens.signals import SIGNALS, Before, Signal

SPARE = 24  # a cache that must grow does by a part in so many

New = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # keys, values (B, KV heads, T, width), scores (B, KV heads, T)


class Rooms(CacheLayerMixin):
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

    def _put(self, new: New, place: torch.Tensor) -> None:
        """New tokens where `place` (B, KV heads, T) says."""
        for room, tokens in zip((self.key_room, self.value_room, self.scores), new, strict=True):
            assert room is not None
            room.scatter_(2, _over(place, room), tokens.to(room.dtype))

    def _move(self, source: torch.Tensor, to: torch.Tensor) -> None:
        """Rows of the rooms, both (B, KV heads, rows)."""
        for room in (self.key_room, self.value_room, self.scores):
            assert room is not None
            room.scatter_(2, _over(to, room), room.gather(2, _over(source, room)))

    def _filled(self, seen: int) -> int:
        """Tokens stored behind the last call, when the decision that is due there has not been made."""
        return self.schedule.stored(seen - 1) + 1 if seen else 0

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


def _over(index: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """(B, KV heads, rows), for each number of a row where it has some."""
    return index if room.dim() == 3 else index.unsqueeze(-1).expand(-1, -1, -1, room.shape[3])


def attention(
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
