"""`bench`: prefill, decoding and memory of two models over a grid of batch x context, beside what the bytes allow."""

import gc
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprune.channels.record import versions
from kvprune.errors import BadOption
from kvprune.measure import memory, plot
from kvprune.measure.evaluate import bytes_per_token
from kvprune.measure.shapes import SHAPES, dense_config, pruned_config, random_model
from kvprune.measure.speed import Side, alternate, layer_bytes
from kvprune.models.source import DTYPES, find_device, load_config, load_model, resolve
from kvprune.options import whole_numbers
from kvprune.progress import Progress
from kvprune.runtime.attention import pack_groups
from kvprune.tokens.filter import TokenFilter

NAMES = ("dense", "pruned")


def bench(
    source: str | Path,
    against: str | Path | None = None,
    *,
    batch: str | Sequence[int] = (1,),
    context: str | Sequence[int] = (512,),
    new_tokens: int = 64,
    rounds: int = 5,
    skip: float | None = None,
    skip_layers: str | Sequence[int] | None = None,
    pruned_shape: bool = False,
    ratio: float = 0.5,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time `source` (called dense) and a second model (called pruned) in alternating runs, for every batch and context.

    The second is `against`; with `skip`, `against` or else the source itself under a TokenFilter(skip, layers=
    skip_layers); with `pruned_shape`, random weights of the source's shape, a name in SHAPES or a checkpoint, with
    `ratio` of its KV bytes removed, beside random weights of the shape itself. The source alone is timed against
    itself, which shows the noise. A cell: `rounds` prefills of batch x context random tokens, then `rounds` times
    new_tokens steps, medians and spreads, and the limit (weights + KV bytes read) dense / pruned.
    out: a JSON file, written after every cell, and a picture beside it. Returns {"environment", "cells": [{"batch",
    "context", "prefill_seconds", "decode_tokens_per_second", "latency_seconds" (of new_tokens behind a prompt),
    "decode_ratio", "prefill_ratio", "decode_limit", "decode_ratio_over_limit", "spread" ({"decode", "prefill"}: least
    and largest ratio), "memory_bytes"}]}; a cell that does not fit in memory has "error" instead. Raises a
    KVPruneError for what can be known before.
    """
    progress = progress or Progress()
    batches, contexts = whole_numbers("batch", batch), whole_numbers("context", context)
    _check(batches, contexts, new_tokens, rounds)
    if pruned_shape and (against is not None or skip is not None):
        raise BadOption("--pruned-shape makes both models itself; leave out --against and --skip")
    if skip_layers is not None and skip is None:
        raise BadOption("--skip-layers needs --skip: the share of attention to skip")
    if out is not None:
        plot.check()
    target = find_device(device)
    with progress.phase("load"):
        if pruned_shape:
            models = _shapes(source, ratio, target, dtype, revision, trust_remote_code)
        else:
            names = [source] if against is None else [source, against]
            models = [load_model(resolve(s, revision, trust_remote_code), device, dtype) for s in names]
    first, second = models[0], models[-1]
    _check_models(first, second, max(contexts) + new_tokens)
    for model in models:
        if target.type == "cpu":
            pack_groups(model)
    layers = None if skip_layers is None else whole_numbers("skip-layers", skip_layers)
    token_filter = None if skip is None else TokenFilter(skip, layers=layers)
    sides = (Side(first), Side(second, token_filter))
    if token_filter is not None:
        token_filter(second)  # what it refuses, it refuses before anything is timed
    kept = Path(out) if out is not None else None
    report: dict[str, Any] = {
        "environment": _environment(source, against, first, skip, ratio if pruned_shape else None, new_tokens, rounds),
        "cells": [],
    }
    grid = [(b, c) for c in contexts for b in batches]
    with progress.phase("bench", len(grid)) as advance:
        for b, c in grid:
            report["cells"].append({"batch": b, "context": c, **_cell(sides, b, c, new_tokens, rounds)})
            if kept is not None:
                kept.write_text(json.dumps(report, indent=1) + "\n")
                plot.draw(report, kept.with_suffix(".png"))
            advance(1, f"batch {b}, context {c}")
    return report


def _check(batch: Sequence[int], context: Sequence[int], new_tokens: int, rounds: int) -> None:
    for name, values in (("batch", batch), ("context", context), ("new-tokens", [new_tokens]), ("rounds", [rounds])):
        if not values or min(values) < 1:
            raise BadOption(f"--{name} needs whole numbers, at least 1")


def _check_models(first: PreTrainedModel, second: PreTrainedModel, tokens: int) -> None:
    for model in (first, second):
        limit = model.config.max_position_embeddings
        if tokens > limit:
            raise BadOption(f"context and new tokens are {tokens} together, the model takes {limit}; ask for fewer")
    if first.config.vocab_size != second.config.vocab_size:
        raise BadOption("the two models have different vocabularies; compare models with one tokenizer")


def _shapes(source, ratio: float, device: torch.device, dtype: str, revision, trust) -> list[PreTrainedModel]:
    """Random weights: the shape, and the shape pruned."""
    known = str(source) in SHAPES
    config = dense_config(str(source)) if known else load_config(resolve(source, revision, trust))
    kind = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    return [random_model(c, device, kind) for c in (config, pruned_config(config, ratio))]


def _environment(source, against, model: PreTrainedModel, skip, ratio, new_tokens: int, rounds: int) -> dict[str, Any]:
    device = model.device
    return {
        "source": str(source),
        "against": None if against is None else str(against),
        "skip": skip,
        "pruned_shape_ratio": ratio,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "engine": "transformers, growing cache",
        "attention": model.config._attn_implementation,
        "versions": versions(),
    }


def _cell(sides: tuple[Side, Side], batch: int, context: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    try:
        return _measure(sides, batch, context, new_tokens, rounds)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return {"error": f"out of memory: batch {batch} with context {context} does not fit"}
    finally:
        for side in sides:
            side.cache = None
        gc.collect()
        memory.release()


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "not enough memory" in str(error) or "can't allocate memory" in str(error)


def _measure(sides: tuple[Side, Side], batch: int, context: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    device = sides[0].model.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, sides[0].model.config.vocab_size, (batch, context), generator=generator).to(device)
    _refuse_what_cannot_fit(sides, batch * (context + new_tokens))
    memory_bytes = {name: _memory(side, ids) for name, side in zip(NAMES, sides, strict=True)}
    prefill = alternate(sides, lambda side: side.prefill(ids), rounds)
    cut_back = all(side.token_filter is None for side in sides)  # otherwise both grow from round to round
    growth = 1 + new_tokens * (1 if cut_back else rounds + 1) / 2 / context  # a step reads the cache as it is half way
    read = [side.weight_bytes_read + growth * side.kv_bytes_read() for side in sides]
    decode = alternate(
        sides,
        lambda side: side.decode(ids[:, -1:], new_tokens),
        rounds,
        after=lambda side: side.cache.crop(-new_tokens) if cut_back else None,
    )
    pairs = list(zip(NAMES, prefill.seconds, decode.seconds, strict=True))
    limit = read[0] / read[1]
    return {
        "prefill_seconds": {name: p for name, p, _ in pairs},
        "decode_tokens_per_second": {name: batch * new_tokens / d for name, _, d in pairs},
        "latency_seconds": {name: p + d for name, p, d in pairs},
        "prefill_ratio": prefill.ratio,
        "decode_ratio": decode.ratio,
        "decode_limit": limit,
        "decode_ratio_over_limit": decode.ratio / limit,
        "spread": {name: [t.ratios[0], t.ratios[-1]] for name, t in (("prefill", prefill), ("decode", decode))},
        "memory_bytes": memory_bytes,
    }


def _refuse_what_cannot_fit(sides: tuple[Side, Side], tokens: int) -> None:
    """Raise MemoryError where both caches would not fit: an operating system may kill rather than refuse."""
    needed = sum(bytes_per_token(side.model) for side in sides) * tokens
    available = memory.free(sides[0].model.device)
    if available is not None and needed > available:
        raise MemoryError


def _memory(side: Side, ids: torch.Tensor) -> dict[str, int | None]:
    """Bytes of the weights, of the cache with the prompt in it, of what a prefill needs beside them, and their sum."""
    device = side.model.device
    with side.running():
        side.prefill(ids[:1, :1])  # weights that are still on the disk come in
        side.cache = None
        memory.release()
        known = device.type == "cuda" or memory.forget_peak()
        peak = memory.PeakMemory(device)
        side.prefill(ids)
        highest = peak.bytes()
    weights, cache = memory.weight_bytes(side.model), sum(layer_bytes(layer) for layer in side.cache.layers)
    beside = max(highest - cache, 0) if known else None
    total = None if beside is None else weights + cache + beside
    return {"weights": weights, "kv_cache": cache, "activations": beside, "peak": total}
