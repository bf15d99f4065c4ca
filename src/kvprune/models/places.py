"""On which device each block of a model is worked on, and whether its weights stay there; see shelf.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvprune import processes
from kvprune.errors import BadOption
from kvprune.models.check import first_line


@dataclass(frozen=True)
class Place:
    """stays: a block's weights are brought once, and not let go."""

    device: torch.device
    stays: bool


def place(sizes: Sequence[int], devices: Sequence[torch.device], left: Sequence[int]) -> list[Place]:
    """A place for each block, by bytes of its weights and bytes left on each device.

    In the model's order, so that the text crosses from one device to the next once: each device keeps the blocks that
    follow as long as it has room for them. Those that no device has room for come to the first one, and go.
    """
    found: list[Place] = []
    for device, room in zip(devices, left, strict=True):
        while len(found) < len(sizes) and sizes[len(found)] <= room:
            room -= sizes[len(found)]
            found.append(Place(device, True))
    return found + [Place(devices[0], False)] * (len(sizes) - len(found))


def find_device(name: str) -> torch.device:
    """The device that an option names, "auto" being the GPU if there is one. Raises BadOption."""
    if name == "auto":
        own = processes.device()
        return own or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "," in name:
        raise BadOption(f"--device takes one here, not {name!r}; prune alone spreads a model over several")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadOption(f"device {name!r} cannot be used: {first_line(error)}") from None


def find_devices(names: str) -> list[torch.device]:
    """Those that "cuda:0,cuda:1" names, or the one of any other name. Raises BadOption."""
    if "," not in names:
        return [find_device(names)]
    if processes.count() > 1:
        raise BadOption(f"--device {names}: each of several processes has a device of its own; leave it out")
    found = [find_device(name.strip()) for name in names.split(",")]
    found = [torch.empty(0, device=one).device for one in found]  # with their numbers
    for one in found:
        if found.count(one) > 1:
            raise BadOption(f"--device {names} names {one} twice")
    return found
