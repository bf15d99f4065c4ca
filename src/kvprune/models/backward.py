"""The loss's gradient on its way back through the blocks, one block at a time.

Kept are the hidden states before every block; a block is run again when its turn comes, with what autograd needs, and
let go. So the memory is that of one block's activations, and its weights may be there for just as long (see held.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvprune.errors import BadOption
from kvprune.measure.loss import next_token_loss
from kvprune.models.held import held
from kvprune.models.stream import enter, frozen
from kvprune.models.view import ModelView
from kvprune.processes import mine


@dataclass(frozen=True)
class Step:
    """One block's turn. run: take every window forward and back through the block; what it is hooked with then sees
    gradients of the summed loss (nats)."""

    block: int
    run: Callable[[], None]


def backward(view: ModelView, batches: Sequence[torch.Tensor]) -> Iterator[Step]:
    """A step for each block, the last one first, whose weights are there until the next step is asked for.

    batches: token ids (B, T), of which each process takes its share; windows go through autograd one at a time. Steps
    must be run in turn; their parameters want no gradient unless the caller says so. Memory: the windows' hidden states
    before every block. Raises BadOption where layers share keys and values, through which gradients pass by blocks.
    """
    if view.shape.sources:
        raise BadOption("gradients go back block by block, and some of this model's layers share keys and values")
    windows = [window for batch in mine(batches) for window in batch.split(1)]
    with frozen(view.lm):
        with torch.no_grad():
            states, calls = enter(view, windows)
            inputs = []
            for index, block in enumerate(view.blocks):
                inputs.append(list(states))
                with held(block):
                    calls.take(block, index, states)
        gradients = [_at_the_end(view, state, window) for state, window in zip(states, windows, strict=True)]
        for index in reversed(range(len(inputs))):
            block, before = view.blocks[index], inputs.pop()

            def run(index: int = index, block=block, before: list[torch.Tensor] = before) -> None:
                for number, state in enumerate(before):
                    with torch.enable_grad():
                        entered = state.detach().requires_grad_()
                        left = calls.run(block, index, entered, number)
                    left.backward(gradients[number])
                    assert entered.grad is not None
                    gradients[number] = entered.grad

            with held(block):
                yield Step(index, run)


def _at_the_end(view: ModelView, state: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """The gradient in what the last block put out, (1, T, hidden)."""
    with torch.enable_grad():
        entered = state.detach().to(view.device).requires_grad_()
        hidden = view.norm(entered)
    _, _, gradient = next_token_loss(view.head, hidden.detach(), window, gradient=True)
    hidden.backward(gradient)
    assert entered.grad is not None
    return entered.grad.to(state.device)
