"""Whole blocks that go, attention and MLP, so that the others keep more channels [ours; KVPruner leaves depth open].

Greedy, by the loss in truth: the block without which the model has the least loss on the probed text goes first; then
all others are measured again without it, and so on. Where a block goes, a constant takes its place, which is the mean
of what it added. ShortGPT (arXiv 2403.03853) removes the blocks whose output differs least from their input, in one go.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvprune.channels.journal import Journal
from kvprune.channels.widths.sensitivity import DENSE
from kvprune.measure.loss import next_token_loss, scored_tokens
from kvprune.models.finite import not_finite
from kvprune.models.held import held
from kvprune.models.stream import answering, enter
from kvprune.models.view import ModelView
from kvprune.processes import mine, summed


@dataclass(frozen=True)
class Dropped:
    """Layers whose blocks go, in that order; the rise of the mean loss (nats) once each has gone too; what each leaves
    behind, (hidden,). alone: the rise for every layer of the model, its block gone alone. In a hybrid blocks without
    attention are no layers here, and stay."""

    layers: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    constants: tuple[torch.Tensor, ...] = ()
    alone: tuple[float, ...] = ()


@contextmanager
def skipping(view: ModelView, dropped: Dropped) -> Iterator[None]:
    """These blocks pass on the hidden states that they are called with, each with its constant (hidden,) added."""

    def passed(constant: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states + constant.to(hidden_states)

    with ExitStack() as stack:
        for layer, constant in zip(dropped.layers, dropped.constants, strict=True):
            block = view.blocks[view.attention_layers[layer]]
            stack.enter_context(answering(block, partial(passed, constant)))
        yield


@torch.no_grad()
def choose_blocks(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    number: int,
    has_constants: bool,
    journal: Journal,
    advance: Callable[[int], None],
) -> Dropped:
    """Which blocks go, by the loss on token ids (B, T). has_constants: whether a block leaves one behind.

    A round a block, L (L + 1) / 2 block forwards: the text walks through the blocks once, and beside it, from each
    block on, the text without that block. Memory: its hidden states L times. The losses of a finished round go to the
    journal and are not measured again. `advance` counts layers that were walked through. Raises NotFinite.
    """
    layers, scored = view.shape.layers, scored_tokens(batches)
    found = Dropped()
    for turn in range(number):
        left = [layer for layer in range(layers) if layer not in found.layers]
        keys = {layer: turn * layers + layer for layer in left} | ({} if turn else {DENSE: DENSE})
        is_known = all((0, key) in journal.losses for key in keys.values())
        with skipping(view, found):
            losses, added = _walk(view, batches, [] if is_known else left, has_constants, advance)
        if not is_known:
            for layer, key in keys.items():
                journal.add(0, key, losses[layer])
        rises = {layer: (journal.losses[0, keys[layer]] - journal.losses[0, DENSE]) / scored for layer in left}
        best = min(left, key=lambda layer: (rises[layer], layer))
        found = Dropped(
            (*found.layers, best),
            (*found.losses, rises[best]),
            (*found.constants, added[best]),
            found.alone or tuple(rises.values()),
        )
    return found


def _walk(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    candidates: Sequence[int],
    has_constants: bool,
    advance: Callable[[int], None],
) -> tuple[dict[int, float], list[torch.Tensor]]:
    """The summed loss without the block of each of the candidates, which are layers, and (as DENSE) with all of them;
    and of every layer the mean of what its block adds, (hidden,), or zeros."""
    shares, tokens = mine(batches), sum(batch.numel() for batch in batches)
    states, calls = enter(view, shares)
    without: dict[int, list[torch.Tensor]] = {}
    added = []
    for index, block in enumerate(view.blocks):
        with held(block):
            before, states = states, [calls.run(block, index, s, n) for n, s in enumerate(states)]
            without = {
                gone: [calls.run(block, index, state, number) for number, state in enumerate(streams)]
                for gone, streams in without.items()
            }
        layer = view.layer_at(index)
        if layer is None:
            continue
        differences = (b.double() - a.double() for a, b in zip(before, states, strict=True))
        none = torch.zeros(view.shape.hidden, dtype=torch.float64)
        total = summed(sum((x.sum((0, 1)).cpu() for x in differences), none))
        added.append((total / tokens * has_constants).to(view.lm.dtype))
        if layer in candidates:
            without[layer] = [state + added[-1].to(state) for state in before]
        advance(1)
    if not candidates:
        return {}, added
    losses = [loss_behind(view, shares, streams) for streams in (states, *without.values())]
    found = dict(zip((DENSE, *without), summed(torch.tensor(losses, dtype=torch.float64)).tolist(), strict=True))
    for gone, loss in found.items():
        if not math.isfinite(loss):
            what = "the dense model" if gone == DENSE else f"the model without block {view.attention_layers[gone]}"
            raise not_finite(f"{what}: the loss on the calibration text", view.lm)
    return found, added


def loss_behind(view: ModelView, batches: Sequence[torch.Tensor], streams: Sequence[torch.Tensor]) -> float:
    """Summed, from hidden states (B, T, hidden) behind the last block."""
    hidden = (view.norm(stream.to(view.device)) for stream in streams)
    return math.fsum(next_token_loss(view.head, h, batch)[0] for h, batch in zip(hidden, batches, strict=True))
