"""A layer as if channels were gone, for probing: the dense tensors, with the removed rows zeroed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvprune.channels.selection import Kept
from kvprune.models.attention import Attention


@contextmanager
@torch.no_grad()
def masked(attention: Attention, kept: Kept) -> Iterator[None]:
    """Zero what a plan would cut, and restore it bit for bit, also after an error.

    Q and K lose the removed channels with their biases; V loses their weights and keeps their biases, which are
    a constant at the output that surgery keeps too. `kept` may be empty: the attention then adds only that.
    """
    weights = attention.weights()
    device = weights.k.device
    gone_qk = removed(kept.qk, attention.shape.head_dim).to(device)
    gone_vo = removed(kept.vo, attention.shape.head_dim).to(device)
    rows = [weights.k, weights.k_bias, weights.q.transpose(1, 2)]
    rows.append(None if weights.q_bias is None else weights.q_bias.transpose(1, 2))
    changes = [(tensor, gone_qk) for tensor in rows if tensor is not None] + [(weights.v, gone_vo)]
    saved = [tensor[gone] for tensor, gone in changes]
    try:
        for tensor, gone in changes:
            tensor[gone] = 0
        yield
    finally:
        for (tensor, gone), values in zip(changes, saved, strict=True):
            tensor[gone] = values


def removed(kept: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Kept channels (kv_heads, width) -> mask (kv_heads, head_dim) of the others."""
    gone = torch.ones(kept.shape[0], head_dim, dtype=torch.bool)
    return gone.scatter_(1, kept.cpu(), False)
