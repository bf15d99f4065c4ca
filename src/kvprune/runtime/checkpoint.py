"""Writes a pruned model as a folder that loads again, or leaves no trace that could be taken for one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvprune.pages.card import card
from kvprune.progress import without_bars
from kvprune.runtime.dtype import stored_dtype
from kvprune.runtime.files import CARD, PLAN, RECORD, checksums, flush, writing_to

SHARD_SIZE = "2GB"  # a shard is in memory while it is written
_PARTIAL = ".partial"
_LAST = "config.json"  # nothing loads a folder that lacks it, so it is moved into place last


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan_json: str,
    record: Callable[[], dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """Write weights (safetensors, in shards), tokenizer, generation config, code, plan, record and card to `folder`.

    Everything is written to a folder inside first, flushed to the disk, and then moved, config.json last: a crash
    at any moment leaves nothing that loads. Returns the record with the checksums added. Raises NoSpace, after which
    what was there before is as it was. `record` is called when the weights are written, so that it can tell what
    that took.
    """
    partial = folder / _PARTIAL
    try:
        with writing_to(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_model(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / PLAN).write_text(plan_json, encoding="utf-8")
            complete = {**record(), "files": checksums(partial)}
            (partial / RECORD).write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
            if not (folder / CARD).exists():  # someone's own words
                (partial / CARD).write_text(card(complete, model.config.model_type), encoding="utf-8")
            _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return complete


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Weights in the dtype that they are stored in, config and code; the generation config as it came, even where
    transformers would refuse to write it (a temperature without do_sample, as many checkpoints have)."""
    generation, stored = model.generation_config, stored_dtype(model)
    computed = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in computed:  # alone: `model.to` would round the rotary table too
            if not data.is_meta:  # on disk, as stored
                parameter.data = data.to(stored)
        model.generation_config = GenerationConfig()
        with without_bars():
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    finally:
        model.generation_config = generation
        for parameter, data in computed:
            parameter.data = data
    (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")


def _move(partial: Path, folder: Path) -> None:
    """Every file, flushed to the disk first, config.json last."""
    names = sorted((p.name for p in partial.iterdir()), key=lambda name: (name == _LAST, name))
    for name in names:
        flush(partial / name)
    for name in names:
        if name == _LAST:
            flush(folder)
        os.replace(partial / name, folder / name)
    flush(folder)
