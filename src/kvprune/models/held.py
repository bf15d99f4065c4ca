"""Blocks whose weights are on disk, and come while they are worked on.

A block of such a model (see shelf.py) brings its weights when it is called and lets them go behind it, unless there is
room for them to stay (places.py); `held` keeps them for as long as a loop works on it. Of a model that is all there no
block comes or goes, and `held` does nothing: whoever walks through blocks is the same for both.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def coming(block: nn.Module) -> Any:
    """How a block's weights come (shelf.Coming); None where they are there."""
    hook = getattr(block, "_hf_hook", None)
    return hook if hasattr(hook, "fetch") else None


@contextmanager
def held(*blocks: nn.Module) -> Iterator[None]:
    """These blocks' weights are there while this lasts."""
    with ExitStack() as stack:
        for block in blocks:
            hook = coming(block)
            if hook is not None:
                hook.fetch(block)
                stack.callback(hook.release, block)
                hook.read_ahead()
        yield


def each_parameter(lm: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter with its name, tied ones once, there while it is looked at; in the model's order."""
    blocks = {path: module for path, module in lm.named_modules() if coming(module)}

    def block_of(name: str) -> str:
        return next((path for path in blocks if name.startswith(path + ".")), "")

    for path, names in groupby([name for name, _ in lm.named_parameters()], key=block_of):
        with held(*([blocks[path]] if path else [])):
            yield from ((name, lm.get_parameter(name)) for name in names)


@contextmanager
def quietly() -> Iterator[None]:
    """accelerate and transformers say nothing of weights that are on disk."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded")
            yield
    finally:
        logger.setLevel(before)
