"""What the calibration text says of every layer's attention, layer by layer: who looks at what, and how it varies."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch

from kvprune.channels.evidence.grouping import group_heads
from kvprune.models.finite import not_finite
from kvprune.models.held import held
from kvprune.models.stream import Calls, enter
from kvprune.models.tap import Seen, hidden_in, tapped, watched, weights_of
from kvprune.models.view import ModelView
from kvprune.processes import count, mine, number, summed


@dataclass(frozen=True)
class AttentionMoments:
    """One layer, means over query tokens, each summed over the query heads of one KV head; on the layer's device.

    The KV heads stand in groups of m, and a KV head's queries are related to the keys and values of its whole group:
    that is what a cut across heads needs. heads (groups, m): the dense KV heads of each group, which is also the order
    of the others' first dim, H = groups * m. D channels a head in pairs of RoPE; a pair is a complex number.
    queries (H, pairs): E |q|^2 of a pair, scaled as in the scores.
    keys (H, pairs, m, m), complex: E |q|^2 c c^*, with c, for the group's m keys k behind RoPE, the sum over tokens n
    of a_n u . W_o (v_n - z) k_n: what the head's output gains, to first order, along a random direction u of unit
    variance for each unit that q adds to the pair's scores. a are the attention's weights, v the values, z their mean
    under a. So E |q c|^2 is the squared change of the attention's output when the pair goes; what it adds to all scores
    alike changes nothing.
    slow_queries (H, n, n), slow_keys (H, m * n, m * n): of the n `slow` channels before RoPE, E q q^T and E c c^T;
    slow_means (H, n): the mean of the head's own keys there.
    outputs (H, m * D, m * D): E z z^T of the attention outputs z, which are the group's values as the query heads mix
    them, without V's bias.
    """

    heads: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    slow_queries: torch.Tensor
    slow_keys: torch.Tensor
    slow_means: torch.Tensor
    outputs: torch.Tensor

    def on_cpu(self) -> "AttentionMoments":
        return AttentionMoments(**{field.name: getattr(self, field.name).cpu() for field in fields(self)})


def together_of(
    layers: Sequence[tuple[AttentionMoments, torch.Tensor]],
) -> tuple[AttentionMoments, torch.Tensor]:
    """Moments and O (kv_heads, groups, D, hidden) of layers that attend to the same keys and values, as of one layer
    with all their query heads. One layer's are what they were.

    What each puts out is brought to the size of the first one's, roughly: a norm stands behind it [ours].
    """
    if len(layers) == 1:
        return layers[0]
    mixed = _relative([moments.outputs.diagonal(dim1=1, dim2=2).sum() for moments, _ in layers])
    matrix = _relative([o.double().square().sum() for _, o in layers])
    both = [a * b for a, b in zip(mixed, matrix, strict=True)]
    scales, found = {"outputs": mixed, "keys": both, "slow_keys": both}, {}
    for field in fields(AttentionMoments):
        of_each = [getattr(moments, field.name).cpu() for moments, _ in layers]
        scale = scales.get(field.name, [1.0] * len(layers))
        total = sum(x * factor for x, factor in zip(of_each, scale, strict=True))
        found[field.name] = of_each[0] if field.name in ("heads", "slow_means") else total
    scaled = [o.cpu() * factor**0.5 for (_, o), factor in zip(layers, matrix, strict=True)]
    return AttentionMoments(**found), torch.cat(scaled, 1)


def _relative(sizes: Sequence[torch.Tensor]) -> list[float]:
    """What brings each to the size of the first."""
    first, *_ = numbers = [max(float(size), 1e-300) for size in sizes]
    return [first / number for number in numbers]


@torch.no_grad()
def attention_moments(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    slow: Sequence[torch.Tensor],
    merge: int,
    advance: Callable[[int], None],
    known: Collection[int] = (),
) -> Iterator[AttentionMoments]:
    """Moments of every layer in turn, from one pass over the batches (B, T), for groups of `merge` KV heads; of the
    layers that are `known` none, the text only passes through them.

    slow, of each layer (n,): channel numbers, pair by pair. A layer's weights are there while its moments are looked
    at. Memory: the hidden states of the text before one block, one layer's moments, one window's attention weights of
    one group, and, where the groups must be chosen, one layer's queries, keys and values. Raises NotFinite.
    """
    if len(known) == view.shape.layers:
        return
    with tapped(view):
        states, calls = enter(view, mine(batches))
        tokens = sum(batch.numel() for batch in batches)
        for index, block in enumerate(view.blocks):
            layer = view.layer_at(index)
            with held(block):
                if layer is None or layer in known:
                    calls.take(block, index, states)
                else:
                    yield _moments(view, layer, states, calls, slow[layer], merge).means(tokens, index)
            if not all(torch.isfinite(state).all() for state in states):
                raise not_finite(f"layer {index}: its output on the calibration text", view.lm)
            advance(layer is not None)


def _moments(
    view: ModelView, layer: int, states: list[torch.Tensor], calls: Calls, slow: torch.Tensor, merge: int
) -> "_Sums":
    """Of one layer; takes `states` behind its block, in place."""
    attention, index = view.attention[layer], view.attention_layers[layer]
    waiting: list[Seen] = []
    every = torch.arange(attention.shape.kv_heads).view(-1, merge)
    chooses = 1 < merge < attention.shape.kv_heads
    sums = None if chooses else _Sums(view, layer, slow, every)
    for place, state in enumerate(states):
        with watched(attention, waiting.append if sums is None else sums.add):
            states[place] = calls.run(view.blocks[index], index, state, place)
    if sums is None:
        sums = _Sums(view, layer, slow, group_heads(waiting, attention.units, merge))
        for seen in waiting:
            sums.add(seen)
    return sums


class _Sums:
    """Sums over queries and the query heads of each KV head, of one layer."""

    def __init__(self, view: ModelView, layer: int, slow: torch.Tensor, heads: torch.Tensor):
        self.lm, attention = view.lm, view.attention[layer]
        s = attention.shape
        self.shape, self.heads, self.stretch = s, heads, attention.stretch
        weights = attention.weights()
        self.device, self.v_bias, self.o = attention.device, attention.constant, weights.o
        self.index, self.window = view.attention_layers[layer], number()
        self.units, self.slow = attention.units.to(self.device), slow.to(self.device)
        m, pairs, n = heads.shape[1], len(self.units), len(slow)
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.sums = AttentionMoments(
            heads,
            zeros(s.kv_heads, pairs),
            zeros(s.kv_heads, pairs, m, m, dtype=torch.complex128),
            zeros(s.kv_heads, n, n),
            zeros(s.kv_heads, m * n, m * n),
            zeros(s.kv_heads, n),
            zeros(s.kv_heads, m * s.head_dim, m * s.head_dim),
        )

    def add(self, seen: Seen) -> None:
        """A batch of windows."""
        s, hidden = self.shape, hidden_in(seen)
        for row in range(len(seen.query)):
            draws = torch.Generator().manual_seed(self.index << 32 | self.window)  # whoever has the window
            self.window += count()
            q = seen.query[row].float().unflatten(0, (s.kv_heads, s.groups)) * seen.scaling
            k, v = seen.key[row].float(), seen.value[row]
            if self.v_bias is not None:
                v = v - self.v_bias.unsqueeze(1)
            v = v.float()
            slow_q, slow_k = seen.before_rope(q, self.slow), seen.before_rope(k, self.slow)
            self.sums.slow_means.add_(slow_k[self.heads.flatten()].sum(1))
            for place, group in enumerate(self.heads):
                of_group = _Seen.of(k[group], slow_k[group], v[group], self.units)
                for member, head in enumerate(group.tolist()):
                    own = slice(head * s.groups, (head + 1) * s.groups)
                    weights = weights_of(seen, q[head] @ k[head].T, own, hidden)
                    effects = v[head] @ self._directions(head, draws).T  # (T, groups)
                    self._add_head(place * len(group) + member, weights, q[head], slow_q[head], of_group, effects.T)

    def _directions(self, head: int, draws: torch.Generator) -> torch.Tensor:
        """A random direction of the attention's output for each query head, as values see it: W_o u, (groups, D)."""
        of_head = self.o[head].float()  # (groups, D, hidden)
        drawn = torch.randn(len(of_head), of_head.shape[-1], generator=draws).to(self.device)
        return torch.einsum("gdh,gh->gd", of_head, drawn)

    def _add_head(
        self,
        row: int,
        weights: torch.Tensor,
        q: torch.Tensor,
        slow_q: torch.Tensor,
        seen: "_Seen",
        effects: torch.Tensor,
    ) -> None:
        """weights (groups, T, T), q (groups, T, D) behind RoPE, slow_q (groups, T, n) before it, and effects (groups,
        T): each token's value along the directions; of one KV head's query heads."""
        a, b = (q[..., self.units[:, i]] for i in range(2))
        squares = a * a + b * b  # (groups, T, pairs)
        queries, sums = slow_q.flatten(0, 1).double(), self.sums
        sums.queries[row] += squares.sum((0, 1), dtype=torch.float64)
        sums.slow_queries[row] += queries.T @ queries
        z = (weights @ seen.values).flatten(0, 1).double()
        sums.outputs[row] += z.T @ z
        centred = effects.unsqueeze(1) - weights @ effects.unsqueeze(-1)  # (groups, T, T)
        pairs, slow = seen.split((weights * centred) @ seen.columns)
        sums.keys[row] += sum(map(_outer, pairs, squares))
        slow = slow.flatten(0, 1).double()
        sums.slow_keys[row] += slow.T @ slow

    def means(self, tokens: int, index: int) -> AttentionMoments:
        sums, groups = self.sums, self.shape.groups
        for field in fields(sums):
            if field.name != "heads":
                summed(getattr(sums, field.name))
        found = AttentionMoments(
            self.heads,
            sums.queries / tokens,
            sums.keys / tokens,
            sums.slow_queries * self.stretch**4 / tokens,
            sums.slow_keys / (tokens * groups),
            sums.slow_means / tokens,
            sums.outputs / tokens,
        )
        if not all(torch.isfinite(getattr(found, field.name)).all() for field in fields(found)):
            raise not_finite(f"layer {index}: its attention on the calibration text", self.lm)
        return found


@dataclass(frozen=True)
class _Seen:
    """Keys and values of one group in a window, centred over its tokens: what all share has no variance, and would
    drown it in rounding. pairs (T, pairs, m) complex, behind RoPE; slow (T, m * n); columns: both side by side, as real
    numbers. values (T, m * D), which are not centred."""

    pairs: torch.Tensor
    slow: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, k: torch.Tensor, slow: torch.Tensor, v: torch.Tensor, units: torch.Tensor):
        """k behind RoPE and v (m, T, D), slow (m, T, n) before it."""
        turned = (k - k.mean(1, keepdim=True)).permute(1, 2, 0)  # (T, D, m)
        pairs = torch.complex(turned[:, units[:, 0]], turned[:, units[:, 1]])
        few = slow.transpose(0, 1).flatten(1)
        few = few - few.mean(0)
        columns = torch.cat((torch.view_as_real(pairs).flatten(1), few), 1)
        return cls(pairs, few, columns, v.transpose(0, 1).flatten(1))

    def split(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What became of the columns, (groups, T, ...), as pairs (groups, T, pairs, m) complex, and slow channels."""
        of_pairs, of_slow = mixed.tensor_split([2 * self.pairs[0].numel()], dim=-1)
        shape = *mixed.shape[:2], *self.pairs.shape[1:], 2
        return torch.view_as_complex(of_pairs.reshape(shape).contiguous()), of_slow


def _outer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over rows of weights x x^*, x (T, pairs, m) complex and weights (T, pairs) -> (pairs, m, m) complex128."""
    by_pair = x.transpose(0, 1)  # (pairs, T, m)
    return ((by_pair * weights.T.unsqueeze(-1)).mT @ by_pair.conj()).to(torch.complex128)
