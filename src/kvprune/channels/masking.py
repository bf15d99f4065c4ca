"""A layer as if channels were gone, for probing: the dense tensors, with the removed rows zeroed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvprune.channels.repair.rotate import Rotation
from kvprune.channels.selection import Kept
from kvprune.models.attention import Attention


@contextmanager
@torch.no_grad()
def masked(attention: Attention, kept: Kept, rotation: Rotation | None = None) -> Iterator[None]:
    """Zero what a plan would cut, and restore it bit for bit, also after an error.

    Q and K lose the removed channels with their biases; V loses their weights and keeps their biases, which are
    a constant at the output that surgery keeps too. `kept` may be empty: the attention then adds only that. With a
    rotation, the channels are those of the turned weights.
    """
    w = attention.weights()
    gone = removed(kept.qk, attention.shape.head_dim).to(w.k.device)
    gone_vo = removed(kept.values, attention.shape.head_dim).to(w.v.device)
    changed = [(name, tensor) for name, tensor in vars(w).items() if tensor is not None]
    saved = [tensor.clone() for _, tensor in changed]
    try:
        if rotation is not None:
            turned = rotation.turned(w)
            for name, tensor in changed:
                tensor.copy_(getattr(turned, name))
        w.k[gone] = 0
        w.q.transpose(1, 2)[gone] = 0
        if w.k_bias is not None:
            w.k_bias[gone] = 0
        if w.q_bias is not None:
            w.q_bias.transpose(1, 2)[gone] = 0
        w.v[gone_vo] = 0
        yield
    finally:
        for (_, tensor), values in zip(changed, saved, strict=True):
            tensor.copy_(values)


def removed(kept: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Kept channels (kv_heads, width) -> mask (kv_heads, head_dim) of the others."""
    gone = torch.ones(kept.shape[0], head_dim, dtype=torch.bool)
    return gone.scatter_(1, kept.cpu(), False)
