"""A calibration text on its way through the model, block by block.

Blocks are called again with the very arguments that the model gave them (mask, rotary table, positions), so no family's
masking is written a second time here. `enter` and `Calls` take a long text through one block at a time, whose weights
may be there for just as long (see held.py): what is held are the hidden states before one block. `BlockRunner` holds
those of one batch before every block.
"""

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kvprune.models.family import family_of
from kvprune.models.held import coming, held
from kvprune.models.view import ModelView


@dataclass(frozen=True)
class Call:
    """The arguments beside the hidden states with which the model calls one of its blocks."""

    args: tuple
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """states (B, T, hidden) -> what `block` makes of them."""
        output = block(states, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def record_calls(blocks: nn.ModuleList, forward: Callable[[], object]) -> tuple[list[torch.Tensor], list[Call]]:
    """The hidden states (B, T, hidden) that reach every block in `forward`, and what else it is called with."""
    inputs: list[torch.Tensor] = []
    calls: list[Call] = []

    def keep(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        inputs.append(args[0] if args else kwargs.pop("hidden_states"))
        calls.append(Call(args[1:], kwargs))

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, calls


@dataclass(frozen=True)
class Calls:
    """The arguments beside the hidden states with which the model calls each of its blocks, by window length.

    (mask, rotary table, positions) of a batch of one, which serve any batch: calibration has no padding. own: where
    there is more, that depends on the tokens.
    """

    of_length: dict[int, list[Call]]
    own: "OwnCalls | None" = None

    def run(self, block: nn.Module, index: int, states: torch.Tensor, number: int) -> torch.Tensor:
        """states (B, T, hidden) of batch `number` -> what `block`, called as block `index`, makes of them."""
        call = self.of_length[states.shape[1]][index] if self.own is None else self.own.call(number, index)
        return call.run(block, states)

    def take(self, block: nn.Module, index: int, states: list[torch.Tensor]) -> None:
        """The same of a whole text's states, in place, one batch after another."""
        for number, state in enumerate(states):
            states[number] = self.run(block, index, state, number)


SHARED = "shared_kv_states"  # the argument in which layers find keys and values of others, by type of layer


class OwnCalls:
    """The same for each batch (B, T) of token ids, in which blocks get inputs of their own for each token, or keys and
    values of blocks before them. The inputs are made again whenever a block is called, the keys and values are kept:
    of the whole text, for as long as this lasts."""

    def __init__(self, lm: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor], is_tuple: bool):
        self.lm, self.blocks, self.batches, self.is_tuple = lm, blocks, batches, is_tuple
        self.shared: list[Any] = [UserDict() for _ in batches]

    @torch.no_grad()
    def call(self, number: int, index: int) -> Call:
        """Of block `index` on batch `number`. No block is run."""
        ids = self.batches[number].to(device_of(self.lm))
        with _passing(self.blocks, self.is_tuple):
            _, calls = record_calls(self.blocks, partial(self.lm.base_model, input_ids=ids, use_cache=False))
        found = calls[index]
        return Call(found.args, found.kwargs | ({SHARED: self.shared[number]} if SHARED in found.kwargs else {}))


@torch.no_grad()
def enter(view: ModelView, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Calls]:
    """Hidden states before the first block, (B, T, hidden) a batch, and how to go on from there.

    batches: token ids (B, T), of one or more lengths T.
    """

    return embedded(view.lm, view.blocks, batches), learn_calls(view.lm, view.blocks, batches)


def embedded(lm: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states before the first block, (B, T, hidden) a batch; in host memory where blocks come and go."""

    def of(batch: torch.Tensor) -> torch.Tensor:
        ids = batch.to(device_of(lm))
        found = input_of(blocks[0], lambda: lm.base_model(input_ids=ids, use_cache=False))
        return found if coming(blocks[0]) is None else found.cpu()

    return [of(batch) for batch in batches]


@torch.no_grad()
def learn_calls(lm: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor]) -> Calls:
    """With what the model calls its blocks, from one window for each length T of batches (B, T). Only the first block
    is run, for the form of what blocks return."""
    found, is_tuple = {}, False
    for length, window in {batch.shape[1]: batch[:1].to(device_of(lm)) for batch in batches}.items():
        with _passing(blocks) as forms:
            _, found[length] = record_calls(blocks, partial(lm.base_model, input_ids=window, use_cache=False))
            is_tuple = forms[-1]
    depends = any(getattr(lm.config, name, None) for name in family_of(lm.config.model_type).of_tokens)
    return Calls(found, OwnCalls(lm, blocks, batches, is_tuple) if depends else None)


def device_of(lm: PreTrainedModel) -> torch.device:
    """Where the input ids go."""
    return cast(torch.Tensor, lm.get_input_embeddings().weight).device


@contextmanager
def _passing(blocks: nn.ModuleList, form: bool | None = None) -> Iterator[list[bool]]:
    """All blocks but the first give back the hidden states that they are called with, in the form that it gives: in a
    tuple or not. form: which, where that is known; the first does the same then. Yields the forms seen."""
    is_tuple: list[bool] = [] if form is None else [form]
    hook = blocks[0].register_forward_hook(lambda _m, _a, output: is_tuple.append(isinstance(output, tuple)))

    def passing(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states,) if is_tuple[-1] else states

    with ExitStack() as stack:
        stack.callback(hook.remove)
        for block in list(blocks)[1 if form is None else 0 :]:
            stack.enter_context(answering(block, passing))
        yield is_tuple


@contextmanager
def answering(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` does this in place of its own forward."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@torch.no_grad()
def final_states(lm: PreTrainedModel, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Hidden states behind the final norm, (B, T, hidden), of each batch of token ids (B, T), of a dense or a pruned
    model. Where blocks come and go, all batches pass a block while it is there."""
    family = family_of(lm.config.model_type)
    blocks, norm = family.blocks(lm), lm.base_model.get_submodule(family.norm)
    if coming(blocks[0]) is None:
        for batch in batches:
            yield lm.base_model(input_ids=batch.to(device_of(lm)), use_cache=False).last_hidden_state
        return
    states, calls = embedded(lm, blocks, batches), learn_calls(lm, blocks, batches)
    for index, block in enumerate(blocks):
        with held(block):
            calls.take(block, index, states)
    for state in states:
        yield norm(state.to(device_of(lm)))


class BlockRunner:
    """Runs a batch through the blocks once, keeps every block's input, and reruns from any block on."""

    def __init__(self, view: ModelView, input_ids: torch.Tensor):
        """input_ids (B, T). One dense forward of all blocks."""
        self.view = view
        outputs = []

        def forward() -> None:
            outputs.append(view.lm.base_model(input_ids=input_ids.to(view.device), use_cache=False))

        self.inputs, self._calls = record_calls(view.blocks, forward)  # per block (B, T, hidden)
        self.output: torch.Tensor = outputs[0].last_hidden_state  # (B, T, hidden), behind the norm

    def first_broken_block(self) -> int | None:
        """The first block whose output holds NaN or infinity."""
        for block, hidden in enumerate([*self.inputs[1:], self.output]):
            if not torch.isfinite(hidden).all():
                return block
        return None

    def rerun(self, start: int) -> torch.Tensor:
        """The final hidden states (B, T, hidden), recomputed from block `start` on."""
        hidden = self.inputs[start]
        for block, call in list(zip(self.view.blocks, self._calls, strict=True))[start:]:
            hidden = call.run(block, hidden)
        return self.view.norm(hidden)


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


@contextmanager
def frozen(lm: PreTrainedModel) -> Iterator[None]:
    """No parameter of the model wants a gradient."""
    before = {name: parameter.requires_grad for name, parameter in lm.named_parameters()}
    try:
        lm.requires_grad_(False)
        yield
    finally:
        for name, required in before.items():
            lm.get_parameter(name).requires_grad_(required)
