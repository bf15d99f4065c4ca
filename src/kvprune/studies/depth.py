"""Whether layers should lose their attention altogether, or their whole block, or all of them some width: the same KV
bytes, spent in three ways.

The paper (KVPruner, arXiv 2409.11057) leaves open how depth compares with width. Every cell (ratio, blocks, depth) is
one `kvprune.prune`, repaired, in memory, in which so many blocks are gone and so many layers more have no attention,
and the others share what is left. How fast it decodes is measured behind all prunes: see depth_speed.py.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from kvprune.channels.prune import prune
from kvprune.channels.settings import Settings
from kvprune.errors import BadOption, UnreachableRatio
from kvprune.measure import memory
from kvprune.measure.plot import check as check_matplotlib
from kvprune.models.source import load_config, resolve
from kvprune.options import given_of
from kvprune.progress import Progress
from kvprune.runtime.files import writing_to
from kvprune.runtime.shown import layer_numbers
from kvprune.studies.depth_picture import draw
from kvprune.studies.depth_speed import Run, add_speeds
from kvprune.studies.journal import PICTURE, StudyJournal
from kvprune.studies.noted import Noted
from kvprune.text.corpus import text_names
from kvprune.versions import versions

_OWN = ("ratio", "depth", "drop_blocks", "plan", "allocation", "layout")  # what the study decides
_FIGURES = ("perplexity", "kv_bytes_per_token", "weights_read_bytes", "parameters")
Key = tuple[float, int, int]  # ratio, whole blocks that are gone, layers more without attention


def study_depth(
    source: str | Path,
    out: str | Path,
    *,
    ratios: Sequence[float] = (0.25, 0.5),
    depths: Sequence[int] = (0, 1, 2),
    drop_blocks: Sequence[int] = (0, 1, 2),
    eval: Sequence[str | Path] = ("wikitext2", "ptb"),
    eval_tokens: int = 16384,
    window: int = 512,
    speed: bool = True,
    batch: int = 8,
    context: int = 1024,
    new_tokens: int = 32,
    rounds: int = 5,
    resume: bool = False,
    calibration: str | Path = "wikitext2",
    calibration_tokens: int = 16384,
    calibration_window: int = 512,
    importance: str | None = None,
    channels: str | None = None,
    merge: int | str | None = None,
    tensor_parallel: int = 1,
    repair: str | None = None,
    repair_tokens: int | None = None,
    align: int | None = None,
    min_width: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune `source` at every ratio with every number of blocks dropped, and of layers without attention beside these,
    and say which is best.

    ratios: fractions of the KV bytes to remove; depths: how many layers lose their attention, drop_blocks: how many
    their block, 0 among both. calibration to trust_remote_code: as in `prune`. What takes more than a ratio allows is
    left out there. speed: also time decoding beside dense, in `rounds` alternating runs of new_tokens steps behind
    batch x context tokens; a study without is made whole with `resume`. Writes out/study.jsonl (a cell a line, as they
    finish), study.json (the report, which is returned) and study.png. Returns the settings and {"cells": [{"ratio",
    "drop_blocks", "depth", "blocks" (that are gone), "dropped" (layers without attention beside these), "width" (of
    the others, mean), "perplexity", "kv_bytes_per_token", "weights_read_bytes", "parameters", "seconds", "speed" (None,
    or {"decode_ratio" (to dense), "spread" (of it), "decode_limit" (by the bytes read), "decode_tokens_per_second"})}],
    "best" (of every ratio: the depth), "best_blocks" (the number of blocks that go with it), "said" (a sentence)}.
    Raises a KVPruneError.
    """
    options = given_of(Settings, {name: value for name, value in locals().items() if name not in _OWN})
    check_matplotlib()
    ratios, depths, drop_blocks = sorted(set(ratios)), sorted(set(depths)), sorted(set(drop_blocks))
    if not ratios or ratios[0] <= 0 or 0 not in depths or 0 not in drop_blocks or min(*depths, *drop_blocks) < 0:
        raise BadOption(
            "a study of depth needs ratios above 0, and depths and drop-blocks from 0 up with 0 among them, to compare "
            "with"
        )
    given = {**options, "eval": tuple(text_names(eval)), "eval_tokens": eval_tokens, "windows": (window,)}
    settings = Settings(**given)
    found = resolve(settings.source, settings.revision, settings.trust_remote_code)
    if found.is_pruned:
        raise BadOption(f"{found.name} is pruned already; study the dense model it came from")
    run = Run(batch, context, new_tokens, rounds)
    run.check(load_config(found))
    fixed = {name: value for name, value in settings.as_json().items() if name not in _OWN}
    identity = {"study": "depth", **fixed, "ratios": ratios, "depths": depths, "drop_blocks": drop_blocks}
    journal = StudyJournal(Path(out), identity | {"run": asdict(run), "versions": versions()}, resume)
    progress = progress or Progress()
    wanted = [(ratio, blocks, depth) for ratio in ratios for blocks in drop_blocks for depth in depths]
    with journal.running():
        done = {key_of(cell) for cell in journal.cells}
        with progress.phase("prunes", len(wanted)) as advance:
            for key in wanted:
                if key not in done:
                    inner = Noted(progress, advance, f"{key[0]:.0%}, {told(*key[1:])}")
                    journal.add(_cell(key, given, inner))
                advance(1)
        if speed:
            add_speeds(journal, load_config(found), run, settings.device, settings.dtype, progress)
        report = _report(journal, wanted)
        with writing_to(journal.out):
            draw(report, journal.out / PICTURE)
        journal.finish(report)
    return report


def key_of(cell: dict[str, Any]) -> Key:
    return cell["ratio"], cell["drop_blocks"], cell["depth"]


def _cell(key: Key, given: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """One prune; "perplexity" is None where that takes more than the ratio. "config": of the pruned model."""
    ratio, blocks, depth = key
    start, cell = time.perf_counter(), {"ratio": ratio, "drop_blocks": blocks, "depth": depth}
    try:
        result = prune(ratio=ratio, depth=depth, drop_blocks=blocks, progress=progress, **given)
    except UnreachableRatio:
        if not depth + blocks:
            raise
        return {**cell, "perplexity": None}
    model = cast(PreTrainedModel, result.model)  # nothing is streamed that is not written
    record, config = result.record, json.loads(model.config.to_json_string())
    del result, model
    memory.release()
    kept, gone = [width for width in record["widths"] if width], record["dropped_blocks"]
    without = [n for n, width in zip(layer_numbers(record), record["widths"], strict=True) if not width]
    return {
        **cell,
        "blocks": gone,
        "dropped": [number for number in without if number not in gone],
        "width": sum(kept) / len(kept),
        **{name: record[name] for name in _FIGURES},
        "seconds": round(time.perf_counter() - start, 3),
        "config": config,
    }


def _report(journal: StudyJournal, wanted: list[Key]) -> dict[str, Any]:
    prunes = {key_of(cell): cell for cell in journal.cells if "perplexity" in cell}
    speeds = {key_of(cell): cell["speed"] for cell in journal.cells if "speed" in cell}
    cells = []
    for key in wanted:
        if prunes[key]["perplexity"] is not None:
            shown = {name: value for name, value in prunes[key].items() if name != "config"}
            cells.append(shown | {"speed": speeds.get(key)})
    of_ratio = {f"{ratio:g}": [c for c in cells if c["ratio"] == ratio] for ratio in journal.settings["ratios"]}
    best = {ratio: best_of(found) for ratio, found in of_ratio.items()}
    return {
        **journal.settings,
        "cells": cells,
        "best": {ratio: cell["depth"] for ratio, cell in best.items()},
        "best_blocks": {ratio: cell["drop_blocks"] for ratio, cell in best.items()},
        "said": sentence(of_ratio),
    }


def loss_of(cell: dict[str, Any]) -> float:
    """The geometric mean over texts of pruned / dense."""
    product = 1.0
    for row in cell["perplexity"]:
        product *= row["pruned"] / row["dense"]
    return product ** (1 / len(cell["perplexity"]))


def best_of(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The cell that loses least; of equal ones that with most left."""
    return min(cells, key=lambda cell: (loss_of(cell), cell["drop_blocks"], cell["depth"]))


def told(blocks: int, depth: int) -> str:
    """In words."""
    parts = [f"{blocks} block{'s' if blocks > 1 else ''} dropped"] if blocks else []
    parts += [f"{depth} layer{'s' if depth > 1 else ''} without attention"] if depth else []
    return " and ".join(parts) or "width alone"


def sentence(of_ratio: dict[str, list[dict[str, Any]]]) -> str:
    """What is best on this model: what loses least, and what decodes fastest, where that was timed."""

    def each(chosen: Callable[[list[dict[str, Any]]], dict[str, Any]], more: Callable[[dict[str, Any]], str]) -> str:
        best = {ratio: chosen(cells) for ratio, cells in of_ratio.items()}
        return "; ".join(
            f"at {float(ratio):.0%} of the KV bytes {told(cell['drop_blocks'], cell['depth'])}{more(cell)}"
            for ratio, cell in best.items()
        )

    said = f"Loses least: {each(best_of, lambda cell: '')}."
    if all(cell["speed"] for cells in of_ratio.values() for cell in cells):
        fastest = each(
            lambda cells: max(cells, key=lambda cell: cell["speed"]["decode_ratio"]),
            lambda cell: f" ({cell['speed']['decode_ratio']:.2f} times dense, perplexity {loss_of(cell):.3f} times)",
        )
        said += f" Decodes fastest: {fastest}."
    return said
