"""`bench`: prefill, decoding and memory of two models over a grid of batch x context, beside what the bytes allow."""

import gc
import io
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvprune.channels.choice.merging import AUTO
from kvprune.errors import BadOption, NoSpace
from kvprune.measure import memory, plot
from kvprune.measure.context import held_tokens, windows_of
from kvprune.measure.evaluate import bytes_per_token
from kvprune.measure.shapes import dense_config, pruned_config, random_model
from kvprune.measure.speed import Side, alternate
from kvprune.models.family import dense_kv_heads, dense_shapes, mlp_width
from kvprune.models.places import find_device
from kvprune.models.source import Source, load_config, load_model, resolve
from kvprune.models.tokenizer import one_tokenizer
from kvprune.options import size_in_bytes, whole_numbers
from kvprune.progress import Progress
from kvprune.runtime import PREFIX
from kvprune.runtime.attention import pack_groups
from kvprune.runtime.dtype import asked_dtype, name_of
from kvprune.runtime.files import write_whole, writing_to
from kvprune.runtime.linear import PackedLinear, pack_weights
from kvprune.runtime.quantized import quantized_cache, quantizer
from kvprune.tokens.filter import asked_filter
from kvprune.versions import versions

NAMES = ("dense", "pruned")


def bench(
    source: str | Path,
    against: str | Path | None = None,
    *,
    batch: str | int | Sequence[int] = (1,),
    context: str | int | Sequence[int] = (512,),
    new_tokens: int = 64,
    rounds: int = 5,
    skip: float | None = None,
    skip_layers: str | Sequence[int] | None = None,
    keep: float | None = None,
    kv_bits: int | None = None,
    memory_size: str | int | None = None,
    pruned_shape: bool = False,
    ratio: float | None = None,
    merge: int | str | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time `source` (called dense) and a second model (called pruned) in alternating runs, for every batch and context.

    The second is `against`; with `keep`, or `skip`, `against` or else the source itself under a TokenFilter(keep=keep),
    or (skip, layers=skip_layers), and with `kv_bits` (8, 4 or 2) on transformers' quantised cache; with
    `pruned_shape`, random weights of the source's shape, a name in SHAPES or a checkpoint, with `ratio` (0.5) of its KV
    bytes removed and `merge` (auto) KV heads made one, as in `prune`, beside random weights of the shape itself. The
    source alone is timed
    against itself, which shows the noise. A cell: `rounds` prefills of batch x context random tokens, then `rounds`
    times new_tokens steps behind them, medians and spreads, and the limit (weights + KV bytes read) dense / pruned.
    memory_size: also, as "24GiB", the largest batch that fits in it at a cell's context, by what the cell needed. out:
    a .json file, written after every cell, and a picture beside it. Returns {"environment" (with "merge": how many KV
    heads of the second became one), "cells": [{"batch", "context", "prefill_seconds", "decode_tokens_per_second",
    "latency_seconds" (of new_tokens behind a prompt), "decode_ratio", "prefill_ratio", "decode_limit",
    "decode_ratio_over_limit", "spread" ({"decode", "prefill"}: least and largest ratio), "rounds" (that were timed),
    "memory_bytes", "decode_bytes_read" ({"all", "weights", "kv_cache"} of each), "largest_batch"}]}; a cell that does
    not fit in memory has "error" instead. Raises a KVPruneError for what can be known before.
    """
    bytes_given = None if memory_size is None else size_in_bytes(memory_size)
    grid = Grid(whole_numbers("batch", batch), whole_numbers("context", context), new_tokens, rounds, bytes_given)
    if pruned_shape and not (against is skip is keep is None):
        raise BadOption("--pruned-shape makes both models itself; leave out --against, --skip and --keep")
    if ratio is not None and not pruned_shape:
        raise BadOption("--ratio is what --pruned-shape removes; a checkpoint has its own")
    if merge is not None and not pruned_shape:
        raise BadOption("--merge is for --pruned-shape; a checkpoint has merged what it has")
    token_filter = asked_filter(skip, layers=skip_layers, keep=keep)
    quantizer_name = None if kv_bits is None else quantizer(kv_bits)
    target = find_device(device)
    if target.type not in ("cpu", "cuda"):
        raise BadOption(f"--device {device}: only cpu and cuda are timed")
    kept = None if out is None else _Output(Path(out))
    progress = progress or Progress()
    with progress.phase("load"):
        if pruned_shape:
            ratio = 0.5 if ratio is None else ratio
            first, _ = dense_config(source, revision, trust_remote_code)
            grid.check(first)
            second = pruned_config(first, ratio, merge=AUTO if merge is None else merge)
            models = _shapes(source, first, second, target, dtype)
        else:
            names = [source] if against is None else [source, against]
            models = _checkpoints([resolve(s, revision, trust_remote_code) for s in names], device, dtype, grid)
    for model in models:
        pack_groups(model)
        pack_weights(model)
    if token_filter is not None:
        token_filter(models[-1])  # what it refuses, it refuses before anything is timed
    if kv_bits is not None:
        quantized_cache(models[-1].config, kv_bits)
    sides = (Side(models[0]), Side(models[-1], token_filter, kv_bits))
    asked: dict[str, Any] = {"source": str(source), "against": None if against is None else str(against), "skip": skip}
    layers = None if token_filter is None else getattr(token_filter.settings, "layers", None)
    asked |= {"skip_layers": layers and list(layers), "pruned_shape_ratio": ratio}
    config = models[-1].config
    own = config.per_layer_config[0]
    asked["merge"] = dense_kv_heads(own) // own.num_key_value_heads
    asked |= {"keep": keep, "kv_bits": kv_bits, "quantizer": quantizer_name}
    report: dict[str, Any] = {"environment": asked | _environment(models[0], grid), "cells": []}
    with progress.phase("bench", len(grid.cells)) as advance:
        for b, c in grid.cells:
            report["cells"].append({"batch": b, "context": c, **_cell(sides, b, c, grid)})
            if kept is not None:
                kept.write(report)
            advance(1, f"batch {b}, context {c}")
    return report


@dataclass(frozen=True)
class Grid:
    """What is measured: every batch with every context, and how; memory: bytes that a largest batch is asked for."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    rounds: int
    memory: int | None = None

    def __post_init__(self) -> None:
        given = {"batch": self.batches, "context": self.contexts}
        given |= {"new-tokens": (self.new_tokens,), "rounds": (self.rounds,)}
        for name, values in given.items():
            if not values or min(values) < 1:
                raise BadOption(f"--{name} needs whole numbers, at least 1")

    @property
    def cells(self) -> list[tuple[int, int]]:
        return [(b, c) for c in self.contexts for b in self.batches]

    def check(self, config: PreTrainedConfig) -> None:
        """Raise BadOption for more tokens than the model takes."""
        tokens, limit = max(self.contexts) + self.new_tokens, config.max_position_embeddings
        if tokens > limit:
            raise BadOption(f"context and new tokens are {tokens} together, the model takes {limit}; ask for fewer")


class _Output:
    """OUT.json and OUT.png, never half-written. Raises BadOption and NoSpace before anything is timed."""

    def __init__(self, path: Path):
        plot.check()
        if path.suffix != ".json":
            raise BadOption(f"--out {path} is no .json file; the picture goes beside it as .png")
        for file in (path, path.with_suffix(".png")):
            if file.exists():
                raise BadOption(f"--out: {file} exists; remove it or choose another name")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise NoSpace(f"--out {path}: {path.parent} is no folder that can be written to; choose another one")
        self.path = path

    def write(self, report: dict[str, Any]) -> None:
        with writing_to(self.path.parent):
            write_whole(self.path, json.dumps(report, indent=1) + "\n")
            picture = io.BytesIO()
            plot.draw(report, picture)
            write_whole(self.path.with_suffix(".png"), picture.getvalue())


def _checkpoints(sources: list[Source], device: str, dtype: str, grid: Grid) -> list[PreTrainedModel]:
    for source in sources:
        grid.check(load_config(source))
    if len(sources) == 2:
        one_tokenizer(sources)
    models = [load_model(source, device, dtype) for source in sources]
    first, last = models[0].dtype, models[-1].dtype
    if first != last:
        raise BadOption(f"one model is {first}, the other {last}; give both one --dtype")
    return models


def _shapes(source, dense: PreTrainedConfig, pruned: PreTrainedConfig, device, dtype: str) -> list[PreTrainedModel]:
    """Random weights: the shape, and the shape pruned."""
    kind = asked_dtype(dtype, torch.bfloat16, device)
    try:
        second = random_model(pruned, device, kind)  # which takes most memory on the way, so it goes first
        return [random_model(dense, device, kind), second]
    except (MemoryError, RuntimeError) as error:
        if not memory.is_out_of_memory(error):
            raise
        raise BadOption(f"two models of the shape {source} do not fit in the memory of {device}") from None


def _environment(model: PreTrainedModel, grid: Grid) -> dict[str, Any]:
    device = model.device
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    return {
        "new_tokens": grid.new_tokens,
        "rounds": grid.rounds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": name_of(model.dtype),
        "engine": "transformers, growing cache" + (", packed weights" if packed else ""),
        "attention": model.config._attn_implementation,
        "versions": versions(),
    }


def _cell(sides: tuple[Side, Side], batch: int, context: int, grid: Grid) -> dict[str, Any]:
    try:
        return _measure(sides, batch, context, grid)
    except (MemoryError, RuntimeError) as error:
        if not memory.is_out_of_memory(error):
            raise
        return {"error": f"out of memory: batch {batch} with context {context} does not fit"}
    finally:
        for side in sides:
            side.forget()
        gc.collect()
        memory.release()


def _measure(sides: tuple[Side, Side], batch: int, context: int, grid: Grid) -> dict[str, Any]:
    device, new = sides[0].model.device, grid.new_tokens
    vocabulary = min(side.model.config.vocab_size for side in sides)
    generator = torch.Generator().manual_seed(0)
    _refuse_what_cannot_fit(sides, batch, context, new)
    ids = torch.randint(0, vocabulary, (batch, context), generator=generator).to(device)
    memory_bytes = {name: _memory(side, ids) for name, side in zip(NAMES, sides, strict=True)}
    largest = {name: _largest_batch(grid.memory, batch, parts) for name, parts in memory_bytes.items()}
    prefill = alternate(sides, lambda side: side.prefill(ids), grid.rounds, warm=True)
    read = []
    for side in sides:  # the cache as it is half way
        side.rewind(context)
        with side.running():
            side.decode(ids[:, -1:], math.ceil(new / 2))
        parts = {"weights": side.weight_bytes_read(), "kv_cache": side.kv_bytes_read()}
        read.append({"all": side.bytes_read(), **parts})
    steps, back = (lambda side: side.decode(ids[:, -1:], new)), (lambda side: side.rewind(context))
    decode = alternate(sides, steps, grid.rounds, before=back, warm=True)
    pairs = list(zip(NAMES, prefill.seconds, decode.seconds, strict=True))
    limit = read[0]["all"] / read[1]["all"]
    both = {"prefill": prefill, "decode": decode}
    return {
        "prefill_seconds": {name: p for name, p, _ in pairs},
        "decode_tokens_per_second": {name: batch * new / d for name, _, d in pairs},
        "latency_seconds": {name: p + d for name, p, d in pairs},
        "prefill_ratio": prefill.ratio,
        "decode_ratio": decode.ratio,
        "decode_limit": limit,
        "decode_ratio_over_limit": decode.ratio / limit,
        "spread": {name: [timing.ratios[0], timing.ratios[-1]] for name, timing in both.items()},
        "rounds": {name: len(timing.rounds) for name, timing in both.items()},
        "memory_bytes": memory_bytes,
        "decode_bytes_read": dict(zip(NAMES, read, strict=True)),
        **({} if grid.memory is None else {"largest_batch": largest}),
    }


def _largest_batch(available: int | None, batch: int, parts: dict[str, int | None]) -> int | None:
    """How many sequences like these fit in so many bytes beside the weights, by what `batch` of them needed; None where
    that is not known."""
    needed = [parts[name] for name in ("kv_cache", "kv_room", "activations")]
    if available is None or None in needed:
        return None
    left = available - cast(int, parts["weights"])
    return max(left * batch // max(sum(cast(list[int], needed)), 1), 0)


def _refuse_what_cannot_fit(sides: tuple[Side, Side], batch: int, context: int, new: int) -> None:
    """Raise MemoryError where both caches, with the room that they keep free, and a prefill's widest layer would not
    fit: an operating system may kill rather than refuse."""
    available = memory.free(sides[0].model.device)
    if available is None:
        return
    config, item = sides[0].model.config, sides[0].model.dtype.itemsize
    a_token = sum((2 if side.copies else 1) * bytes_per_token(side.model) for side in sides)
    a_layer = 1.125 * a_token / len(windows_of(config))
    caches = batch * held_tokens(config, context + new) * a_layer
    queries = max(side.model.config.num_attention_heads * _widest(side.model.config) for side in sides)
    numbers = 2 * mlp_width(config) + 2 * config.hidden_size + 4 * max(queries, config.hidden_size)
    layer = batch * context * numbers * item
    if caches + layer > available:
        raise MemoryError


def _widest(config: PreTrainedConfig) -> int:
    """Channels of a head in the widest layer; of merged heads more than in the dense model."""
    is_pruned = config.model_type.startswith(PREFIX)
    return max(config.widths() if is_pruned else (channels for _, channels in dense_shapes(config)))


def _memory(side: Side, ids: torch.Tensor) -> dict[str, int | None]:
    """Bytes of the weights, of keys and values with the prompt in the cache, of the room that the cache keeps free, of
    what a prefill needs beside them, and their sum."""
    device = side.model.device
    with side.running():
        for weights in side.model.parameters():
            if weights.layout is torch.strided:
                weights.sum()  # what is still on the disk comes in
        side.forget()
        memory.release()
        known = device.type == "cuda" or memory.forget_peak()
        peak = memory.PeakMemory(device)
        side.prefill(ids)
        highest = peak.bytes()
    layers = side.cache.layers
    cache, held = sum(map(memory.kv_bytes, layers)), sum(map(memory.held_bytes, layers))
    parts = {"weights": memory.weight_bytes(side.model), "kv_cache": cache, "kv_room": held - cache}
    beside = max(highest - held, 0) if known else None
    return {**parts, "activations": beside, "peak": None if beside is None else sum(parts.values()) + beside}
