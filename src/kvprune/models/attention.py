"""One layer's attention, seen the same way for every family: (kv_head, group, channel, hidden).

The channels of queries and keys stand in one order whatever the family does: first those that RoPE turns as the first
of a pair, then those it leaves alone, then the second ones in the same order, so that a pair is (c, c + head_dim / 2).
Of channels that RoPE leaves alone two make a pair that turns by nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvprune.errors import UnsupportedArchitecture
from kvprune.models.family import Family


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a model's attention. `groups` is the number of query heads per KV head.

    layers: those with attention; attention_layers: their numbers among the blocks, None where that is all of them.
    per_layer: (kv_heads, head_dim) of each layer, where layers differ; kv_heads, groups and head_dim are then the first
    layer's. Empty where all are alike. sources: whose keys and values each layer attends to, its own or another's.
    Empty where all have their own.
    """

    layers: int
    hidden: int
    kv_heads: int
    groups: int
    head_dim: int
    per_layer: tuple[tuple[int, int], ...] = ()
    sources: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] | None = None

    def of(self, layer: int) -> "AttentionShape":
        """That of a model with all layers like this one."""
        if not self.per_layer:
            return replace(self, sources=()) if self.sources else self
        kv_heads, head_dim = self.per_layer[layer]
        groups = self.kv_heads * self.groups // kv_heads
        return replace(self, kv_heads=kv_heads, groups=groups, head_dim=head_dim, per_layer=(), sources=())

    @property
    def each(self) -> list["AttentionShape"]:
        """`of` every layer."""
        return [self.of(layer) for layer in range(self.layers)]

    @property
    def channels(self) -> int:
        """Of the keys of one token, all layers and KV heads together."""
        return sum(self.of(layer).kv_heads * self.of(layer).head_dim for layer in self.stores)

    @property
    def numbers(self) -> Sequence[int]:
        """Of the layers, among the blocks."""
        return range(self.layers) if self.attention_layers is None else self.attention_layers

    @property
    def stores(self) -> list[int]:
        """The layers with keys and values of their own."""
        return [layer for layer in range(self.layers) if self.source(layer) == layer]

    def source(self, layer: int) -> int:
        """The layer whose keys and values this one attends to."""
        return self.sources[layer] if self.sources else layer

    def sharing(self, store: int) -> list[int]:
        """The layers that attend to this one's keys and values, itself first."""
        return [layer for layer in range(self.layers) if self.source(layer) == store]

    @property
    def largest(self) -> "AttentionShape":
        """That of the layer that statistics take most memory for."""
        return max(self.each, key=lambda shape: shape.kv_heads * shape.head_dim**2)

    @property
    def head_dims(self) -> list[int]:
        """The widths of heads that there are, ascending."""
        return sorted({shape.head_dim for shape in self.each})

    @property
    def shared_heads(self) -> int:
        """KV heads that every layer has a multiple of: what divides them divides all layers' heads."""
        return gcd(*(shape.kv_heads for shape in self.each))


@dataclass(frozen=True)
class AttentionWeights:
    """Q (kv_heads, groups, D, hidden), K and V (kv_heads, D, hidden), O (kv_heads, groups, D, hidden).

    Biases: q (kv_heads, groups, D), k and v (kv_heads, D), o (hidden,); None where there is none.
    The same class holds gradients, with the same shapes. Not to be written to.
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
    """The view of one layer's attention module.

    order (D,): which of the family's channels stands at each place; is_in_order: whether that is its own. columns
    (D + 1,): the column of the family's table of cos and sin for the channel at each place, the last for no turn.
    frequencies (D / 2,): radians a token, 0 for none. stretch: what RoPE multiplies by as it turns. context: the
    farthest that a query looks back, tokens. source: the layer whose keys and values it attends to, if not its own.
    """

    def __init__(
        self,
        module: nn.Module,
        family: Family,
        shape: AttentionShape,
        inv_freq: torch.Tensor | None,
        stretch: float,
        context: int,
        source: "Attention | None" = None,
    ):
        self.module, self.family, self.shape, self.context, self.source = module, family, shape, context, source
        turning = inv_freq if inv_freq is not None and family.turns(module) else torch.empty(0)
        # A norm behind RoPE takes it out again
        self.stretch = stretch if len(turning) and not family.norm_behind_rope else 1.0
        if shape.head_dim % 2 or 2 * len(turning) > shape.head_dim:
            raise UnsupportedArchitecture(f"heads of {shape.head_dim} channels, of which RoPE turns {2 * len(turning)}")
        still = shape.head_dim // 2 - len(turning)
        known = torch.zeros(len(turning)) if turning.is_meta else turning.cpu()
        self.frequencies = torch.cat((known.double(), torch.zeros(still, dtype=torch.float64)))
        self.order, self.columns = _layout(shape.head_dim, len(turning), family, inv_freq)
        self.is_in_order = bool((self.order == torch.arange(shape.head_dim)).all())

    @property
    def units(self) -> torch.Tensor:
        """The channels that must leave Q and K together, (units, channels per unit)."""
        return rope_pairs(self.shape.head_dim)

    @property
    def is_normed(self) -> bool:
        """Whether a norm stands behind Q and K, whose projections then stay as they are, in the family's order."""
        return bool(self.family.norm_of)

    @property
    def has_normed_values(self) -> bool:
        """The same of V."""
        return bool(self.family.v_norm)

    @property
    def is_gated(self) -> bool:
        """Whether what a head puts out is multiplied, channel by channel, before O, which then stays as it is."""
        return self.family.gated

    @property
    def has_own_columns(self) -> bool:
        """Whether each channel has a column of its own in the table, in the family's order."""
        return self.is_in_order and bool((self.columns == torch.arange(len(self.columns))).all())

    @property
    def has_sinks(self) -> bool:
        """Whether attention weights sum to less than one."""
        return getattr(self.module, "sinks", None) is not None

    @property
    def is_more_than_scores(self) -> bool:
        """Whether more than differences of scores decides: with sinks, and where scores are capped."""
        return self.has_sinks or getattr(self.module, "attn_logit_softcapping", None) is not None

    def projection(self, name: str) -> nn.Module:
        """The module that holds projection "q", "k", "v" or "o", or the "gate". Where a layer has no V, that is K's;
        where it has neither they are its source's."""
        if self.source is not None and name in "kv":
            return self.source.projection(name)
        fused = self.family.qkv if name != "o" else ""
        found = getattr(self.module, fused or getattr(self.family, "q" if name == "gate" else name))
        return self.projection("k") if found is None and name == "v" else found

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases of Q, K, V and O, each once."""
        return list(dict.fromkeys(p for name in "qkvo" for p in self.projection(name).parameters()))

    def has_bias(self, name: str) -> bool:
        return getattr(self.projection(name), "bias", None) is not None

    @property
    def constant(self) -> torch.Tensor | None:
        """V's bias (kv_heads, D) where it comes out as a constant behind O: attention weights sum to one, unless there
        are sinks, or a norm stands behind V."""
        is_none = self.has_sinks or self.has_normed_values or not self.has_bias("v")
        return None if is_none else self.rows("v")[1]

    @property
    def device(self) -> torch.device:
        return cast(torch.Tensor, self.projection("o").weight).device

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.Tensor, self.projection("o").weight).dtype

    def rows(self, name: str, of: Callable[[torch.Tensor], torch.Tensor] = _itself) -> tuple[torch.Tensor, ...]:
        """The matrix of "q", "k", "v" or "gate" in the family's order of channels, (heads, D, hidden), and its bias
        (heads, D) if it has one."""
        s, module = self.shape, self.projection(name)
        heads = {"q": s.kv_heads * s.groups, "gate": s.kv_heads * s.groups, "k": s.kv_heads, "v": s.kv_heads}
        weight = of(module.weight)  # type: ignore[arg-type]
        found = [weight.T if isinstance(module, Conv1D) else weight]
        found += [of(module.bias)] if self.has_bias(name) else []  # type: ignore[arg-type]
        if self.family.qkv and self.family.split == "rows":
            sizes = [heads[n] * s.head_dim for n in "qkv"]
            found = [x.split(sizes)["qkv".index(name)] for x in found]
        elif self.family.qkv:  # of each head Q, K and V
            found = [x.unflatten(0, (heads["q"], 3, s.head_dim))[:, "qkv".index(name)].flatten(0, 1) for x in found]
        elif self.is_gated and name in ("q", "gate"):  # of each head the query and the gate
            found = [x.unflatten(0, (heads["q"], 2, s.head_dim))[:, int(name == "gate")].flatten(0, 1) for x in found]
        return tuple(x.unflatten(0, (heads[name], s.head_dim)) for x in found)

    def weights(self, of: Callable[[torch.Tensor], torch.Tensor] = _itself) -> AttentionWeights:
        """The weights, and each parameter's `of` in its place (its gradient)."""
        s, order = self.shape, slice(None) if self.is_in_order else self.order
        (q, *q_bias), (k, *k_bias), (v, *v_bias) = (self.rows(name, of) for name in "qkv")
        out = self.projection("o")
        weight = of(out.weight)  # type: ignore[arg-type]
        o = (weight.T if isinstance(out, Conv1D) else weight).unflatten(1, (s.kv_heads, s.groups, s.head_dim))
        return AttentionWeights(
            q=q[:, order].unflatten(0, (s.kv_heads, s.groups)),
            k=k[:, order],
            v=v,
            o=o.permute(1, 2, 3, 0),
            q_bias=q_bias[0][:, order].unflatten(0, (s.kv_heads, s.groups)) if q_bias else None,
            k_bias=k_bias[0][:, order] if k_bias else None,
            v_bias=v_bias[0] if v_bias else None,
            o_bias=of(out.bias) if self.has_bias("o") else None,  # type: ignore[arg-type]
        )


def _layout(
    head_dim: int, pairs: int, family: Family, inv_freq: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """order and columns of an `Attention` in which RoPE turns so many pairs."""
    turned = torch.arange(2 * pairs)
    first, second = (turned[::2], turned[1::2]) if family.rope == "interleaved" else turned.view(2, -1)
    still = torch.arange(2 * pairs, head_dim).view(2, -1)
    order = torch.cat((first, still[0], second, still[1]))
    numbers = torch.arange(pairs)
    columns = {"half": (numbers, numbers + pairs), "interleaved": (2 * numbers, 2 * numbers + 1)}
    left, right = columns.get(family.table, (numbers, numbers))
    width = 0 if inv_freq is None else len(inv_freq) * (1 if family.table == "narrow" else 2)
    none = torch.full((head_dim // 2 - pairs,), width)
    return order, torch.cat((left, none, right, none, torch.tensor([width])))


def rope_pairs(head_dim: int) -> torch.Tensor:
    """The channels that must leave Q and K together, (units, channels per unit): pairs (c, c + head_dim / 2)."""
    return torch.arange(head_dim).view(2, head_dim // 2).T.contiguous()
