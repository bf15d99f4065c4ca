"""Where kept channels come from: a change of coordinates across the KV heads of a group, before the cut [ours].

A group of m KV heads of D channels becomes one KV head of m * D coordinates, each a mix of all the heads' channels,
those that matter most first to be kept. What remains is grouped-query attention of fewer, wider KV heads.

- Values: nothing but a linear mix over tokens sits between V and O, so any invertible matrix may be put in between.
- Keys: RoPE sits between Q and K. A pair of channels is a complex number that RoPE turns, by the pair's own frequency
  and for all heads alike, so for each pair any complex matrix across heads may be put in between. The slowest pairs
  hardly turn over any distance that matters: among them Q and K are mixed over pairs and heads alike.

m = 1 is a rotation inside each head, and `identity` no rotation at all.
"""

from dataclasses import dataclass, fields, replace

import torch

from kvprune.channels.evidence.moments import AttentionMoments
from kvprune.models.attention import Attention, AttentionWeights

FLOOR = 1e-6  # of the mean variance: what a direction that never occurs is taken to have
SLOW = 0.5  # radians over the model's whole context: the most that a pair may turn to be mixed with others [ours]


@dataclass(frozen=True)
class Kept:
    """Kept coordinates of one layer, ascending: qk and vo (groups, width), int64; their numbers are the basis's."""

    qk: torch.Tensor
    vo: torch.Tensor


@dataclass(frozen=True)
class Cut:
    """Linear maps of one layer, float64, H = groups * m dense KV heads in the order of the basis.

    From a group's m * D channels to what is kept: keys, values (groups, width, m * D). Back to each head's own D
    channels: queries, outputs (H, D, width); a query q becomes queries^T q, and what a head's attention puts out is
    outputs times what it mixed. rope (groups, width): the dense channel whose cos and sin turn each coordinate, or D
    for none: slow pairs are mixed as they are before RoPE, and only no turn at all commutes with that.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor
    rope: torch.Tensor

    def projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys and values of a group become when they go to the kept coordinates and back,
        (groups, m * D, m * D) each."""
        groups = len(self.keys)
        back = (x.unflatten(0, (groups, -1)).flatten(1, 2) for x in (self.queries, self.outputs))
        to_keys, to_values = back
        return to_keys @ self.keys, to_values @ self.values


@dataclass(frozen=True)
class Basis:
    """One layer's coordinates. n = m * D of them for each group of m KV heads, in pairs (c, c + n / 2).

    heads (groups, m): which KV heads each group has. rope (groups, n): the dense channel whose frequency turns a
    coordinate. keys, values (groups, n, n), float64: from channels to coordinates. slow (s,): the channel numbers
    whose pairs are mixed; the last m * s / 2 pairs of coordinates are theirs. moments: what the way back is fitted to;
    None where the coordinates are the channels themselves.
    """

    heads: torch.Tensor
    rope: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slow: torch.Tensor
    moments: AttentionMoments | None = None

    @property
    def width(self) -> int:
        return self.keys.shape[1]

    def cut(self, kept: Kept) -> Cut:
        """Keep some of the coordinates, and fit the way back: for each head what is best for its own queries, by least
        squares of the lost variance of its scores and outputs."""
        return self._aligned()._cut(kept)

    def _aligned(self) -> "Basis":
        """With moments of its own: in a mapped file they are not aligned as products want them."""
        if self.moments is None:
            return self
        own = {f.name: getattr(self.moments, f.name).clone() for f in fields(self.moments)}
        return replace(self, moments=AttentionMoments(**own))

    def _cut(self, kept: Kept) -> Cut:
        groups, m = self.heads.shape
        which = torch.arange(groups).unsqueeze(1)
        keys, values = self.keys[which, kept.qk], self.values[which, kept.vo]
        is_mixed = kept.qk % (self.width // 2) >= self.turning
        rope = self.rope[which, kept.qk].masked_fill(is_mixed, self.width // m)
        if self.moments is None:
            return Cut(keys, keys.mT.contiguous(), values, values.mT.contiguous(), rope)
        outputs = _way_back(self.moments.outputs, values.repeat_interleave(m, 0), m)
        return Cut(keys, self._queries(kept.qk, keys), values, outputs, rope)

    def slow_means(self) -> torch.Tensor:
        """The mean key of each KV head, in its own order, (kv_heads, 1, s), of the slow channels before RoPE; zeros
        where the coordinates are the channels."""
        means = torch.zeros(self.heads.numel(), len(self.slow), dtype=torch.float64)
        if self.moments is not None:
            means[self.heads.flatten()] = self.moments.slow_means
        return means.unsqueeze(1)

    @property
    def turning(self) -> int:
        """How many of the pairs of coordinates come from one pair of channels each; slow ones stand behind them."""
        return self.width // 2 - self.heads.shape[1] * len(self.slow) // 2

    def _queries(self, kept: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The way back of the keys, (H, D, width); kept (groups, width), keys (groups, width, n)."""
        groups, m = self.heads.shape
        found = torch.zeros(groups, m, self.width // m, kept.shape[1], dtype=torch.float64)
        for group in range(groups):
            for pair in self.rope[group, : self.turning].unique().tolist():
                self._add_pair(found[group], group, pair, kept[group], keys[group])
            self._add_slow(found[group], group, kept[group], keys[group])
        return found.flatten(0, 1)

    def _add_pair(self, found: torch.Tensor, group: int, pair: int, kept: torch.Tensor, keys: torch.Tensor) -> None:
        """The kept components of one pair of channels that turns, into found (m, D, width)."""
        assert self.moments is not None
        m, size, _ = found.shape
        first = torch.nonzero((self.rope[group, kept] == pair) & (kept < self.turning)).flatten()
        if not len(first):
            return
        second = torch.searchsorted(kept, kept[first] + self.width // 2)
        a, b = pair, pair + size // 2  # its channels
        rows = keys[first].unflatten(1, (m, size))
        components = torch.complex(rows[..., a], -rows[..., b])  # the real row of p k is (Re p, -Im p)
        for member, moment in enumerate(self.moments.keys[group * m : (group + 1) * m, pair]):
            back = _way_back(moment.unsqueeze(0), components.unsqueeze(0), m, member)[0, 0]
            found[member, a, first], found[member, a, second] = back.real, -back.imag
            found[member, b, first], found[member, b, second] = back.imag, back.real

    def _add_slow(self, found: torch.Tensor, group: int, kept: torch.Tensor, keys: torch.Tensor) -> None:
        """The kept directions of the slow pairs, into found (m, D, width)."""
        assert self.moments is not None
        m, size, _ = found.shape
        mixed = torch.nonzero(kept % (self.width // 2) >= self.turning).flatten()
        if len(mixed):
            rows = keys[mixed].unflatten(1, (m, size))[..., self.slow].flatten(1)  # (mixed, m * s)
            moments = self.moments.slow_keys[group * m : (group + 1) * m]
            found[:, self.slow.unsqueeze(1), mixed] = _way_back(moments, rows.expand(m, -1, -1), m)

    def of_values(self) -> "Basis":
        """This basis with the keys' channels as they are; for m = 1."""
        same = identity(*self.rope.shape)
        return replace(self, keys=same.keys, rope=same.rope, slow=same.slow)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, real, for a file; `of` is the way back, of a mapped file too."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moments"}
        if self.moments is not None:
            found |= {"moments." + f.name: getattr(self.moments, f.name) for f in fields(self.moments)}
            found["moments.keys"] = torch.view_as_real(self.moments.keys)
        return found

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "Basis":
        moments = {name.removeprefix("moments."): t for name, t in tensors.items() if name.startswith("moments.")}
        if moments:
            moments["keys"] = torch.view_as_complex(moments["keys"])
        own = {f.name: tensors[f.name] for f in fields(cls) if f.name != "moments"}
        return cls(**own, moments=AttentionMoments(**moments) if moments else None)


def identity(kv_heads: int, head_dim: int) -> Basis:
    """Each KV head for itself, and its channels as they are."""
    same = torch.eye(head_dim, dtype=torch.float64).expand(kv_heads, -1, -1)
    every = torch.arange(kv_heads).unsqueeze(1)
    return Basis(every, torch.arange(head_dim).expand(kv_heads, -1), same, same, torch.empty(0, dtype=torch.int64))


def slow_channels(attention: Attention) -> torch.Tensor:
    """The channels of the pairs that turn by SLOW at most over all that the layer looks back on, pair by pair, slowest
    first; (n,). Without RoPE these are all. Pairs that turn more within it cost much at its far end: see
    docs/results-width.md."""
    turns = attention.frequencies * attention.context  # (pairs,)
    order = turns.argsort(stable=True)
    chosen = order[turns[order] <= SLOW]
    return torch.stack((chosen, chosen + len(turns)), 1).flatten()


def basis_of(moments: AttentionMoments, weights: AttentionWeights, slow: torch.Tensor) -> tuple[Basis, torch.Tensor]:
    """The basis of one layer, on the CPU, and what each coordinate of the keys is worth, (groups, n) float32: the
    squared change of the attention's output when it goes."""
    moments = moments.on_cpu()
    keys, worth, rope = key_basis(moments, slow.cpu(), weights.k.shape[1])
    values = value_basis(moments, weights.o.detach().cpu()[moments.heads.flatten()])
    return Basis(moments.heads, rope, keys, values, slow.cpu(), moments), worth.float()


def value_basis(moments: AttentionMoments, o: torch.Tensor) -> torch.Tensor:
    """(groups, n, n): the first d coordinates are the best rank-d cut of E |W_o (z - z_hat)|^2, for every d at once
    [ours].

    z: attention outputs before O of all query heads of a group, which are the group's values mixed over tokens, taken
    to vary alike for all of its heads; o (H, query heads of a KV head, D, hidden), in the order of the moments. The
    optimum is the singular value decomposition of W_o E[z z^T]^(1/2). All coordinates have variance one, so none
    dominates a quantised cache.
    """
    gram = torch.einsum("hgdx,hgex->hde", o.double(), o.double())
    return _directions(gram, moments.outputs, moments.heads.shape)[0]


def key_basis(
    moments: AttentionMoments, slow: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(groups, n, n), and the worth and rope of each coordinate, (groups, n).

    Pairs that turn: for each, the m components that keep most of sum over heads of E |q|^2 Cov, leading first. Slow
    pairs: real directions over all of them and all heads, which keep most of E Var[q^T k_hat], for queries unrelated to
    the keys' covariance. A component is worth half its energy, for the phases of q and k are unrelated.
    """
    groups, m = moments.heads.shape
    n, half = m * head_dim, head_dim // 2
    still = set(slow.tolist())
    fast = [pair for pair in range(half) if pair not in still]
    down = torch.zeros(groups, n, m, head_dim, dtype=torch.float64)
    worth = torch.zeros(groups, n, dtype=torch.float64)
    rope = torch.zeros(groups, n, dtype=torch.int64)
    a = torch.arange(len(fast) * m)  # the first coordinate of each pair of them; pair after pair of channels
    b = a + n // 2
    if fast:
        components, energy = _components(moments, fast)  # (groups, pairs, m, m), (groups, pairs, m)
        channel = torch.tensor(fast).repeat_interleave(m)
        rows = components.flatten(1, 2)  # (groups, pairs * m, m)
        down[:, a, :, channel], down[:, a, :, channel + half] = rows.real.transpose(0, 1), -rows.imag.transpose(0, 1)
        down[:, b, :, channel], down[:, b, :, channel + half] = rows.imag.transpose(0, 1), rows.real.transpose(0, 1)
        worth[:, a] = worth[:, b] = energy.flatten(1) / 4
        rope[:, a], rope[:, b] = channel, channel + half
    if len(slow):
        matrix, kept = _directions(moments.slow_queries, moments.slow_keys, moments.heads.shape)
        pairs = torch.arange(m * len(slow) // 2)
        for part in range(2):
            place = len(a) + pairs + part * (n // 2)
            down[:, place.unsqueeze(1), :, slow] = matrix[:, part::2].unflatten(2, (m, -1)).permute(1, 3, 0, 2)
            worth[:, place] = kept[:, part::2]
            rope[:, place] = slow.view(-1, 2)[pairs // m, part]
    return down.flatten(2), worth, rope


def _components(moments: AttentionMoments, fast: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """P (groups, pairs, m, m), complex, and the energies (groups, pairs, m), descending: the singular value
    decomposition of W^(1/2) K^(1/2), K the mean of the heads' covariances and W their queries' energies."""
    groups, m = moments.heads.shape
    energy = moments.queries[:, fast].clamp_min(1e-300)  # (H, pairs)
    keys = moments.keys[:, fast]
    mean = (keys / energy[..., None, None]).unflatten(0, (groups, m)).mean(1)  # (groups, pairs, m, m)
    root, inverse = _roots(mean)
    weight = energy.unflatten(0, (groups, m)).transpose(1, 2).unsqueeze(-1)  # (groups, pairs, m, 1)
    values, right = torch.linalg.eigh(root.mH @ (weight * root))
    return right.flip(-1).mH @ inverse, values.flip(-1).clamp_min(0)


def _directions(
    weights: torch.Tensor, covariances: torch.Tensor, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (groups, m * s, m * s), the first d of which are the best rank-d cut, and what each keeps (groups, m * s).

    weights (H, s, s): how much each head's own s coordinates matter; covariances (H, m * s, m * s): of its group's, of
    which the heads' mean is taken; shape: (groups, m). All kept coordinates have variance one.
    """
    groups, m = shape
    s = weights.shape[1]
    weight = torch.zeros(groups, m, s, m, s, dtype=torch.float64)
    for j, own in enumerate(weights.unflatten(0, shape).unbind(1)):
        weight[:, j, :, j] = own
    root, inverse = _roots(covariances.unflatten(0, shape).mean(1))
    values, right = torch.linalg.eigh(root.mT @ weight.reshape(groups, m * s, m * s) @ root)
    return right.flip(-1).mT @ inverse, values.flip(-1).clamp_min(0)  # eigh is ascending


def _way_back(moment: torch.Tensor, down: torch.Tensor, m: int, member: int | None = None) -> torch.Tensor:
    """Least squares: B with E |y - B down x|^2 least, y the part of x that belongs to one head; E x x^* = moment.

    moment (H, n, n), x being m heads side by side, and down (H, width, n) -> (H, n / m, width): head h's own part is
    the h % m-th, or the `member`-th.
    """
    across = moment @ down.mH  # E x (down x)^*
    inner = down @ across
    floor = FLOOR * inner.diagonal(dim1=1, dim2=2).real.mean(1).clamp_min(1e-300)
    inner = inner + floor[:, None, None] * torch.eye(inner.shape[-1], dtype=inner.dtype)
    parts = across.unflatten(1, (m, -1))
    own = parts[:, member] if member is not None else parts[torch.arange(len(parts)), torch.arange(len(parts)) % m]
    return torch.linalg.solve(inner.mH, own.mH).mH


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R with R R^* = moment (plus a floor), and its inverse; (..., n, n), real or complex."""
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    floor = FLOOR * moment.diagonal(dim1=-2, dim2=-1).real.mean(-1).clamp_min(1e-30)
    variance, directions = torch.linalg.eigh(moment + floor[..., None, None] * identity)
    root = variance.clamp_min(floor.unsqueeze(-1)).sqrt().unsqueeze(-2)
    return directions * root, (directions / root).mH
