"""One layer's attention, seen the same way for every family: (kv_head, group, channel, hidden).

The tensors are live views of the model's parameters: writing to them changes the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from kvprune.models.family import Family


@dataclass(frozen=True)
class AttentionShape:
    """Sizes that all layers of a model share. `groups` is the number of query heads per KV head."""

    layers: int
    hidden: int
    kv_heads: int
    groups: int
    head_dim: int


@dataclass(frozen=True)
class AttentionWeights:
    """Q (kv_heads, groups, D, hidden), K and V (kv_heads, D, hidden), O (kv_heads, groups, D, hidden).

    Biases: q (kv_heads, groups, D), k and v (kv_heads, D), o (hidden,); None where there is none.
    The same class holds gradients, with the same shapes.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None


def _itself(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


class Attention:
    """The view of one layer's attention module."""

    def __init__(self, module: nn.Module, family: Family, shape: AttentionShape):
        self.module = module
        self.family = family
        self.shape = shape

    def projection(self, name: str) -> nn.Linear:
        """The module that holds projection "q", "k", "v" or "o"."""
        return getattr(self.module, getattr(self.family, name))

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases of Q, K, V and O."""
        return [p for name in "qkvo" for p in self.projection(name).parameters()]

    def watch(self, name: str, callback: Callable[[torch.Tensor], None]):
        """Call back with what projection `name` puts out, (B, T, heads * D), at every forward; returns the hook."""
        return self.projection(name).register_forward_hook(lambda _module, _args, output: callback(output))

    def weights(self, of: Callable[[torch.Tensor], torch.Tensor] = _itself) -> AttentionWeights:
        """The weights as views; `of` may map each parameter to another tensor of its shape (its gradient)."""
        s = self.shape

        def heads(name: str, *sizes: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            linear = self.projection(name)
            bias = None if linear.bias is None else of(linear.bias).view(*sizes)
            return of(linear.weight).view(*sizes, s.hidden), bias

        q, q_bias = heads("q", s.kv_heads, s.groups, s.head_dim)
        k, k_bias = heads("k", s.kv_heads, s.head_dim)
        v, v_bias = heads("v", s.kv_heads, s.head_dim)
        out = self.projection("o")
        o = of(out.weight).view(s.hidden, s.kv_heads, s.groups, s.head_dim).permute(1, 2, 3, 0)
        o_bias = None if out.bias is None else of(out.bias)
        return AttentionWeights(q, k, v, o, q_bias, k_bias, v_bias, o_bias)


def rope_pairs(head_dim: int, rope: str) -> torch.Tensor:
    """The channels that must leave Q and K together, (units, channels per unit).

    "half": pairs (c, c + head_dim / 2). A family without RoPE would have units of one channel.
    """
    if rope != "half":
        raise NotImplementedError(f"rope layout {rope!r}")
    return torch.arange(head_dim).view(2, head_dim // 2).T.contiguous()
