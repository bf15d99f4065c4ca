"""What of a prune is held where, whether that fits, and about how long it takes: said before work begins.

A model that fits is loaded whole. Of one that does not the blocks stay on disk and come one at a time (models/held.py),
but for those that there is room to keep, on one device or on several (models/places.py). The arithmetic is the same, so
are plan and weights. docs/large-models.md has the formula, and figures.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvprune import processes
from kvprune.channels.choice.basis import slow_channels
from kvprune.channels.record import basis_bytes, moments_bytes
from kvprune.channels.repair.refit import RIDGES
from kvprune.channels.settings import ESTIMATED_ON, Settings
from kvprune.errors import BadOption, NoSpace, TooLittleMemory
from kvprune.measure import memory
from kvprune.models.in_memory import InMemory
from kvprune.models.places import Place, place
from kvprune.models.source import Source
from kvprune.models.unpacked import unpacking_bytes
from kvprune.models.view import ModelView
from kvprune.options import size_in_bytes

BATCH_TOKENS = 4096  # that go through a block at once, where the memory allows it
SHARE = 0.9  # of what is free: what may be taken unasked
UNPACKED = 1e8  # weights a second that come of a .gguf file on one core [measured: Q4_K 1.6e8, Q8_0 0.6e8]


@dataclass(frozen=True)
class Room:
    """streamed: whether blocks come and go; batch_tokens: how many tokens pass a block at once; needs: bytes of working
    memory of a device, by what takes them; disk: bytes written at most, with what an interrupted run would go on from;
    places: of the blocks of a model that is streamed."""

    streamed: bool
    batch_tokens: int
    needs: dict[str, int]
    disk: int
    seconds: float
    places: tuple[Place, ...] = ()

    def line(self, view: ModelView) -> str:
        """What is held where, and about how long it takes."""
        of, outside, block = (_gib(x) for x in (memory.weight_bytes(view.lm), outside_of(view), largest_block(view)))
        return (
            f"block by block: of {of} of weights {outside} are held, and a block of {block} at a time; "
            f"{self._staying(view)}{_gib(sum(self.needs.values()))} of memory and {_gib(self.disk)} of disk at most, "
            f"about {max(self.seconds / 60, 1):.0f} minutes"
        )

    def _staying(self, view: ModelView) -> str:
        """Which blocks stay where."""
        told = []
        for device in dict.fromkeys(one.device for one in self.places if one.stays):
            kept = [size for size, one in zip(_blocks(view), self.places, strict=True) if one == Place(device, True)]
            told.append(f"{len(kept)} on {device} ({_gib(sum(kept))})")
        return f"of {len(self.places)} blocks {' and '.join(told)} stay; beside that " if told else ""


def find_room(
    s: Settings,
    view: ModelView,
    merge: int,
    devices: Sequence[torch.device],
    asked: str | int | None,
    out: Path | None,
    source: Source,
) -> Room:
    """How to work within `asked` bytes of each device ("20GiB"; None: most of what is free there).

    view: of the source's model without weights; devices: the first one holds what is no block. Raises TooLittleMemory
    where not even one block has room, NoSpace, BadOption.
    """
    limits = [size_in_bytes(asked) if asked is not None else _free(device) for device in devices]
    device, limit = devices[0], limits[0]
    can_stream = out is not None and not isinstance(source, InMemory)

    def needs(tokens: int, streamed: bool) -> dict[str, int]:
        found = (needs_of(s, view, merge, tokens, streamed=streamed), _unpacking(source, view, device, streamed))
        return max(found, key=lambda one: sum(one.values()))

    whole = needs(BATCH_TOKENS, streamed=False)
    if limit is None or sum(whole.values()) <= limit or (asked is None and not can_stream):
        return Room(False, BATCH_TOKENS, whole, 0, 0.0)
    if out is None:
        raise BadOption(f"--memory {asked} is too little for the whole model, and block by block needs --out")
    tokens = BATCH_TOKENS
    parts = needs(tokens, streamed=True)
    limit = min(limit, *(one for one in limits if one is not None))
    while sum(parts.values()) > limit and tokens > s.calibration_window:
        tokens //= 2
        parts = needs(tokens, streamed=True)
    if sum(parts.values()) > limit:
        largest = max(parts, key=lambda name: parts[name])
        raise TooLittleMemory(
            f"one block at a time still takes {_gib(sum(parts.values()))}, and there are {_gib(limit)}: give more "
            f"--memory, or less to hold (most is: {largest}, {_gib(parts[largest])})"
        )
    disk, seconds = disk_of(s, view, merge), _seconds(s, view, device)
    if source.gguf_file:
        disk += memory.weight_bytes(view.lm)
        seconds += memory.parameters(view.lm) / UNPACKED
    left = [0 if one is None else one - sum(parts.values()) for one in limits]
    room = Room(True, tokens, parts, disk, seconds, tuple(place(_blocks(view), devices, left)))
    _check_disk(room, out)
    return room


def _free(device: torch.device) -> int | None:
    found = memory.free(device)
    sharing = processes.on_this_machine() if device.type == "cpu" else 1  # each has a GPU of its own
    return None if found is None else int(SHARE * found / sharing)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _blocks(view: ModelView) -> list[int]:
    return [memory.weight_bytes(block) for block in view.blocks]


def largest_block(view: ModelView) -> int:
    """Bytes of its weights."""
    return max(_blocks(view))


def outside_of(view: ModelView) -> int:
    """Bytes of the weights beside the blocks."""
    return memory.weight_bytes(view.lm) - sum(_blocks(view))


def _refitted(view: ModelView) -> list[int]:
    """How many inputs each matrix has that refit fits."""
    shape, family = view.shape.largest, view.family
    found, sizes = [shape.kv_heads * shape.groups * shape.head_dim], []
    if family.down:
        for block in view.blocks:
            down = block.get_submodule(f"{family.mlp}.{family.down}".strip("."))
            sizes.append(next(p for p in down.parameters() if p.dim() == 2).numel() // shape.hidden)
        found.append(max(sizes))
    return found


def needs_of(s: Settings, view: ModelView, merge: int, batch: int, streamed: bool) -> dict[str, int]:
    """Bytes by what takes them; of the phases those of the one that takes most.

    merge: dense KV heads in one; batch: tokens that go through a block at once; streamed: whether blocks come and go.
    """
    hidden, size, weights = view.shape.hidden, view.lm.dtype.itemsize, memory.weight_bytes(view.lm)
    if streamed:
        found = {
            "weights outside of the blocks": outside_of(view),
            "a block, dense and cut": 2 * largest_block(view),
        }
    else:
        found = {"weights": weights, "the cut model's own, and copies on the way": int(1.5 * weights)}
    found["what a batch makes in a block"] = 4 * batch * (8 * hidden + 3 * max(_refitted(view)))
    return found | max(_phases(s, view, merge, hidden * size), key=lambda phase: sum(phase.values()))


def _phases(s: Settings, view: ModelView, merge: int, row: int) -> list[dict[str, int]]:
    """What each phase holds beside that; row: bytes of a token's hidden state."""
    shape, size = view.shape.largest, view.lm.dtype.itemsize
    one = max(_statistics(view, merge))
    scores = {
        "the calibration text before a block": s.calibration_tokens * row,
        "one layer's moments and basis": 3 * one,
    }
    if 1 < merge < shape.kv_heads:
        channels = shape.kv_heads * (shape.groups + 2) * shape.head_dim
        scores["one layer's Q, K and V of the calibration text"] = s.calibration_tokens * channels * size
    states = _shared(view)
    if states:
        scores["keys and values that layers share"] = s.calibration_tokens * states
    phases = [scores]
    if s.probes == "estimated" or s.depth or s.drop_blocks:
        tokens = s.probe_tokens or ESTIMATED_ON
        phases.append({"the probed text before every block": tokens * row * (len(view.blocks) + 2)})
    if s.refits:
        widest, hidden, rows = max(_refitted(view)), shape.hidden, s.repair_tokens
        sums = 5 * widest**2 if rows >= widest else 2 * rows * (widest + hidden)
        phases.append(
            {
                "the repair text before a block, dense and cut": 4 * s.repair_tokens * row,
                "what reaches the MLP's last matrix of it": s.repair_tokens * widest * size,
                "sums over that, and their factors": 8 * (sums + 4 * widest * hidden),
            }
        )
        if states:
            phases[-1]["keys and values that layers share, dense and cut"] = 2 * s.repair_tokens * states
    attention = sum(p.numel() for p in view.attention[0].parameters())
    phases.append({"one layer's attention in float64, while it is cut": 4 * 8 * attention})
    return [*phases, {"the evaluated text before a block": 2 * s.eval_tokens * row}]


def _statistics(view: ModelView, merge: int) -> list[int]:
    """Bytes of each layer's moments and basis."""
    slow = [len(slow_channels(attention)) for attention in view.attention]
    shapes = [attention.shape for attention in view.attention]
    return [moments_bytes(s, merge, n) + basis_bytes(s, merge) for s, n in zip(shapes, slow, strict=True)]


def _shared(view: ModelView) -> int:
    """Bytes of a token's keys and values that layers behind attend to, and that are kept for these."""
    shape, size = view.shape, view.lm.dtype.itemsize
    shared = [shape.of(layer) for layer in shape.stores if len(shape.sharing(layer)) > 1]
    return sum(2 * own.kv_heads * own.head_dim * size for own in shared)


def _unpacking(source: Source, view: ModelView, device: torch.device, streamed: bool) -> dict[str, int]:
    """Bytes while a .gguf file is unpacked, which happens in host memory; transformers unpacks all of it, with the
    tensors of the blocks that are done."""
    if not source.gguf_file or device.type != "cpu":
        return {}
    held = {"a block": largest_block(view)} if streamed else {"weights": memory.weight_bytes(view.lm)}
    return held | {"the largest tensor of the .gguf file, unpacked": unpacking_bytes(view.lm)}


def disk_of(s: Settings, view: ModelView, merge: int) -> int:
    """Bytes of the result, and of what is kept until it is written."""
    shape, size = view.shape.largest, view.lm.dtype.itemsize
    bases = sum(_statistics(view, merge)) if s.rotates else 0
    cut = shape.layers * size * sum(p.numel() for p in view.attention[0].parameters())
    fitted = shape.layers * size * shape.hidden * sum(_refitted(view)) if s.refits else 0
    return memory.weight_bytes(view.lm) + bases + cut + fitted


def _check_disk(room: Room, out: Path) -> None:
    """Raise NoSpace for a disk that cannot take what will be written."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else 0
    free = shutil.disk_usage(place).free + there
    if free < room.disk:
        raise NoSpace(
            f"the disk of {out} has {_gib(free)} left, and the result with what is kept on the way takes "
            f"{_gib(room.disk)}: free some space or choose another --out"
        )


@dataclass(frozen=True)
class Work:
    """What one phase computes: tokens that pass all blocks (a backward counts twice), operations of float64, and how
    often all blocks are read."""

    tokens: int
    double: float
    reads: int


def work(s: Settings, view: ModelView) -> dict[str, Work]:
    """By phase. Moments are taken to cost as much as the pass that they are made in."""
    judged = len(s.windows) * max(len(s.eval), 1)
    found = {"importance": Work(2 * s.calibration_tokens, 0, 1)}
    if s.probes == "estimated":
        found["sensitivity"] = Work(5 * (s.probe_tokens or 0), 0, 2)
    found["evaluate dense"] = Work(judged * s.eval_tokens, 0, judged)
    found["surgery"] = Work(0, 0, 1)
    if s.refits:
        solved = sum(_solving(s, inputs, view.shape.hidden) for inputs in _refitted(view))
        found["refit"] = Work(4 * s.repair_tokens, view.shape.layers * solved, 2)
    found["evaluate pruned"] = Work(judged * s.eval_tokens, 0, judged)
    found["save"] = Work(0, 0, 2)
    return found


def _solving(s: Settings, inputs: int, outputs: int) -> float:
    """Operations of one matrix's fits: for each ridge a factor, a solution, and its error on what is held out."""
    size = min(s.repair_tokens, inputs)
    beside = 2 * size * inputs * outputs if size < inputs else 0.0
    return len(RIDGES) * (size**3 / 3 + 2 * size**2 * outputs + 2 * size * inputs * outputs + beside)


def _seconds(s: Settings, view: ModelView, device: torch.device) -> float:
    """About how long it takes, by how fast two products are now."""
    weights = sum(p.numel() for block in view.blocks for p in block.parameters())
    single = _rate((512, view.shape.hidden, 2048), view.lm.dtype, device)
    double = _rate((1024, 1024, 1024), torch.float64, device)
    return sum(2 * weights * part.tokens / single + part.double / double for part in work(s, view).values())


def _rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product, at its second try."""
    a, b = torch.randn(shape[:2]).to(device, dtype), torch.randn(shape[1:]).to(device, dtype)
    taken = 1.0
    for _ in range(2):
        start = time.perf_counter()
        (a @ b).sum().item()
        taken = time.perf_counter() - start
    return 2 * shape[0] * shape[1] * shape[2] / max(taken, 1e-6)
