"""What one layer's attention is made of, the same way for every family: queries and keys before RoPE, values, outputs.

Channels stand in the order of models/attention.py, in which RoPE turns (c, c + width / 2), whatever the family does.
"""

from typing import Any, cast

import torch
from torch import nn

from kvprune.models.attention import Attention
from kvprune.models.family import Family
from kvprune.runtime.modeling import rotate_half, with_still

Turns = tuple[torch.Tensor, torch.Tensor]


class Projections:
    """view: of a dense module; None: a pruned one, which has the same parts by its own names.

    is_fused: Q, K and V are one projection, so that all queries come with the keys.
    """

    def __init__(self, module: nn.Module, family: Family, view: Attention | None):
        self.module: Any = module
        self.family, self.view = family, view
        self.width = cast(int, module.head_dim if view is None else view.shape.head_dim)
        self.is_fused = view is not None and bool(family.qkv)
        self.outputs: Any = module.outputs if view is None else getattr(module, family.o)
        self.order = None if view is None or view.is_in_order else view.order
        self.columns = None if view is None or view.has_own_columns else view.columns[:-1]

    def keys_and_values(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """hidden (B, T, hidden) -> keys and values (B, T, KV heads, width), and queries (B, T, heads, width) if they
        come with them."""
        module, family = self.module, self.family
        if self.view is None:
            return self._heads(module.keys(hidden)), self._heads(module.values(hidden)), None
        if not self.is_fused:
            k, values = getattr(module, family.k)(hidden), getattr(module, family.v)
            v = self._heads(k if values is None else values(hidden))  # a layer may have no V of its own
            return self._ready(k, family.k_norm), getattr(module, family.v_norm)(v) if family.v_norm else v, None
        s, found = self.view.shape, getattr(module, family.qkv)(hidden)
        if family.split == "rows":
            sizes = [n * s.kv_heads * s.head_dim for n in (s.groups, 1, 1)]
            q, k, v = found.split(sizes, -1)
        else:
            q, k, v = (x.flatten(-2) for x in found.unflatten(-1, (-1, 3, s.head_dim)).unbind(-2))
        return self._ready(k, family.k_norm), self._heads(v), self._ready(q, family.q_norm)

    def queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., hidden) -> (..., heads, width), where they do not come with the keys."""
        if self.view is None:
            return self._heads(self.module.queries(hidden))
        return self._ready(getattr(self.module, self.family.q)(hidden), self.family.q_norm)

    def turns(self, position_embeddings: Turns | None) -> Turns | None:
        """cos and sin of each channel, (B or 1, KV heads or 1, T, width); None: RoPE turns nothing here."""
        if position_embeddings is None:
            return None
        cos, sin = position_embeddings
        if self.view is None:  # each KV head has kept its own pairs
            return cast(Turns, self.module.turns(cos, sin))
        if self.columns is not None:
            self.columns = self.columns.to(cos.device)
            cos, sin = (x[..., self.columns] for x in with_still(None, None, (cos, sin)))
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.width))

    def _ready(self, projected: torch.Tensor, norm: str) -> torch.Tensor:
        """Queries or keys of a dense module, behind the norm that it has there."""
        if self.family.norm_of == "all":
            projected = getattr(self.module, norm)(projected)
        found = self._heads(projected)
        if self.family.norm_of == "head":
            found = getattr(self.module, norm)(found)
        if self.order is None:
            return found
        self.order = self.order.to(found.device)
        return found[..., self.order]


def turned(x: torch.Tensor, turns: Turns | None) -> torch.Tensor:
    """Queries or keys behind RoPE, in their own dtype."""
    if turns is None:
        return x
    cos, sin = turns
    return (x * cos + rotate_half(x) * sin).to(x.dtype)
