"""Which KV heads go together, where a group has not all of them: those that say most of the same [ours]."""

from collections.abc import Sequence

import torch

from kvprune.models.tap import Seen
from kvprune.processes import summed

TINY = 1e-100  # a variance that is taken for none


def group_heads(seen: Sequence[Seen], units: torch.Tensor, merge: int) -> torch.Tensor:
    """The KV heads in groups of `merge`, (groups, merge). seen, units: see likeness."""
    return best_groups(likeness(seen, units), merge)


def likeness(seen: Sequence[Seen], units: torch.Tensor) -> torch.Tensor:
    """(heads, heads), 0 to 2: how much two heads' keys, and their values, have in common; 2 with itself.

    seen: calls of one layer's attention. units: RoPE's pairs of channels, (D / 2, 2).
    Values: the squared correlation of all channels with all. Keys, before RoPE: of a pair with the same pair of the
    other head, since only those can be mixed, and as complex numbers, so that a turn of one against the other does not
    count.
    """
    heads = seen[0].key.shape[1]
    found = torch.zeros(heads, heads, dtype=torch.float64)
    total = summed(torch.tensor([sum(s.key.shape[0] * s.key.shape[2] for s in seen)]))
    for name in ("key", "value"):
        of_name = [_by_token(s, name) for s in seen]
        mean = summed(torch.stack([x.sum(0) for x in of_name]).sum(0)) / total.to(of_name[0].device)
        covariance: torch.Tensor | float = 0.0
        for x in of_name:
            x = x - mean
            if name == "key":
                pairs = torch.complex(x[..., units[:, 0]], x[..., units[:, 1]])
                covariance = covariance + torch.einsum("thp,tgp->phg", pairs, pairs.conj())
            else:
                flat = x.flatten(1)
                covariance = covariance + flat.T @ flat
        assert isinstance(covariance, torch.Tensor)
        summed(covariance)
        found += (_of_keys(covariance) if name == "key" else _of_values(covariance, heads)).cpu()
    return found


def _by_token(seen: Seen, name: str) -> torch.Tensor:
    """Keys before RoPE, or values, (B * T, heads, D) float64."""
    x = getattr(seen, name)
    x = seen.before_rope(x.float()) if name == "key" else x
    return x.transpose(1, 2).flatten(0, 1).double()


def _of_keys(covariance: torch.Tensor) -> torch.Tensor:
    """(pairs, heads, heads) complex -> the mean over pairs, weighed by their variance, of the squared correlation."""
    variance = covariance.diagonal(dim1=1, dim2=2).real.clamp_min(TINY)  # (pairs, heads)
    product = variance.unsqueeze(1) * variance.unsqueeze(2)
    weight = product.sqrt()
    return (covariance.abs().square() / weight).sum(0) / weight.sum(0)


def _of_values(covariance: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads * D, heads * D) -> |C_gh|^2 / (|C_gg| |C_hh|), Frobenius norms of the heads' blocks."""
    blocks = covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).square().sum((1, 3))
    own = blocks.diagonal().clamp_min(TINY).sqrt()
    return blocks / torch.outer(own, own)


def best_groups(alike: torch.Tensor, size: int) -> torch.Tensor:
    """Groups of `size` heads with as much likeness (heads, heads) within them as swaps of two heads can reach.

    From the heads in their order; each round takes the best swap, so it ends. (heads / size, size), each ascending.
    """
    alike = (alike + alike.T) / 2
    own = alike.diagonal()
    enough = 1e-9 * float(alike.abs().max())  # what rounding alone could gain
    group = torch.arange(len(alike)) // size  # of each head
    while True:
        member = torch.nn.functional.one_hot(group).to(alike.dtype)  # (heads, groups)
        to_group = alike @ member
        moves = to_group[:, group] - to_group.gather(1, group.unsqueeze(1)) + own.unsqueeze(1)  # to where another is
        gain = moves + moves.T - 2 * alike
        gain[group.unsqueeze(1) == group] = -torch.inf
        best = int(gain.argmax())
        if not float(gain.flatten()[best]) > enough:
            break
        swap = torch.tensor(divmod(best, len(alike)))
        group[swap] = group[swap.flip(0)]
    groups = group.argsort(stable=True).view(-1, size)
    return groups[groups[:, 0].argsort()]
