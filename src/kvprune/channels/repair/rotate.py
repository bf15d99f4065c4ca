"""Rotation before the cut, so that what goes matters least: V and O in full, Q and K where RoPE hardly turns.

Nothing but a linear mix over tokens sits between V and O, so any invertible matrix per KV head may be put in
between for nothing. Between Q and K sits RoPE; but the slowest pairs hardly turn over any distance that matters, and
among them Q and K may be mixed in the same way.
"""

from dataclasses import dataclass, replace

import torch

from kvprune.channels.moments import AttentionMoments
from kvprune.models.attention import AttentionWeights
from kvprune.models.view import ModelView

FLOOR = 1e-6  # of the mean variance: what a direction that never occurs is taken to have
SLOW = 0.5  # radians over SPAN tokens: the most that a pair may turn to be mixed with others [ours]
SPAN = 2048


@dataclass(frozen=True)
class Basis:
    """y -> down @ y, and back with up; (kv_heads, n, n), float64, inverses of each other, leading directions first."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Rotation:
    """One layer's bases: of the values, and of the keys' `slow` channels (None: Q and K stay as they are).

    slow (n,): channel numbers, pair by pair, the slowest pair first, so that the leading directions turn least.
    """

    values: Basis
    keys: Basis | None
    slow: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, for a file; `of` is the way back."""
        found = {"slow": self.slow, "values.down": self.values.down, "values.up": self.values.up}
        if self.keys is not None:
            found |= {"keys.down": self.keys.down, "keys.up": self.keys.up}
        return found

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "Rotation":
        keys = Basis(tensors["keys.down"], tensors["keys.up"]) if "keys.down" in tensors else None
        return cls(Basis(tensors["values.down"], tensors["values.up"]), keys, tensors["slow"])

    def turned(self, w: AttentionWeights) -> AttentionWeights:
        """The weights in the new bases: the same function for V/O, nearly the same for Q/K."""
        down, up = (x.to(w.v.device) for x in (self.values.down, self.values.up))
        turned = replace(
            w,
            v=(down @ w.v.double()).to(w.v.dtype),
            v_bias=None if w.v_bias is None else (down @ w.v_bias.double().unsqueeze(-1)).squeeze(-1).to(w.v.dtype),
            o=(up.mT.unsqueeze(1) @ w.o.double()).to(w.o.dtype),
        )
        if self.keys is None:
            return turned
        down, up, slow = (x.to(w.k.device) for x in (self.keys.down, self.keys.up, self.slow))
        q, k = w.q.clone(), w.k.clone()
        q[:, :, slow] = (up.mT.unsqueeze(1) @ w.q[:, :, slow].double()).to(q.dtype)
        k[:, slow] = (down @ w.k[:, slow].double()).to(k.dtype)
        q_bias, k_bias = w.q_bias, w.k_bias
        if q_bias is not None and k_bias is not None:
            q_bias, k_bias = q_bias.clone(), k_bias.clone()
            q_bias[:, :, slow] = (q_bias[:, :, slow].double() @ up).to(q.dtype)
            k_bias[:, slow] = (down @ k_bias[:, slow].double().unsqueeze(-1)).squeeze(-1).to(k.dtype)
        return replace(turned, q=q, k=k, q_bias=q_bias, k_bias=k_bias)


def slow_channels(view: ModelView) -> torch.Tensor:
    """The channels of the pairs that turn by less than SLOW over SPAN tokens, pair by pair, slowest first; (n,)."""
    frequencies = view.frequencies  # (pairs,)
    order = frequencies.argsort()
    chosen = order[frequencies[order] * SPAN <= SLOW]
    return view.units[chosen].flatten()


def value_basis(moments: AttentionMoments, o: torch.Tensor) -> Basis:
    """The first d directions are the best rank-d cut of E |W_o (z - z_hat)|^2, for every d at once [ours].

    z: attention outputs before O, which are values mixed over tokens, of all query heads of a group as one; o
    (kv_heads, groups, D, hidden): W_o is that of the whole group, stacked, since the group shares the values. The
    optimum is the singular value decomposition of W_o E[z z^T]^(1/2). Kept coordinates all have variance one, so none
    dominates a quantised cache.
    """
    root, inverse = _roots(moments.outputs)
    matrix = o.detach().double().transpose(1, 2).flatten(2).mT  # (kv_heads, groups * hidden, D)
    _, right = torch.linalg.eigh(root.mT @ (matrix.mT @ matrix) @ root)
    right = right.flip(-1)  # eigh is ascending
    return Basis(right.mT @ inverse, root @ right)


def key_basis(moments: AttentionMoments) -> tuple[Basis, torch.Tensor]:
    """The first d directions keep most of E Var[q^T k_hat], for queries unrelated to the keys' covariance [ours].

    Takes the slow channels as if RoPE did not turn them. Also returns what each direction keeps, (kv_heads, n),
    descending, in the unit of `moments.pairs`.
    """
    root, inverse = _roots(moments.keys)
    values, right = torch.linalg.eigh(root.mT @ moments.queries @ root)
    right, values = right.flip(-1), values.flip(-1).clamp_min(0)
    return Basis(right.mT @ inverse, root @ right), values


def turned_scores(pairs: torch.Tensor, kept: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
    """Scores (kv_heads, D) with the slow channels' replaced by those of the directions that take their place."""
    scores = pairs.clone()
    scores[:, slow.to(pairs.device)] = kept
    return scores


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R with R R^T = moment (plus a floor), and its inverse."""
    identity = torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    floor = FLOOR * moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    variance, directions = torch.linalg.eigh(moment + floor[:, None, None] * identity)
    root = variance.clamp_min(floor.unsqueeze(1)).sqrt().unsqueeze(1)
    return directions * root, (directions / root).mT
