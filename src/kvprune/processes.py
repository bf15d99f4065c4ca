"""Several processes (accelerate launch, torchrun), each with a share of the windows; of one process nothing here does
anything. What each has summed is added up, so all of them hold the same; the main one writes."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from kvprune.errors import BadOption, KVPruneError

T = TypeVar("T")


@lru_cache
def _group() -> Any:
    """accelerate's state of the processes, which joins them; None for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def count() -> int:
    return 1 if _group() is None else _group().num_processes


def number() -> int:
    return 0 if _group() is None else _group().process_index


def on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return number() == 0


def device() -> torch.device | None:
    """This process's own GPU; None for one process."""
    return None if _group() is None else _group().device


def wait() -> None:
    """For all of them."""
    if _group() is not None:
        _group().wait_for_everyone()


def mine(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This process's windows of batches (B, T) of one length: every so manieth, in batches as large as the first."""
    if _group() is None or not batches:
        return list(batches)
    windows = torch.cat(list(batches))
    return [batch for batch in windows[number() :: count()].split(len(batches[0])) if len(batch)]


def check_enough(windows: int) -> None:
    """Raise BadOption where some process would have none."""
    if windows < count():
        raise BadOption(f"{count()} processes cannot share {windows} windows of text; start fewer, or give more tokens")


def summed(x: torch.Tensor) -> torch.Tensor:
    """Over all processes, in place."""
    if _group() is not None:
        sums = torch.view_as_real(x) if x.is_complex() else x
        there = sums.to(_group().device)  # GPUs' own way to sum takes nothing else
        torch.distributed.all_reduce(there)
        sums.copy_(there)
    return x


def gathered(value: T) -> list[T]:
    """Each process's value, in all of them."""
    found: list[Any] = [value] * count()
    if _group() is not None:
        torch.distributed.all_gather_object(found, value)
    return found


def after_main(make: Callable[[], T]) -> T:
    """Make it in the main process, and then in the others; what is wrong there is raised in all."""
    if _group() is None:
        return make()
    made, wrong = [], None
    if is_main():
        try:
            made.append(make())
        except KVPruneError as error:
            wrong = error
    wrong = gathered(wrong)[0]
    if wrong is not None:
        raise wrong
    return made[0] if made else make()


def check_same(what: dict[str, Any]) -> None:
    """Raise BadOption where processes disagree about something."""
    for other, found in enumerate(gathered(what)):
        for name, value in found.items():
            if value != what[name]:
                raise BadOption(
                    f"processes {number()} and {other} disagree about {name}: {what[name]!r} and {value!r}; start them "
                    "with the same files, options and versions"
                )
