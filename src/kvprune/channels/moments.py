"""What the calibration text says of every layer's attention, layer by layer: who looks at what, and how it varies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import torch

from kvprune.channels.grouping import group_heads
from kvprune.models.finite import not_finite
from kvprune.models.stream import enter
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import rotate_half

Outputs = dict[str, torch.Tensor]  # what Q, K and V put out, (B, T, heads * D)


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
    slow_queries (H, n, n), slow_keys (H, m * n, m * n): of the n `slow` channels before RoPE, E q q^T and E c c^T.
    outputs (H, m * D, m * D): E z z^T of the attention outputs z, which are the group's values as the query heads mix
    them, without V's bias.
    """

    heads: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    slow_queries: torch.Tensor
    slow_keys: torch.Tensor
    outputs: torch.Tensor


@torch.no_grad()
def attention_moments(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    slow: torch.Tensor,
    merge: int,
    advance: Callable[[int], None],
) -> Iterator[AttentionMoments]:
    """Moments of every layer in turn, from one pass over the batches (B, T), for groups of `merge` KV heads.

    slow (n,): channel numbers, pair by pair. Memory: the hidden states of the text before one block, one layer's
    moments, one window's attention weights of one group, and, where the groups must be chosen, what one layer's Q, K
    and V put out. Raises NotFinite.
    """
    states, calls = enter(view, batches)
    tokens = sum(batch.numel() for batch in batches)
    chooses = 1 < merge < view.shape.kv_heads
    for index, (block, attention) in enumerate(zip(view.blocks, view.attention, strict=True)):
        waiting: list[tuple[Outputs, dict[str, Any]]] = []
        sums = None if chooses else _Sums(view, index, slow, torch.arange(view.shape.kv_heads).view(-1, merge))
        for number, state in enumerate(states):
            outputs: Outputs = {}
            hooks = [attention.watch(name, partial(outputs.__setitem__, name)) for name in "qkv"]
            try:
                states[number] = calls.run(block, index, state)
            finally:
                for hook in hooks:
                    hook.remove()
            told = outputs, calls.of_length[state.shape[1]][index].kwargs
            if sums is None:
                waiting.append(told)
            else:
                sums.add(*told)
        if sums is None:
            sums = _Sums(view, index, slow, group_heads([o for o, _ in waiting], view.units, merge))
            for told in waiting:
                sums.add(*told)
        yield sums.means(tokens, index)
        if not all(torch.isfinite(state).all() for state in states):
            raise not_finite(f"layer {index}: its output on the calibration text", view.lm)
        advance(1)


class _Sums:
    """Sums over queries and the query heads of each KV head, of one layer."""

    def __init__(self, view: ModelView, index: int, slow: torch.Tensor, heads: torch.Tensor):
        self.lm, s, attention = view.lm, view.shape, view.attention[index]
        self.shape, self.heads = s, heads
        rotary = view.lm.base_model.get_submodule("rotary_emb")
        self.stretch = float(cast(float, getattr(rotary, "attention_scaling", 1.0)))  # of cos and sin, as YaRN has it
        self.scaling = cast(float, attention.module.scaling)
        self.device = attention.projection("o").weight.device
        weights = attention.weights()
        self.v_bias, self.o = weights.v_bias, weights.o
        self.draws = torch.Generator().manual_seed(index)
        self.units, self.slow = view.units.to(self.device), slow.to(self.device)
        m, pairs, n = heads.shape[1], len(self.units), len(slow)
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.sums = AttentionMoments(
            heads,
            zeros(s.kv_heads, pairs),
            zeros(s.kv_heads, pairs, m, m, dtype=torch.complex128),
            zeros(s.kv_heads, n, n),
            zeros(s.kv_heads, m * n, m * n),
            zeros(s.kv_heads, m * s.head_dim, m * s.head_dim),
        )

    def add(self, outputs: Outputs, call: dict[str, Any]) -> None:
        """A batch of windows."""
        s, length = self.shape, outputs["q"].shape[1]
        cos, sin = (table[0].float() for table in call["position_embeddings"])  # (T, D)
        visible = _visible(call.get("attention_mask"), length, self.device)
        for q, k, v in zip(*(outputs[name] for name in "qkv"), strict=True):
            q = q.float().view(length, s.kv_heads, s.groups, s.head_dim).permute(1, 2, 0, 3) * self.scaling
            k = k.float().view(length, s.kv_heads, s.head_dim).transpose(0, 1)
            if self.v_bias is not None:
                v = v - self.v_bias.flatten()
            v = v.float().view(length, s.kv_heads, s.head_dim).transpose(0, 1)
            q_turned, k_turned = (x * cos + rotate_half(x) * sin for x in (q, k))
            for number, group in enumerate(self.heads):
                seen = _Seen.of(k[group], k_turned[group], v[group], self.slow, self.units)
                for member, head in enumerate(group.tolist()):
                    scores = (q_turned[head] @ k_turned[head].T).masked_fill_(~visible, -torch.inf)
                    effects = v[head] @ self._directions(head).T  # (T, groups)
                    self._add_head(number * len(group) + member, scores.softmax(-1), q[head], seen, effects.T)

    def _directions(self, head: int) -> torch.Tensor:
        """A random direction of the attention's output for each query head, as values see it: W_o u, (groups, D)."""
        of_head = self.o[head].float()  # (groups, D, hidden)
        drawn = torch.randn(len(of_head), of_head.shape[-1], generator=self.draws).to(self.device)
        return torch.einsum("gdh,gh->gd", of_head, drawn)

    def _add_head(self, row: int, weights: torch.Tensor, q: torch.Tensor, seen: "_Seen", effects: torch.Tensor) -> None:
        """weights (groups, T, T), q (groups, T, D) before RoPE, and effects (groups, T): each token's value along the
        directions; of one KV head's query heads."""
        a, b = (q[..., self.units[:, i]] for i in range(2))
        squares = (a * a + b * b) * self.stretch**2  # (groups, T, pairs)
        queries, sums = q[..., self.slow].flatten(0, 1).double(), self.sums
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
        found = AttentionMoments(
            self.heads,
            sums.queries / tokens,
            sums.keys / tokens,
            sums.slow_queries * self.stretch**4 / tokens,
            sums.slow_keys / (tokens * groups),
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
    def of(cls, k: torch.Tensor, k_turned: torch.Tensor, v: torch.Tensor, slow: torch.Tensor, units: torch.Tensor):
        """k, k_turned and v (m, T, D)."""
        turned = (k_turned - k_turned.mean(1, keepdim=True)).permute(1, 2, 0)  # (T, D, m)
        pairs = torch.complex(turned[:, units[:, 0]], turned[:, units[:, 1]])
        few = k[..., slow].transpose(0, 1).flatten(1)
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


def _visible(mask: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
    """(T, T), True where a query may look at a key; from the mask that the model made, or causal where it made none."""
    if mask is None:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = mask[0, 0]
    return mask if mask.dtype == torch.bool else mask >= 0
