"""Layers that lose their attention altogether, so that the others keep more [ours; an open question of KVPruner].

Which: those whose attention's going is estimated to cost least, each alone. How many, where that is asked: what costs
least in truth, all cuts at once, on the probed text; more layers are tried until that has not got better twice.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from kvprune.channels.choice.basis import Basis, Kept
from kvprune.channels.widths.allocation import Grid, round_widths, uniform
from kvprune.channels.widths.asked import AUTO, ratio_left
from kvprune.channels.widths.blocks import loss_behind
from kvprune.channels.widths.masking import masked
from kvprune.errors import UnreachableRatio
from kvprune.measure.loss import scored_tokens
from kvprune.models.held import held
from kvprune.models.stream import enter
from kvprune.models.tap import tapped
from kvprune.models.view import ModelView
from kvprune.processes import mine, summed

PATIENCE = 2  # numbers of layers that may be worse than the best before the search ends


def widths_without(dropped: Sequence[int], ratio: float, grid: Grid) -> list[int]:
    """Widths of all layers, 0 for those without attention, as even as the grid allows, with the asked total. Raises
    UnreachableRatio where what is left is too wide or too narrow."""
    own, left = ratio_left(ratio, grid.layers, 0, len(dropped)), grid.layers - len(dropped)
    widths = iter(round_widths(uniform(left, own), own, replace(grid, layers=left)))
    return [0 if layer in set(dropped) else next(widths) for layer in range(grid.layers)]


@torch.no_grad()
def masked_loss(
    view: ModelView, batches: Sequence[torch.Tensor], kept: Sequence[Kept], bases: Sequence[Basis]
) -> float:
    """Mean loss (nats) of the model with all layers cut, on token ids (B, T)."""
    with tapped(view):
        shares = mine(batches)
        states, calls = enter(view, shares)
        for index, block in enumerate(view.blocks):
            layer = view.layer_at(index)
            cut = nullcontext() if layer is None else masked(view.attention[layer], kept[layer], bases[layer])
            with held(block), cut:
                calls.take(block, index, states)
    total = summed(torch.tensor([loss_behind(view, shares, states)], dtype=torch.float64))
    return float(total) / scored_tokens(batches)


def choose_depth(
    asked: int | str,
    changes: Sequence[float],
    ratio: float,
    grid: Grid,
    loss_of: Callable[[list[int]], float],
    gone: Sequence[int] = (),
) -> list[int]:
    """Widths, layer by layer. changes: what each layer's attention is estimated to be worth (nats), each alone;
    loss_of: what widths cost in truth; gone: layers whose whole block goes. Raises UnreachableRatio."""
    order = sorted(set(range(grid.layers)) - set(gone), key=lambda layer: (changes[layer], layer))
    if asked != AUTO:
        return widths_without([*gone, *order[: int(asked)]], ratio, grid)
    best: tuple[float, list[int]] | None = None
    worse = number = 0
    while worse < PATIENCE and number < len(order):
        try:
            widths = widths_without([*gone, *order[:number]], ratio, grid)
        except UnreachableRatio:
            break
        loss = loss_of(widths)
        if best is None or loss < best[0]:
            best, worse = (loss, widths), 0
        else:
            worse += 1
        number += 1
    if best is None:
        return round_widths(uniform(grid.layers, ratio), ratio, grid)  # says why nothing is reached
    return best[1]
