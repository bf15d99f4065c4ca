"""Whether layers should lose their attention altogether, or all of them some width: the same KV bytes, spent both ways.

The paper (KVPruner, arXiv 2409.11057) leaves open how depth compares with width. Every cell (ratio, depth) is one
`kvprune.prune`, repaired, in memory, in which so many layers have no attention and the others share what is left.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvprune.channels.prune import prune
from kvprune.channels.settings import Settings, with_preset
from kvprune.errors import BadOption, KVPruneError, UnreachableRatio
from kvprune.measure import memory
from kvprune.measure.plot import check as check_matplotlib
from kvprune.models.source import resolve
from kvprune.progress import Progress
from kvprune.runtime.files import writing_to
from kvprune.studies.journal import PICTURE, StudyJournal
from kvprune.studies.noted import Noted
from kvprune.studies.plot import COLOURS
from kvprune.text.corpus import text_names
from kvprune.versions import versions

_OWN = ("ratio", "depth", "plan", "allocation", "layout")  # what the study decides


def study_depth(
    source: str | Path,
    out: str | Path,
    *,
    ratios: Sequence[float] = (0.25, 0.5),
    depths: Sequence[int] = (0, 1, 2, 4),
    eval: Sequence[str | Path] = ("wikitext2", "ptb"),
    eval_tokens: int = 16384,
    window: int = 512,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Prune `source` at every ratio with every number of layers without attention, and say which is best.

    ratios: fractions of the KV bytes to remove; depths: how many layers lose their attention, 0 among them. options:
    the other fields of prune's Settings. A depth that takes more than a ratio allows is left out there. Writes
    out/study.jsonl (a cell a line, as they finish), study.json (the report, which is returned) and study.png. Returns
    the settings and {"cells": [{"ratio", "depth", "dropped" (layers), "width" (of the others, mean), "perplexity",
    "kv_bytes_per_token", "weights_read_bytes", "parameters", "seconds"}], "best" (of every ratio: the depth), "said" (a
    sentence)}. Raises a KVPruneError.
    """
    check_matplotlib()
    ratios, depths = sorted(set(ratios)), sorted(set(depths))
    if not ratios or not depths or depths[0] != 0 or ratios[0] <= 0:
        raise BadOption("a study of depth needs ratios above 0, and depths with 0 among them, to compare with")
    for name in _OWN:
        if name in options:
            raise BadOption(f"{name} is what a study of depth decides itself; leave it out")
    options = with_preset(None, options)
    given = {"eval": tuple(text_names(eval)), "eval_tokens": eval_tokens, "windows": (window,), **options}
    settings = Settings(source=str(source), **given)
    found = resolve(settings.source, settings.revision, settings.trust_remote_code)
    if found.is_pruned:
        raise BadOption(f"{found.name} is pruned already; study the dense model it came from")
    fixed = {name: value for name, value in settings.as_json().items() if name not in _OWN}
    identity = {"study": "depth", **fixed, "ratios": ratios, "depths": depths, "versions": versions()}
    journal = StudyJournal(Path(out), identity, resume)
    journal.start()
    progress = progress or Progress()
    wanted = [(ratio, depth) for ratio in ratios for depth in depths]
    done = {(cell["ratio"], cell["depth"]) for cell in journal.cells}
    try:
        with progress.phase("prunes", len(wanted)) as advance:
            for ratio, depth in wanted:
                if (ratio, depth) not in done:
                    inner = Noted(progress, advance, f"{ratio:.0%} without {depth}")
                    journal.add(_cell(str(source), ratio, depth, given, inner))
                advance(1)
    except KVPruneError:
        journal.discard_if_empty()
        raise
    report = _report(journal, wanted)
    with writing_to(journal.out):
        draw(report, journal.out / PICTURE)
    journal.finish(report)
    return report


def _cell(source: str, ratio: float, depth: int, given: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """One prune; "perplexity" is None where so many layers are more than the ratio takes."""
    start, cell = time.perf_counter(), {"ratio": ratio, "depth": depth}
    try:
        result = prune(source, ratio=ratio, depth=depth, progress=progress, **given)
    except UnreachableRatio:
        if not depth:
            raise
        return {**cell, "perplexity": None}
    record = result.record
    del result
    memory.release()
    kept = [width for width in record["widths"] if width]
    return {
        **cell,
        "dropped": [layer for layer, width in enumerate(record["widths"]) if not width],
        "width": sum(kept) / len(kept),
        **{name: record[name] for name in ("perplexity", "kv_bytes_per_token", "weights_read_bytes", "parameters")},
        "seconds": round(time.perf_counter() - start, 3),
    }


def _report(journal: StudyJournal, wanted: list[tuple[float, int]]) -> dict[str, Any]:
    by_key = {(cell["ratio"], cell["depth"]): cell for cell in journal.cells}
    cells = [by_key[key] for key in wanted if by_key[key]["perplexity"] is not None]
    best = {f"{ratio:g}": best_of([c for c in cells if c["ratio"] == ratio]) for ratio in journal.settings["ratios"]}
    return {**journal.settings, "cells": cells, "best": best, "said": sentence(best)}


def loss_of(cell: dict[str, Any]) -> float:
    """The geometric mean over texts of pruned / dense."""
    product = 1.0
    for row in cell["perplexity"]:
        product *= row["pruned"] / row["dense"]
    return product ** (1 / len(cell["perplexity"]))


def best_of(cells: list[dict[str, Any]]) -> int:
    """The depth that loses least; of equal ones the smallest."""
    return min(cells, key=lambda cell: (loss_of(cell), cell["depth"]))["depth"]


def sentence(best: dict[str, int]) -> str:
    """What is best on this model, in words."""
    parts = [
        f"at {float(ratio):.0%} of the KV bytes "
        + ("width alone" if not depth else f"{depth} layer{'s' if depth > 1 else ''} without attention")
        for ratio, depth in best.items()
    ]
    return "Loses least: " + "; ".join(parts) + "."


def draw(report: dict[str, Any], path: Path) -> None:
    """A panel a text, a line a ratio: perplexity over dense against the layers without attention."""
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(row["text"] for row in report["cells"][0]["perplexity"]))
    figure = Figure(figsize=(4.6 * len(texts), 4), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for number, ratio in enumerate(report["ratios"]):
            cells = [cell for cell in report["cells"] if cell["ratio"] == ratio]
            rows = [next(row for row in cell["perplexity"] if row["text"] == text) for cell in cells]
            values = [row["pruned"] / row["dense"] for row in rows]
            depths = [cell["depth"] for cell in cells]
            axes.plot(
                depths, values, "o-", color=COLOURS[number % len(COLOURS)], label=f"{ratio:.0%} of the KV bytes cut"
            )
        axes.set_title(Path(text).name, fontsize=10)
        axes.set_xlabel("layers without attention")
        axes.set_xticks(report["depths"])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity / dense")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{Path(report['source']).name}: depth against width at equal KV bytes", fontsize=11)
    figure.savefig(path, dpi=150, format="png")
