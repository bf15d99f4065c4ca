"""Weights that stay on disk, and how they come to a block; see held.py.

A model that is larger than the machine is loaded without the weights of its blocks: transformers and accelerate know
where in the checkpoint's files each one lies, and the files are mapped, not copied.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    find_device,
    send_to_device,
    set_module_tensor_to_device,
)
from torch import nn
from transformers import PreTrainedModel

from kvprune.errors import BrokenCheckpoint
from kvprune.models.places import Place
from kvprune.models.stream import SHARED

# Arguments that stay where, and what, they are: what is put into a copy is lost
CACHES = ("cache", "past_key_values", "past_key_value", SHARED)


class Shelf(OffloadedWeightsLoader):
    """Weights on disk, by their names in the model. Raises BrokenCheckpoint for a file that changed since it was put
    here: what was measured on the one would be cut from the other."""

    def __init__(self, index: Mapping[str, Any], folder: str | None = None):
        """index: accelerate's, name -> {"safetensors_file", "weight_name", "dtype"}; folder: where the others are."""
        super().__init__(index=dict(index), save_folder=folder)
        self._seen = {file: _state(file) for file in self._files()}

    def _files(self) -> set[str]:
        return {entry["safetensors_file"] for entry in self.index.values() if entry.get("safetensors_file")}

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.index[name].get("safetensors_file")
        if file and _state(file) != self._seen[file]:
            what = "has changed" if Path(file).exists() else "is gone"
            raise BrokenCheckpoint(f"{file} {what} while it was read; start again, once nothing writes there")
        return super().__getitem__(name)

    def also(self, names: Mapping[str, str], file: Path, dtype: torch.dtype) -> None:
        """Take some weights from `file` from now on: name in the model -> name in the file."""
        told = {"safetensors_file": str(file), "dtype": str(dtype).removeprefix("torch.")}
        self.index |= {name: told | {"weight_name": own} for name, own in names.items()}
        self.all_keys = list(self.index)
        self._seen[str(file)] = _state(str(file))

    def copy(self) -> "Shelf":
        return Shelf(self.index, self.save_folder)

    def read_ahead(self, prefix: str) -> None:
        """Have the operating system read what begins with `prefix` while something else is computed."""
        for name, entry in self.index.items():
            file = entry.get("safetensors_file")
            if name.startswith(prefix) and file and hasattr(os, "posix_fadvise"):
                first, size = _places(file).get(entry.get("weight_name", name), (0, 0))
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)


def _state(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=1024)
def _places(file: str) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies, and how many bytes it has."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    ends = {name: told["data_offsets"] for name, told in header.items() if name != "__metadata__"}
    return {name: (8 + length + first, last - first) for name, (first, last) in ends.items()}


class Coming(ModelHook):
    """Of one block: brings its weights to its place, and lets them go unless they stay there. weights_map is also read
    by transformers when the model is saved.

    beside: the block of another model that has some of the same weights: those are not brought again while they are
    there."""

    def __init__(self, shelf: Shelf, prefix: str, place: Place, beside: nn.Module | None = None):
        self.shelf, self.prefix, self.stays, self.beside = shelf, prefix, place.stays, beside
        self.device = torch.empty(0, device=place.device).device  # with its number, as buffers have it
        self.following: nn.Module | None = None
        self.holders = 0
        self._asked_from: Any = None

    @property
    def weights_map(self) -> Mapping[str, torch.Tensor]:
        return PrefixedDataset(self.shelf, self.prefix)

    def fetch(self, block: nn.Module) -> None:
        if not self.holders:
            self._bring(block)
        self.holders += 1

    def release(self, block: nn.Module) -> None:
        self.holders -= 1
        if not self.holders:
            self._let_go(block)

    def read_ahead(self) -> None:
        """Have the operating system read what the following block will bring."""
        block = self.following
        if block is not None and any(p.is_meta for p in block.parameters()):
            self.shelf.read_ahead(cast(Any, block)._hf_hook.prefix)

    def _bring(self, block: nn.Module) -> None:
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                set_module_tensor_to_device(block, name, self.device, value=self._weight(name, parameter))
        for name, buffer in list(block.named_buffers()):  # few numbers, which stay
            if not buffer.is_meta and buffer.device != self.device:
                set_module_tensor_to_device(block, name, self.device, value=buffer)

    def _weight(self, name: str, wanted: torch.Tensor) -> torch.Tensor:
        if self.beside is not None:
            other: Any = cast(Any, self.beside)._hf_hook
            if self.shelf.index[self.prefix + name] == other.shelf.index.get(other.prefix + name):
                there = self.beside.get_parameter(name).data
                if not there.is_meta and there.dtype == wanted.dtype:
                    return there
        return self.shelf[self.prefix + name]

    def _let_go(self, block: nn.Module) -> None:
        if not self.stays:
            for name, _ in list(block.named_parameters()):
                set_module_tensor_to_device(block, name, "meta")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        self._asked_from = find_device([args, kwargs])
        if not self.holders:  # a call may end in an exception, so it counts as no holder
            self._bring(module)
        shared: Any = kwargs.get(SHARED)
        for kind, states in ({} if shared is None else dict(shared)).items():  # in place: layers behind read them here
            shared[kind] = tuple(one.to(self.device) for one in states)
        return send_to_device(args, self.device), send_to_device(kwargs, self.device, skip_keys=CACHES)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self.holders:
            self._let_go(module)
        return output if self._asked_from is None else send_to_device(output, self._asked_from)


def let_come(
    lm: PreTrainedModel, path: str, shelf: Shelf, places: Sequence[Place], beside: nn.ModuleList | None = None
) -> None:
    """Let the blocks below `path` of the model, whose weights are not there, come to their places from the shelf.

    beside: the blocks of another model that share weights with these.
    """
    blocks: Any = lm.get_submodule(path)
    lm.hf_device_map = {"": str(places[0].device), path: "disk"}  # type: ignore[assignment]  # transformers saves by it
    hooks = [
        Coming(shelf, f"{path}.{number}.", place, None if beside is None else beside[number])
        for number, place in enumerate(places)
    ]
    for block, hook, following in zip(blocks, hooks, [*blocks[1:], None], strict=True):
        hook.following = following
        add_hook_to_module(block, hook)


def around(lm: PreTrainedModel, path: str) -> list[str]:
    """The names of the modules beside the blocks below `path`, each with all that it holds."""
    found, prefix, node = [], "", cast(nn.Module, lm)
    for part in path.split("."):
        found += [prefix + name for name, _ in node.named_children() if name != part]
        node, prefix = getattr(node, part), f"{prefix}{part}."
    return found


def as_it_came(lm: PreTrainedModel) -> Shelf:
    """Take off what transformers hangs on a model whose weights it has left on disk; returns where they are."""
    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in lm.modules())
    loader: Any = next(found for found in maps if found is not None)
    loader = loader.dataset
    loader.device = None  # it reads buffers back, to a device as accelerate says it, which safetensors does not know
    remove_hook_from_submodules(lm)
    for module in lm.modules():  # the class's own again
        for name in ("forward", "to", "cuda"):
            vars(module).pop(name, None)
    return Shelf(loader.index, loader.save_folder)
