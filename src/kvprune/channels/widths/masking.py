"""A layer as if channels were gone, for probing: its keys and values go to the kept coordinates and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from kvprune.channels.choice.basis import Basis, Kept
from kvprune.models.attention import Attention
from kvprune.models.tap import Seen, watched


@contextmanager
def masked(attention: Attention, kept: Kept, basis: Basis) -> Iterator[None]:
    """Attend, under `tapped`, with what comes back from the kept coordinates, as the pruned model does, in which mixed
    slow pairs do not turn. V's bias is no part of it where it is a constant at the output, which surgery keeps too.
    `kept` may be empty: the attention then adds only that."""
    of_keys, of_values = basis.cut(kept).projections()
    heads, slow, bias = basis.heads, basis.slow, attention.constant
    # What does not turn adds the same for all keys, which no softmax sees; there and back it could become huge
    constant = basis.slow_means().to(attention.device, attention.dtype) * (not attention.is_more_than_scores)

    def change(seen: Seen) -> Seen:
        query, key, value = seen.query, seen.key, seen.value
        if len(slow):
            query, key = query.clone(), key.clone()
            query[..., slow] = (seen.before_rope(seen.query, slow) * attention.stretch**2).to(query.dtype)
            key[..., slow] = (seen.before_rope(seen.key, slow) - constant).to(key.dtype)
        shared = 0 if bias is None else bias.unsqueeze(1)  # (kv_heads, 1, D)
        value = _projected(of_values, value - shared, heads) + shared
        return replace(seen, query=query, key=_projected(of_keys, key, heads), value=value)

    with watched(attention, change):
        yield


def _projected(projection: torch.Tensor, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, kv_heads, T, D) of the heads (groups, m), side by side, projected (groups, m * D, m * D)."""
    group = x[:, heads].transpose(2, 3).flatten(3)  # (B, groups, T, m * D)
    found = group.float() @ projection.to(x.device, torch.float32).mT
    changed = torch.empty_like(x)
    changed[:, heads] = found.to(x.dtype).unflatten(3, (heads.shape[1], -1)).transpose(2, 3)
    return changed
