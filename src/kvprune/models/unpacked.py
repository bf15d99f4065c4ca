"""A .gguf file as a folder of safetensors, from which blocks can come one at a time (see held.py).

transformers unpacks a .gguf file whole, in memory, and every pass over the blocks would unpack them again. So it is
unpacked once, a block at a time, by transformers' own names and processors: the numbers are those that it loads. What
is unpacked is written whole or not at all, and found again after a kill.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from kvprune import processes
from kvprune.errors import BrokenCheckpoint, UnknownSource
from kvprune.models.gguf import ORIGINAL, read_header
from kvprune.models.source import Source, load_config
from kvprune.runtime.dtype import find_dtype, name_of
from kvprune.runtime.files import flush, read_json, write_whole, writing_to
from kvprune.versions import versions

_SOURCE, _INDEX = "unpacked.json", "model.safetensors.index.json"
_BYTES = 10  # a weight of the largest tensor, while it is unpacked: as float32, twice, and as it is written


def unpacking_bytes(model: PreTrainedModel) -> int:
    """Bytes of host memory that the largest tensor of a model takes while it is unpacked."""
    return _BYTES * max(p.numel() for p in model.parameters())


def unpack(source: Source, model: PreTrainedModel, dtype: str, folder: Path, advance: Callable[[int], None]) -> Source:
    """The checkpoint in `folder` of what `load_model` would load of a .gguf file, which the main process writes. What a
    run that was killed has unpacked of the same file is kept.

    model: of that file, without weights. dtype: in which to store, "auto" for bfloat16. advance is told of each block.
    Raises BrokenCheckpoint, UnknownSource or NoSpace.
    """
    if processes.is_main():
        _write(source, model, torch.bfloat16 if dtype == "auto" else find_dtype(dtype), folder, advance)
    return Source(source.name, str(folder), None, None, source.trust_remote_code)


def _write(
    source: Source, model: PreTrainedModel, stored: torch.dtype, folder: Path, advance: Callable[[int], None]
) -> None:
    told = _told(source, stored)
    if _read(folder / _SOURCE) != told:
        with writing_to(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_whole(folder / _SOURCE, json.dumps(told))
    if (folder / _INDEX).exists():
        return
    weights = _write_parts(source, model, stored, folder, advance)
    if _told(source, stored) != told:
        raise BrokenCheckpoint(f"{source.name} has changed while it was read; start again, once it is whole")
    config: Any = load_config(source)
    config.dtype = stored
    generation: Any = model.generation_config
    with writing_to(folder):
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        write_whole(folder / _INDEX, json.dumps({"metadata": {}, "weight_map": weights}))


def _told(source: Source, stored: torch.dtype) -> dict[str, Any]:
    """What must be the same for what is there to be used."""
    try:
        found = os.stat(source.name)
    except OSError:
        raise BrokenCheckpoint(f"{source.name} is gone") from None
    return {
        "file": os.path.abspath(source.name),
        "mtime": found.st_mtime_ns,
        "size": found.st_size,
        "dtype": name_of(stored),
        "versions": versions(),
    }


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _write_parts(
    source: Source, model: PreTrainedModel, stored: torch.dtype, folder: Path, advance: Callable[[int], None]
) -> dict[str, str]:
    """A file for each block, and for each tensor outside of them; returns which tensor is in which file."""
    from gguf import GGUFReader

    parts: dict[str, list[Any]] = {}
    for tensor in GGUFReader(source.name).tensors:
        block = re.match(r"blk\.\d+", tensor.name)
        parts.setdefault(block[0] if block else tensor.name, []).append(tensor)
    unpacked = _Unpacked(source, model, stored)
    weights: dict[str, str] = {}
    for part, packed in parts.items():
        path = folder / f"{part}.safetensors"
        if _names(path) is None:
            _save(unpacked.of(packed), path)
        weights |= dict.fromkeys(_names(path) or (), path.name)
        if part.startswith("blk."):
            advance(1)
    return weights


def _names(path: Path) -> list[str] | None:
    """Of the tensors in a file; None where it is not there, or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return None


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with writing_to(path.parent):
        save_file(tensors, partial, {"format": "pt"})
        flush(partial)
        os.replace(partial, path)


class _Unpacked:
    """Tensors of a .gguf file as transformers loads them (load_gguf_checkpoint), but not all at once."""

    def __init__(self, source: Source, model: PreTrainedModel, stored: torch.dtype):
        self.name, self.stored = source.name, stored
        architecture = read_header(Path(source.name)).keys["general.architecture"]
        kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self.processor = kind(config=load_gguf_checkpoint(source.name)["config"])
        self.names = get_gguf_hf_weights_map(model, self.processor)  # type: ignore[no-untyped-call]

    def of(self, packed: list[Any]) -> dict[str, torch.Tensor]:
        """By their names in the model; of tensors that come together there, all must be given."""
        found: dict[str, torch.Tensor] = {}
        for tensor in packed:
            self._put(tensor, found)
        return {name: tensor.to(self.stored).contiguous() for name, tensor in found.items()}

    def _put(self, tensor: Any, found: dict[str, torch.Tensor]) -> None:
        """Of what it takes on the way nothing is left."""
        one = self.processor.process(
            weights=self._numbers(tensor),
            name=tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters={"tensors": found},
        )
        if one.name in self.names:  # else the processor has put it there, or the model has no such tensor
            found[self.names[one.name]] = torch.from_numpy(np.array(one.weights, order="C")).to(self.stored)

    def _numbers(self, tensor: Any) -> np.ndarray:
        """float32."""
        from gguf import dequantize

        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UnknownSource(
                f"{self.name} has tensors of type {kind}, which gguf does not unpack; {ORIGINAL}"
            ) from None
