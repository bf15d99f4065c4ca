"""Bytes: of a cache, of weights, and of the process."""

import contextlib
import ctypes
import errno
import operator
import resource
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from kvprune.runtime.quantized import quantized_bytes, stores_of


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache, without room that is kept free."""
    layers: list[Any] = list(cache.layers)
    return sum(kv_bytes(layer) for layer in layers if getattr(layer, "keys", None) is not None)


def kv_bytes(layer: Any) -> int:
    """Bytes of the keys and values of the tokens in a layer of a cache, without room that is kept free; of a quantised
    one with its scales. 0 of one that holds a state in place of keys and values, as in a hybrid model."""
    if not hasattr(layer, "keys"):
        return 0
    if hasattr(layer, "kv_nbytes"):  # of late admission
        return int(layer.kv_nbytes())
    stores = stores_of(layer)
    if stores:
        return sum(map(quantized_bytes, stores))
    if layer.keys is None:  # of a layer that attends to another's
        return 0
    lengths = getattr(layer, "lengths", None)  # of a token filter's layer, whose sequences differ
    if lengths is None:
        return layer.keys.nbytes + layer.values.nbytes
    return int(lengths.sum()) * 2 * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size()


def held_bytes(layer: Any) -> int:
    """Bytes of the keys and values of a layer of a cache, room included."""
    if not hasattr(layer, "keys"):
        return 0
    if hasattr(layer, "held_nbytes"):
        return int(layer.held_nbytes())
    if stores_of(layer):
        return kv_bytes(layer)
    keys, values = getattr(layer, "key_room", None), getattr(layer, "value_room", None)
    if keys is None or values is None:
        keys, values = layer.keys, layer.values
    if keys is None:
        return 0
    return keys.nbytes + values.nbytes


def kv_bytes_per_token(widths: list[int], kv_heads: int | list[int], dtype: torch.dtype) -> int:
    """Bytes that one token leaves in the cache: K and V, `widths[l]` channels per KV head in layer l. kv_heads: of the
    model that has these widths, so fewer than the dense one's where heads are merged; of each layer, or of all alike.
    """
    heads = [kv_heads] * len(widths) if isinstance(kv_heads, int) else kv_heads
    return 2 * sum(map(operator.mul, widths, heads)) * dtype.itemsize


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def weights_read_bytes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights that a step of decoding reads: all of them, tied ones once, but an input embedding that is
    not the output's too, of which it reads a row. dtype: what they are counted in, if not in their own."""
    unread = unread_embeddings(model)
    read = [p for p in model.parameters() if not any(p is table for table in unread)]
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in read)


def unread_embeddings(model: PreTrainedModel) -> list[torch.Tensor]:
    """The tables of which a step reads a row: the input embedding, unless it is the output's too, and, in some models,
    one with an input of each layer for each token."""
    embedding: Any = cast(nn.Module, model.get_input_embeddings()).weight
    head = cast(nn.Module, model.get_output_embeddings()).weight
    of_layers: Any = getattr(model.base_model, "embed_tokens_per_layer", None)
    tables = [embedding] if of_layers is None else [embedding, of_layers.weight]
    return [table for table in tables if table is not head]


class PeakMemory:
    """The process's peak above what it held when this was made: on a GPU, of several on the one that took most, else
    resident memory.

    On a CPU the operating system only keeps the peak of the process's whole life: the figure is right in a process
    that did nothing heavy before, such as the command line's.
    """

    def __init__(self, *devices: torch.device):
        self.baselines: dict[torch.device, int] = {}
        for gpu in (device for device in devices if device.type == "cuda"):
            torch.cuda.reset_peak_memory_stats(gpu)
            self.baselines[gpu] = torch.cuda.memory_allocated(gpu)
        self.baseline = _resident()

    def bytes(self) -> int:
        """Peak so far above the baseline; never below 0, though the system counts both in its own time, and the peak
        may lag some pages behind what is held."""
        if not self.baselines:
            return max(_peak_resident() - self.baseline, 0)
        return max(0, *(torch.cuda.max_memory_allocated(gpu) - held for gpu, held in self.baselines.items()))


def is_out_of_memory(error: BaseException) -> bool:
    """What PyTorch, the CUDA driver and its libraries say."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    words = ("out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def free(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*found, *_left_to_container()], default=None)


def _left_to_container(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes up to the limit of this process's control group (Linux, version 2 or 1), if it has one; what it holds of
    files that are not in use does not count."""
    for place, most, now in (
        (folder, "memory.max", "memory.current"),
        (folder / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, held = (place / most).read_text().strip(), int((place / now).read_text())
            lines = (place / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        files = [int(line.split()[1]) for line in lines if line.startswith("inactive_file ")]
        return [] if limit == "max" else [int(limit) - held + sum(files)]
    return []


def forget_peak() -> bool:
    """Let the process's peak begin again from what it holds now (Linux); whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release() -> None:
    """Give freed memory back: glibc keeps pages that a phase freed in between ones that live, and the next
    phase would come on top of them."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, which looks after itself
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return 0  # no such figure here: count everything


def _peak_resident() -> int:
    """Not ru_maxrss where there is better: on Linux that starts from what the parent held when it started us."""
    status = Path("/proc/self/status")
    if status.exists():
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
