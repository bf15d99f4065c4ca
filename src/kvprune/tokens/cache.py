"""A cache layer that holds the kept tokens only, each sequence as many as it has kept, and what deciding needs.

Positions are true: `columns` says where in the padded batch a kept token stood, which is what causality and sliding
windows are about. Absolute positions (real tokens so far, `counts`) are what warm-up and thresholds are about.
"""

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from kvprune.errors import CacheMismatch
from kvprune.tokens.settings import Settings
from kvprune.tokens.threshold import Threshold

STEP = 64  # tokens: by this much, or by an eighth, a full cache grows


class FilteredLayer(CacheLayerMixin):
    """keys, values (B, KV heads, room, head_dim), of which the first lengths[b] tokens are sequence b's.

    window: of a sliding-window layer, tokens; what has left it is dropped, at the latest when it is STEP tokens.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.columns = torch.empty(0)  # (B, room)
        self.lengths = np.zeros(0, dtype=np.int64)
        self.counts = np.zeros(0, dtype=np.int64)
        self.seen = 0  # columns so far, with padding
        self.anchor: torch.Tensor | None = None  # (B, 2, KV heads, head_dim): of keys, of values
        self.output_anchor: torch.Tensor | None = None  # (B, hidden)
        self.settings: Settings | None = None  # of the filter that made it
        self.skip: Threshold | None = None
        self.drop: Threshold | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Without room yet; states (B, KV heads, T, head_dim)."""
        batch = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.columns = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        self.lengths = np.zeros(batch, dtype=np.int64)
        self.counts = np.zeros(batch, dtype=np.int64)
        self.is_initialized = True

    def append(self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, kept: np.ndarray) -> None:
        """Keep some of the new tokens: keys, values (B, KV heads, T, head_dim), columns (T,), kept (B, T) bool."""
        new = kept.sum(1)
        if self.keys is not None and self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self._resize(self.lengths * 0, self.keys.shape[2])  # a copy, which can be written to
        self._make_room(int((self.lengths + new).max()))
        assert self.keys is not None
        assert self.values is not None
        if keys.shape[2] == 1:
            rows = np.flatnonzero(kept[:, 0])
            at = (torch.from_numpy(rows), slice(None), torch.from_numpy(self.lengths[rows]))
            if len(rows):
                self.keys[at], self.values[at] = keys[rows, :, 0], values[rows, :, 0]
                self.columns[at[0], at[2]] = self.seen
        else:
            for b in range(len(kept)):
                tokens = torch.from_numpy(np.flatnonzero(kept[b])).to(self.device)
                place = slice(self.lengths[b], self.lengths[b] + new[b])
                self.keys[b, :, place], self.values[b, :, place] = keys[b][:, tokens], values[b][:, tokens]
                self.columns[b, place] = columns[tokens]
        self.lengths = self.lengths + new

    def _make_room(self, needed: int) -> None:
        """For `needed` tokens of the longest sequence, with some to spare."""
        assert self.keys is not None
        if needed > self.keys.shape[2]:
            self._resize(self.lengths * 0, needed + max(STEP, needed // 8))

    def trim(self) -> None:
        """Drop what has left the window, if that is worth a copy."""
        stale = self.stale()
        if stale.max(initial=0) >= STEP:
            self._resize(stale, int((self.lengths - stale).max()) + STEP)

    def stale(self) -> np.ndarray:
        """How many of each sequence's first tokens no later query can see, (B,)."""
        if self.window is None:
            return np.zeros_like(self.lengths)
        old = self.columns <= self.seen - self.window
        return np.array([int(old[b, :n].sum()) for b, n in enumerate(self.lengths)], dtype=np.int64)

    def _resize(self, gone: np.ndarray, room: int) -> None:
        """Copy into tensors with `room`, without the first gone[b] tokens of sequence b."""
        assert self.keys is not None
        assert self.values is not None
        keys = self.keys.new_zeros(*self.keys.shape[:2], room, self.keys.shape[3])
        values = self.values.new_zeros(*self.values.shape[:2], room, self.values.shape[3])
        columns = self.columns.new_zeros(len(gone), room)
        left = self.lengths - gone
        for b, (first, last, n) in enumerate(zip(gone, self.lengths, left, strict=True)):
            keys[b, :, :n], values[b, :, :n] = self.keys[b, :, first:last], self.values[b, :, first:last]
            columns[b, :n] = self.columns[b, first:last]
        self.keys, self.values, self.columns, self.lengths = keys, values, columns, left

    def of(self, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequence b's keys and values (1, KV heads, kept, head_dim), and their columns (kept,); views."""
        assert self.keys is not None
        assert self.values is not None
        n = self.lengths[b]
        return self.keys[b : b + 1, :, :n], self.values[b : b + 1, :, :n], self.columns[b, :n]

    def real_tokens(self) -> np.ndarray:
        """How many each sequence has had, (B,)."""
        return self.counts

    def kept_tokens(self) -> np.ndarray:
        """How many of each sequence's are held and may be seen, (B,)."""
        return self.lengths - self.stale()

    def position_bytes(self) -> int:
        return self.columns.nbytes

    def anchor_bytes(self) -> int:
        return sum(t.nbytes for t in (self.anchor, self.output_anchor) if t is not None)

    # What transformers asks of a layer of a cache.

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise CacheMismatch("this cache was made under a TokenFilter; use it under one, or start without a cache")

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: where the next one stands."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the layer that this one stands for, since layers that do not skip may share its mask."""
        if self.window is None:
            return self.seen + query_length, 0
        return min(self.seen, self.window - 1) + query_length, max(self.seen - self.window + 1, 0)

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length  # its name in older transformers

    def reset(self) -> None:
        self._forget()

    def crop(self, *args, **kwargs) -> None:
        raise CacheMismatch(
            "a filtered cache cannot be cropped: what was skipped is not in it; leave out what crops it"
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Sequences `indices` of the batch, with all that is known of them."""
        if not self.is_initialized:
            return
        chosen = indices.to(self.device)
        for name in ("keys", "values", "columns", "anchor", "output_anchor"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, chosen))
        host = indices.cpu().numpy()
        self.lengths, self.counts = self.lengths[host], self.counts[host]
        for threshold in (self.skip, self.drop):
            if threshold is not None:
                threshold.select(host)
