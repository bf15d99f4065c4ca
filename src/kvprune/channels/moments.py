"""What the calibration text says of every layer's attention, layer by layer: who looks at what, and how it varies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from kvprune.models.attention import Attention
from kvprune.models.finite import not_finite
from kvprune.models.stream import enter
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import rotate_half


@dataclass(frozen=True)
class AttentionMoments:
    """One layer, means over query tokens, summed over the group's query heads; float64, on the layer's device.

    pairs (kv_heads, D): the variance of a RoPE pair's contribution to a query's scores, over the keys as the
    attention weighs them, halved between the pair's two channels. Scores enter the softmax only up to a
    constant, so this variance is what a pair decides (half of it is the KL divergence that losing it costs, to second
    order).
    queries, keys (kv_heads, n, n): second moments of the `slow` channels before RoPE, scaled as in `pairs`: E q q^T,
    and the mean over queries of the keys' covariance as the attention weighs them.
    outputs (kv_heads, D, D): E z z^T of the attention outputs z before O, without V's bias.
    """

    pairs: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    outputs: torch.Tensor


@torch.no_grad()
def attention_moments(
    view: ModelView, batches: Sequence[torch.Tensor], slow: torch.Tensor, advance: Callable[[int], None]
) -> Iterator[AttentionMoments]:
    """Moments of every layer in turn, from one pass over the batches (B, T). slow (n,): channel numbers.

    Memory: the hidden states of the text before one block, one layer's moments, and one window's attention
    weights of one KV head's group. Raises NotFinite.
    """
    states, calls = enter(view, batches)
    tokens = sum(batch.numel() for batch in batches)
    for index, (block, attention) in enumerate(zip(view.blocks, view.attention, strict=True)):
        sums = _Sums(view, attention, slow)
        for number, state in enumerate(states):
            outputs: dict[str, torch.Tensor] = {}
            hooks = [attention.watch(name, partial(outputs.__setitem__, name)) for name in "qkv"]
            try:
                states[number] = calls.run(block, index, state)
            finally:
                for hook in hooks:
                    hook.remove()
            sums.add(outputs, calls.of_length[state.shape[1]][index].kwargs)
        yield sums.means(tokens, index)
        if not all(torch.isfinite(state).all() for state in states):
            raise not_finite(f"layer {index}: its output on the calibration text", view.lm)
        advance(1)


class _Sums:
    """Sums over queries and the group's heads of one layer."""

    def __init__(self, view: ModelView, attention: Attention, slow: torch.Tensor):
        self.lm, s = view.lm, view.shape
        self.shape = s
        rotary = view.lm.base_model.get_submodule("rotary_emb")
        self.stretch = float(cast(float, getattr(rotary, "attention_scaling", 1.0)))  # of cos and sin, as YaRN has it
        self.scaling = cast(float, attention.module.scaling)
        self.device = attention.projection("o").weight.device
        self.v_bias = attention.weights().v_bias
        self.units = view.units.to(self.device)
        self.slow = slow.to(self.device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.pairs = zeros(s.kv_heads, len(self.units))
        self.queries = zeros(s.kv_heads, len(slow), len(slow))
        self.keys, self.outputs = self.queries.clone(), zeros(s.kv_heads, s.head_dim, s.head_dim)

    def add(self, outputs: dict[str, torch.Tensor], call: dict[str, Any]) -> None:
        """outputs: what Q, K, V put out, (B, T, heads * D)."""
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
            for head in range(s.kv_heads):
                scores = q_turned[head] @ k_turned[head].T  # (groups, T, T)
                weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
                self._add_head(head, weights, q[head], k[head], q_turned[head], k_turned[head], v[head])

    def _add_head(self, head: int, weights, q, k, q_turned, k_turned, v) -> None:
        """weights (groups, T, T), q and q_turned (groups, T, D), k, k_turned and v (T, D)."""
        a, b = (self.units[:, i] for i in range(2))
        k_turned = k_turned - k_turned.mean(0)  # what all keys share has no variance, and would drown it in rounding
        ka, kb = k_turned[:, a], k_turned[:, b]  # (T, pairs)
        mean_a, mean_b, aa, ab, bb = (weights @ torch.cat((ka, kb, ka * ka, ka * kb, kb * kb), 1)).chunk(5, dim=-1)
        qa, qb = q_turned[..., a], q_turned[..., b]
        variance = qa * qa * (aa - mean_a * mean_a) + qb * qb * (bb - mean_b * mean_b)
        variance += 2 * qa * qb * (ab - mean_a * mean_b)
        self.pairs[head] += variance.sum((0, 1), dtype=torch.float64)
        queries = q[..., self.slow].flatten(0, 1).double()
        keys = k[:, self.slow]
        keys = keys - keys.mean(0)
        mean = (weights @ keys).flatten(0, 1).double()
        keys, seen = keys.double(), weights.sum((0, 1)).double().unsqueeze(1)
        self.queries[head] += queries.T @ queries
        self.keys[head] += (keys * seen).T @ keys - mean.T @ mean
        z = (weights @ v).flatten(0, 1).double()
        self.outputs[head] += z.T @ z

    def means(self, tokens: int, index: int) -> AttentionMoments:
        pairs = torch.zeros(self.shape.kv_heads, self.shape.head_dim, dtype=torch.float64, device=self.device)
        for channels in self.units.T:
            pairs[:, channels] = self.pairs.clamp_min(0) / (2 * tokens)
        found = AttentionMoments(
            pairs,
            queries=self.queries * self.stretch**4 / tokens,
            keys=self.keys / (tokens * self.shape.groups),
            outputs=self.outputs / tokens,
        )
        if not all(torch.isfinite(x).all() for x in (found.pairs, found.queries, found.keys, found.outputs)):
            raise not_finite(f"layer {index}: its attention on the calibration text", self.lm)
        return found


def _visible(mask: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
    """(T, T), True where a query may look at a key; from the mask that the model made, or causal where it made none."""
    if mask is None:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = mask[0, 0]
    return mask if mask.dtype == torch.bool else mask >= 0
