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
from itertools import pairwise

import torch
from torch import nn

from kvprune.channels.journal import Journal
from kvprune.channels.widths.sensitivity import DENSE
from kvprune.measure.loss import next_token_loss
from kvprune.models.finite import not_finite
from kvprune.models.stream import BlockRunner
from kvprune.models.view import ModelView


@dataclass(frozen=True)
class Dropped:
    """Blocks in the order in which they go; the rise of the mean loss (nats) once each has gone too; what each leaves
    behind, (hidden,). alone: the rise for every block of the model, gone alone."""

    blocks: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    constants: tuple[torch.Tensor, ...] = ()
    alone: tuple[float, ...] = ()


@contextmanager
def skipping(blocks: Sequence[nn.Module], constants: Sequence[torch.Tensor]) -> Iterator[None]:
    """These blocks pass on the hidden states that they are called with, each with its constant (hidden,) added."""

    def passed(constant: torch.Tensor, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden_states + constant

    with ExitStack() as stack:
        for block, constant in zip(blocks, constants, strict=True):
            block.forward = partial(passed, constant)
            stack.callback(delattr, block, "forward")
        yield


@torch.no_grad()
def choose_blocks(
    view: ModelView,
    ids: torch.Tensor,
    number: int,
    has_constants: bool,
    journal: Journal,
    advance: Callable[[int], None],
) -> Dropped:
    """Which blocks go, by the loss on token ids (B, T). has_constants: whether a block leaves one behind.

    A round a block: one forward keeps every block's input, so that without block l only the blocks behind it run,
    L (L + 1) / 2 block forwards in all. Every loss goes to the journal at once and is not measured again. `advance`
    counts losses. Raises NotFinite.
    """
    layers, scored = view.shape.layers, ids.shape[0] * (ids.shape[1] - 1)
    found = Dropped()
    for turn in range(number):
        left = [block for block in range(layers) if block not in found.blocks]
        keys: dict[int | None, int] = {} if turn else {None: DENSE}
        keys |= {block: turn * layers + block for block in left}
        with skipping([view.blocks[block] for block in found.blocks], found.constants):
            added = _measure(view, ids, keys, has_constants, journal, advance)
        rises = {block: (journal.losses[0, keys[block]] - journal.losses[0, DENSE]) / scored for block in left}
        best = min(left, key=lambda block: (rises[block], block))
        found = Dropped(
            (*found.blocks, best),
            (*found.losses, rises[best]),
            (*found.constants, added[best]),
            found.alone or tuple(rises.values()),
        )
    return found


def _measure(
    view: ModelView,
    ids: torch.Tensor,
    probes: dict[int | None, int],
    has_constants: bool,
    journal: Journal,
    advance: Callable[[int], None],
) -> list[torch.Tensor]:
    """The summed losses without one block more; probes: by block, or None for no other, the journal's number of that.
    Returns what each block leaves behind, (hidden,)."""
    last: list[torch.Tensor] = []
    hook = view.blocks[-1].register_forward_hook(lambda _b, _a, out: last.append(_states(out)))
    try:
        runner = BlockRunner(view, ids)
    finally:
        hook.remove()
    streams = [*runner.inputs, last[0]]
    added = [(b.float() - a.float()).mean((0, 1)) * has_constants for a, b in pairwise(streams)]
    added = [constant.to(streams[0].dtype) for constant in added]
    for block, key in probes.items():
        if (0, key) not in journal.losses:
            hidden = runner.output
            if block is not None:
                with skipping([view.blocks[block]], [added[block]]):
                    hidden = runner.rerun(block)
            loss = next_token_loss(view.head, hidden, ids)[0]
            if not math.isfinite(loss):
                what = "the dense model" if block is None else f"the model without block {block}"
                raise not_finite(f"{what}: the loss on the calibration text", view.lm)
            journal.add(0, key, loss)
        advance(1)
    return added


def _states(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
