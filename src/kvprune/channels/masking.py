"""A layer as if channels were gone, for probing: the dense weights of K and V, projected for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvprune.channels.basis import Basis, Kept
from kvprune.models.attention import Attention


@contextmanager
@torch.no_grad()
def masked(attention: Attention, kept: Kept, basis: Basis) -> Iterator[None]:
    """Lose what a plan would cut, and restore it bit for bit, also after an error.

    K and its bias are what comes back from the kept coordinates; so are V's weights. V keeps its bias, which is a
    constant at the output that surgery keeps too. `kept` may be empty: the attention then adds only that.
    """
    w = attention.weights()
    changed = [tensor for tensor in (w.k, w.v, w.k_bias) if tensor is not None]
    saved = [tensor.clone() for tensor in changed]
    of_keys, of_values = basis.cut(kept).projections()
    heads = basis.heads
    try:
        w.k[heads] = _projected(of_keys, w.k, heads)
        w.v[heads] = _projected(of_values, w.v, heads)
        if w.k_bias is not None:
            w.k_bias[heads] = _projected(of_keys, w.k_bias.unsqueeze(-1), heads).squeeze(-1)
        yield
    finally:
        for tensor, values in zip(changed, saved, strict=True):
            tensor.copy_(values)


def _projected(projection: torch.Tensor, rows: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Rows (kv_heads, D, x) of the heads (groups, m), side by side, projected: (groups, m, D, x)."""
    group = rows[heads].flatten(1, 2)
    found = projection.to(rows.device) @ group.double()
    return found.to(rows.dtype).view(*heads.shape, *rows.shape[1:])
