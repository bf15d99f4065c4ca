"""A calibration text on its way through the model, one block at a time.

What is held are the hidden states before one block, whatever the number of layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvprune.models.view import ModelView


@dataclass(frozen=True)
class Calls:
    """The arguments beside the hidden states with which the model calls each of its blocks, by window length.

    (mask, rotary table, positions) of a batch of one, which serve any batch: calibration has no padding.
    """

    of_length: dict[int, list[tuple[tuple, dict[str, Any]]]]

    def run(self, block: nn.Module, index: int, states: torch.Tensor) -> torch.Tensor:
        """states (B, T, hidden) -> what `block`, called as block `index`, makes of them."""
        args, kwargs = self.of_length[states.shape[1]][index]
        output = block(states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def enter(view: ModelView, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Calls]:
    """Hidden states before the first block, (B, T, hidden) a batch, and how to go on from there.

    batches: token ids (B, T). One forward of one window for each length T among them.
    """

    def embedded(batch: torch.Tensor) -> torch.Tensor:
        return input_of(view.blocks[0], lambda: view.lm.base_model(input_ids=batch.to(view.device), use_cache=False))

    return [embedded(batch) for batch in batches], learn_calls(view.lm, view.blocks, batches)


@torch.no_grad()
def learn_calls(lm: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor]) -> Calls:
    """With what the model calls its blocks, from one forward of one window for each length T of batches (B, T)."""
    found: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}

    def keep(_block: nn.Module, args: tuple, kwargs: dict, calls: list) -> None:
        calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    for length, window in {batch.shape[1]: batch[:1] for batch in batches}.items():
        found[length] = []
        keep_calls = partial(keep, calls=found[length])
        hooks = [block.register_forward_pre_hook(keep_calls, with_kwargs=True) for block in blocks]
        try:
            lm.base_model(input_ids=window.to(lm.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return Calls(found)


class _Reached(Exception):
    """The module whose input is wanted has been called."""


def input_of(module: nn.Module, forward: Callable[[], object]) -> torch.Tensor:
    """What reaches `module` in `forward`, which goes no further."""
    found = []

    def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        forward()
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]
