"""Scores and a width -> the coordinates that stay."""

from collections.abc import Sequence

import torch

from kvprune.channels.choice.basis import Basis, Kept
from kvprune.channels.evidence.importance.base import Scores, normalised


def select(scores: Scores, width: int, units: torch.Tensor, joint: bool) -> Kept:
    """The best `width` channels of each KV head, each head for itself.

    Q and K lose whole `units` (RoPE pairs, (units, channels per unit)), so width is a multiple of the unit.
    joint: one index set for Q, K, V and O, by the mean of their normalised scores (KVPruner); then V and O lose
    units too. Otherwise Q/K and V/O are chosen apart. Scores without any for V/O: their leading coordinates stay.
    """
    if not scores.vo.numel():
        return Kept(_top(scores.qk, width, units), leading(len(scores.qk), width))
    singles = torch.arange(scores.vo.shape[1]).unsqueeze(1)
    if joint:
        both = (normalised(scores.qk) + normalised(scores.vo)) / 2
        kept = _top(both, width, units)
        return Kept(kept, kept)
    return Kept(_top(scores.qk, width, units), _top(scores.vo, width, singles))


def shared_pairs(scores: Sequence[Scores]) -> list[Scores]:
    """Q/K scores that are the same for every head and layer: the mean of all, each normalised first [ours].

    For the portable layout, in which the whole model keeps one set of RoPE pairs, or of coordinates, whose numbers
    mean the same in every layer. V/O scores stay.
    """
    heads = torch.cat([score.qk for score in scores])  # (layers * groups, coordinates)
    common = torch.stack([normalised(head) for head in heads]).mean(0)
    return [Scores(common.expand_as(score.qk), score.vo) for score in scores]


def one_of_each(basis: Basis) -> Kept:
    """As many coordinates as a dense head has channels: the first component of every RoPE pair that turns, and of the
    slow pairs as many leading directions as one head has. For the stock layout; nothing else would be a stock head."""
    groups, m = basis.heads.shape
    first = torch.cat((torch.arange(0, basis.turning, m), basis.turning + torch.arange(len(basis.slow) // 2)))
    return Kept(torch.cat((first, first + basis.width // 2)).repeat(groups, 1), leading(groups, basis.width // m))


def _top(score: torch.Tensor, width: int, units: torch.Tensor) -> torch.Tensor:
    """(kv_heads, D) -> (kv_heads, width): whole units, by the sum of their channels' scores."""
    totals = score[:, units].sum(-1)
    # A stable sort, so that equal scores give the same plan everywhere.
    order = totals.sort(dim=1, descending=True, stable=True).indices[:, : width // units.shape[1]]
    return units[order].flatten(1).sort(dim=1).values


def leading(kv_heads: int, width: int) -> torch.Tensor:
    """(kv_heads, width): the first coordinates of every head."""
    return torch.arange(width).repeat(kv_heads, 1)
