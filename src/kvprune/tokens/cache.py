"""A cache layer that holds the kept tokens only, each sequence as many as it has kept, and what deciding needs.

Positions are true: `columns` says where in the padded batch a kept token stood, which is what causality and sliding
windows are about. Absolute positions (real tokens so far, `counts`) are what warm-up and thresholds are about.
"""

import torch
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from kvprune.errors import CacheMismatch
from kvprune.tokens.settings import Settings
from kvprune.tokens.threshold import Threshold

STEP = 64  # tokens: by this much, or by an eighth, a full cache grows
HOST = torch.device("cpu")


def decides_on(device: torch.device) -> bool:
    """Whether a step of decoding leaves its decisions on a device, and computes all rows: reading them back would make
    the host wait. Elsewhere the host reads them, and computes only the rows that attend."""
    return device.type == "cuda"


class FilteredLayer(CacheLayerMixin):
    """keys, values (B, KV heads, room, head_dim), of which the first lengths[b] tokens are sequence b's.

    lengths, counts (B,) and thresholds stand where a step of decoding decides. bound: what the host knows of the
    longest length, which is no more than that. window: of a sliding-window layer, tokens; what has left it is dropped,
    at the latest when it is STEP tokens.
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
        self.is_on_device = False  # whether a step of decoding decides where the model is
        self.columns = torch.empty(0)  # (B, room)
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.counts = torch.zeros(0, dtype=torch.long)
        self.bound = 0
        self.seen = 0  # columns so far, with padding
        self.has_padding = False  # among them
        self.anchor: torch.Tensor | None = None  # (B, 2, KV heads, head_dim): of keys, of values
        self.output_anchor: torch.Tensor | None = None  # (B, hidden)
        self.settings: Settings | None = None  # of the filter that made it
        self.skip: Threshold | None = None
        self.drop: Threshold | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Without room yet; states (B, KV heads, T, head_dim)."""
        batch = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_on_device = decides_on(self.device)
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.columns = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=self.home)
        self.counts = torch.zeros(batch, dtype=torch.long, device=self.home)
        self.is_initialized = True

    @property
    def home(self) -> torch.device:
        """Where a step of decoding decides."""
        return self.device if self.is_on_device else HOST

    def decides_next(self, tokens: int) -> bool:
        """Whether decisions about so many new tokens of each sequence stay where the model is: of a step of decoding,
        behind a prompt."""
        return self.is_on_device and tokens == 1

    def append(self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Keep some of the new tokens: keys, values (B, KV heads, T, head_dim), kept (B, T) bool, on the host if there
        are several. Of one token a sequence each is written, kept or not, behind those that are kept: it can be read
        there until the next one comes. Returns where that is, (B,)."""
        tokens, new = keys.shape[2], kept.sum(1)
        most = 1 if tokens == 1 else int(new.max())
        self._make_room(most)
        assert self.keys is not None
        assert self.values is not None
        place = self.lengths
        if tokens == 1:
            index = place.to(self.device).view(-1, 1, 1, 1)
            self.keys.scatter_(2, index.expand_as(keys), keys.to(self.keys.dtype))
            self.values.scatter_(2, index.expand_as(values), values.to(self.values.dtype))
            self.columns.scatter_(1, index.view(-1, 1), self.seen)
        else:
            for b, (first, n) in enumerate(zip(place.tolist(), new.tolist(), strict=True)):
                chosen = kept[b].nonzero()[:, 0].to(self.device)
                there = slice(first, first + n)
                self.keys[b, :, there], self.values[b, :, there] = keys[b][:, chosen], values[b][:, chosen]
                self.columns[b, there] = self.seen + chosen
        self.lengths = place + new.to(place.device)
        self.bound += most
        return place

    def _make_room(self, more: int) -> None:
        """For so many more tokens of each sequence. Only where the room that is known may be too small the host asks
        how long the longest sequence is, which it does not again for STEP steps of decoding."""
        assert self.keys is not None
        room = self.keys.shape[2]
        if self.bound + more > room:
            gone = self.stale()
            self.bound = int((self.lengths - gone).max())
            if self.window is not None or self.bound + more + STEP > room:
                self._resize(gone, self.bound + more + max(STEP, (self.bound + more) // 8))
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self._resize(torch.zeros_like(self.lengths), self.keys.shape[2])  # a copy, which can be written to

    def trim(self) -> None:
        """Behind a prompt: drop what has left the window, if that is worth a copy."""
        if self.window is None:
            return
        gone = self.stale()
        if int(gone.max()) >= STEP:
            self.bound = int((self.lengths - gone).max())
            self._resize(gone, self.bound + STEP)

    def stale(self) -> torch.Tensor:
        """How many of each sequence's first tokens no later query can see, (B,)."""
        if self.window is None:
            return torch.zeros_like(self.lengths)
        old = (self.columns <= self.seen - self.window) & self._are_before(self.lengths)
        return old.sum(1).to(self.home)

    def _are_before(self, place: torch.Tensor) -> torch.Tensor:
        """Which slots are, (B, room) bool; place (B,)."""
        return torch.arange(self.columns.shape[1], device=self.device) < place.to(self.device).unsqueeze(1)

    def visible(self, place: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """What one new token of each sequence sees, (B, 1, 1, room) bool: itself, which stands at `place` (B,), and
        where it is active (B, 1) what was kept before."""
        seen = self._are_before(place) & active
        if self.window is not None:
            seen &= self.columns > self.seen - self.window
        itself = torch.zeros_like(seen).scatter_(1, place.unsqueeze(1), True)
        return (seen | itself)[:, None, None]

    def _resize(self, gone: torch.Tensor, room: int) -> None:
        """Copy into tensors with `room`, without the first gone[b] tokens of sequence b; what is left is `bound` at
        most."""
        assert self.keys is not None
        assert self.values is not None
        n = self.bound
        if self.window is None:
            keys, values, columns = self.keys[:, :, :n], self.values[:, :, :n], self.columns[:, :n]
        else:
            index = gone.to(self.device).unsqueeze(1) + torch.arange(n, device=self.device)
            index = index.clamp(max=max(self.columns.shape[1] - 1, 0))
            keys, values = (
                x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
                for x in (self.keys, self.values)
            )
            columns = self.columns.gather(1, index)
        self.keys, self.values = (pad(x, (0, 0, 0, room - n)) for x in (keys, values))
        self.columns, self.lengths = pad(columns, (0, room - n)), self.lengths - gone

    def of(self, b: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequence b's keys and values (1, KV heads, length, head_dim), and their columns (length,); views. length: of
        lengths, which the host has read."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[b : b + 1, :, :length], self.values[b : b + 1, :, :length], self.columns[b, :length]

    def real_tokens(self) -> torch.Tensor:
        """How many each sequence has had, (B,)."""
        return self.counts

    def kept_tokens(self) -> torch.Tensor:
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
        chosen, at_home = indices.to(self.device), indices.to(self.home)
        for name in ("keys", "values", "columns", "anchor", "output_anchor"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, chosen))
        self.lengths, self.counts = self.lengths.index_select(0, at_home), self.counts.index_select(0, at_home)
        for threshold in (self.skip, self.drop):
            if threshold is not None:
                threshold.select(at_home)
