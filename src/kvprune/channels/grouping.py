"""Which KV heads go together, where a group has not all of them: those that say most of the same [ours]."""

from collections.abc import Sequence

import torch

from kvprune.models.attention import AttentionShape


def group_heads(shape: AttentionShape, outputs: Sequence[dict[str, torch.Tensor]], merge: int) -> torch.Tensor:
    """The KV heads in groups of `merge`, (groups, merge). outputs: what K and V put out, (B, T, heads * D)."""
    return best_groups(likeness(shape, outputs), merge)


def likeness(shape: AttentionShape, outputs: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """(heads, heads): how much of two heads' keys, and of their values, is shared: the squared correlation of all their
    channels with all, summed. Keys before RoPE: a pair of one head is compared with the same pair of the other only,
    since only those can be mixed, and as complex numbers, so that a turn of one against the other does not count."""
    heads, half = shape.kv_heads, shape.head_dim // 2
    found = torch.zeros(heads, heads, dtype=torch.float64)
    total = sum(o["k"].shape[0] * o["k"].shape[1] for o in outputs)
    for name in "kv":
        mean = sum(o[name].flatten(0, 1).double().sum(0) for o in outputs) / total
        covariance: torch.Tensor | float = 0.0
        for o in outputs:
            x = (o[name].flatten(0, 1).double() - mean).view(-1, heads, shape.head_dim)
            if name == "k":
                x = torch.complex(x[..., :half], x[..., half:])
                covariance = covariance + torch.einsum("thp,tgp->phg", x, x.conj())
            else:
                flat = x.flatten(1)
                covariance = covariance + flat.T @ flat
        assert isinstance(covariance, torch.Tensor)
        found += (_of_keys(covariance) if name == "k" else _of_values(covariance, heads)).cpu()
    return found


def _of_keys(covariance: torch.Tensor) -> torch.Tensor:
    """(pairs, heads, heads) complex -> the mean over pairs, weighed by their variance, of the squared correlation."""
    variance = covariance.diagonal(dim1=1, dim2=2).real.clamp_min(1e-300)  # (pairs, heads)
    product = variance.unsqueeze(1) * variance.unsqueeze(2)
    weight = product.sqrt()
    return (covariance.abs().square() / product * weight).sum(0) / weight.sum(0)


def _of_values(covariance: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads * D, heads * D) -> |C_gh|^2 / (|C_gg| |C_hh|), Frobenius norms of the heads' blocks."""
    blocks = covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).square().sum((1, 3))
    own = blocks.diagonal().clamp_min(1e-300).sqrt()
    return blocks / torch.outer(own, own)


def best_groups(alike: torch.Tensor, size: int) -> torch.Tensor:
    """Groups of `size` heads with as much likeness (heads, heads) within them as swaps of two heads can reach.

    From the heads in their order; each round takes the best swap, so it ends. (heads / size, size), each ascending.
    """
    alike = (alike + alike.T) / 2
    groups = torch.arange(len(alike)).view(-1, size)
    while True:
        best, swap = 1e-12, None
        member = torch.zeros(len(groups), len(alike), dtype=alike.dtype)
        member.scatter_(1, groups, 1.0)
        to_group = alike @ member.T  # (heads, groups)
        of = member.argmax(0)
        for a in range(len(alike)):
            for b in range(a + 1, len(alike)):
                i, j = int(of[a]), int(of[b])
                if i == j:
                    continue
                gain = to_group[a, j] + to_group[b, i] - to_group[a, i] - to_group[b, j]
                gain = float(gain - 2 * alike[a, b] + alike[a, a] + alike[b, b])
                if gain > best:
                    best, swap = gain, (a, b)
        if swap is None:
            return groups.sort(1).values[groups.min(1).values.argsort()]
        a, b = swap
        places = [tuple(map(int, torch.nonzero(groups == head)[0])) for head in (a, b)]
        groups[places[0]], groups[places[1]] = b, a
