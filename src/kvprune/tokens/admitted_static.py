"""Late admission with room for a whole text from the beginning: a step of decoding has the same shapes every time, and
writes into the same tensors, so that it is one graph (torch.compile, fullgraph=True)."""

from typing import Any

import torch

from kvprune.errors import CacheMismatch
from kvprune.tokens.admission import Admission
from kvprune.tokens.admitted import AdmittedLayer


class StaticAdmittedLayer(AdmittedLayer):
    """Each sequence at its own position, in rooms that never grow. rule.length: tokens of text that they have room for.

    What the host counts (`seen`) it counts outside of compiled steps only; the truth is in `columns` and `counts`.
    """

    columns: torch.Tensor | None = None  # (): tokens so far, with padding

    def __init__(self, rule: Admission, index: int, turns: torch.Tensor | None = None):
        assert rule.length is not None
        self.length: int = rule.length
        super().__init__(rule, index, turns)

    def _forget(self) -> None:
        super()._forget()
        self.columns = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        rule, batch = self.rule, len(key_states)
        self.reach = self.schedule.most(self.length)
        super()._make_room(0, self.reach + 2 * rule.block + rule.window + 1)
        self.counts = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.columns = torch.zeros((), dtype=torch.int64, device=self.device)
        super()._table(self.length)
        for tensor in (self.key_room, self.value_room, self.scores, self.counts, self.columns):
            torch._dynamo.mark_static_address(tensor)

    def attend(self, query, key, value, before, real, scaling, shared=None) -> torch.Tensor:
        """As AdmittedLayer. Raises CacheMismatch for more tokens than there is room for."""
        tokens = key.shape[2]
        if not torch.compiler.is_compiling():
            if self.seen + tokens > self.length:
                raise CacheMismatch(f"the text is longer than length ({self.length}); take a larger one")
            if not self.is_initialized:
                self.lazy_initialization(key, value)
                self.signal.begin(before.keys, query.shape[1])
        replaced: dict[tuple[Any, str], Any] = {(self, "counts"): self.counts, **self.signal.state()}
        seen = self.seen
        output = super().attend(query, key, value, before, real, scaling, shared)
        for (thing, name), tensor in replaced.items():
            tensor.copy_(getattr(thing, name))
            setattr(thing, name, tensor)
        assert self.columns is not None
        self.columns.add_(tokens)
        if torch.compiler.is_compiling():
            self.seen = seen
        return output

    def _reach(self, columns: int, more: int) -> int:
        return self.reach + more

    def _table(self, columns: int) -> torch.Tensor:
        assert self.table is not None
        return self.table

    def _make_room(self, filled: int, needed: int) -> None:
        pass

    def get_seq_length(self):
        return 0 if self.columns is None else self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self) -> int:
        return self.length

    get_max_cache_shape = get_max_length  # its name in older transformers

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise CacheMismatch("with length, sequences stay where they are: no beams; leave length out")
