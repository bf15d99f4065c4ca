"""What the settings of `prune` cost, in seconds and in dense passes, beside the perplexity that they reach.

    KVPRUNE_DATA=DIR python benchmarks/prune_cost.py MODEL [--only PATTERN ...] [--dtype auto]

Every cell prunes by half, calibrated on the WikiText-2 valid split alone, with the evaluation that `prune` does by
default, and writes the folder. All of that is in its seconds. A dense pass is one forward with its loss over 16,384
tokens in windows of 512 (median of three before and three after). Then the folder is judged in windows of 512 on both
test splits, which is not counted. Needs a quiet machine; finished cells are kept.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cells import Cells

import kvprune
from kvprune.measure.perplexity import perplexity
from kvprune.progress import on_stderr
from kvprune.runtime.dtype import cpu_flags, name_of
from kvprune.text.corpus import read_text
from kvprune.text.windows import windows

TOKENS, WINDOW = 16384, 512
TEXTS = ("wikitext2", "ptb")
APART: dict[str, Any] = {"merge": 1}  # heads, as before they could be merged
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, heads apart": APART,
    **{
        f"uniform, refit on {n:,}": {**APART, "allocation": "uniform", "repair_tokens": n}
        for n in (8192, 16384, 32768, 65536)
    },
    **{
        f"budget, estimated on {probes:,}, refit on {n:,}": {
            **APART,
            "allocation": "budget",
            "probe_tokens": probes,
            "repair_tokens": n,
        }
        for probes, n in ((2048, 16384), (4096, 16384), (4096, 32768))
    },
    **{
        f"{allocation}, measured on {probes:,}, refit on {n:,}": {
            **APART,
            "allocation": allocation,
            "probes": "measured",
            "probe_tokens": probes,
            "repair_tokens": n,
        }
        for allocation, probes, n in (
            ("budget", 512, 16384),
            ("budget", 1024, 32768),
            ("budget", 4096, 65536),
            ("sensitivity", TOKENS, 65536),
        )
    },
}
PARTS = {  # phases of a prune, as the table sums them
    "load": ("load",),
    "scores": ("importance", "rotate"),
    "probes": ("sensitivity",),
    "refit": ("refit",),
    "evaluate": ("evaluate dense", "evaluate pruned"),
    "cut, save": ("surgery", "save"),
}


def dense_passes(model, ids: torch.Tensor) -> list[float]:
    """Seconds of three passes."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        perplexity(model, ids)
        found.append(time.perf_counter() - start)
    return found


def judged(source: str | Path, dtype: str) -> dict[str, float]:
    rows = kvprune.evaluate(source, texts=TEXTS, window_lengths=[WINDOW], tokens=TOKENS, dtype=dtype)["perplexity"]
    return {row["text"]: row["values"][0] for row in rows}


def cell(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = kvprune.load(arguments.model, dtype=arguments.dtype), kvprune.load_tokenizer(arguments.model)
    ids = windows(read_text("wikitext2", "valid"), tokenizer, WINDOW, TOKENS)
    perplexity(model, ids[:8])  # warm-up
    passes = dense_passes(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        progress = on_stderr()
        start = time.perf_counter()
        record = kvprune.prune(arguments.model, out, progress=progress, dtype=arguments.dtype, **options).record
        seconds = time.perf_counter() - start
        passes += dense_passes(model, ids)
        found = judged(out, arguments.dtype)
    one = statistics.median(passes)
    parts = {name: sum(progress.seconds.get(phase, 0.0) for phase in phases) for name, phases in PARTS.items()}
    parts["rest"] = seconds - sum(parts.values())
    return {
        "perplexity": found,
        "seconds": round(seconds, 1),
        "dense_passes": round(seconds / one, 2),
        "parts": {name: round(value / one, 2) for name, value in parts.items()},
        "dense_pass_seconds": [round(value, 2) for value in passes],
        "dtype": name_of(model.dtype),
        "method": record["method"],
        "merge": record["merge"],
        "weights_read_bytes": record["weights_read_bytes"],
        "ratio_achieved": record["ratio_achieved"],
    }


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown, cheapest first."""
    dense = cells["dense"]["perplexity"]
    lines = [
        "| settings | WikiText-2 / dense | PTB / dense | seconds | dense passes | of them "
        + ", ".join(PARTS)
        + ", rest |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    pruned = {name: found for name, found in cells.items() if name != "dense"}
    for name, found in sorted(pruned.items(), key=lambda item: item[1]["dense_passes"]):
        ratios = " | ".join(f"{found['perplexity'][text] / dense[text]:.3f}" for text in TEXTS)
        parts = ", ".join(f"{value:.1f}" for value in found["parts"].values())
        lines.append(f"| {name} | {ratios} | {found['seconds']:.0f} | {found['dense_passes']:.1f} | {parts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prune_cost")
    arguments = parser.parse_args()
    fast = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_f", "avx512_bf16", "amx_bf16", "amx_tile"})
    settings = {"tokens": TOKENS, "window": WINDOW, "dtype": arguments.dtype, "cpu": fast}
    cells = Cells(arguments.out, arguments.model, arguments.only, settings)
    cells.run("dense", lambda: {"perplexity": judged(arguments.model, arguments.dtype)}, needed=True)
    for name, options in SETTINGS.items():
        cells.run(name, lambda options=options: cell(arguments, options))
        arguments.out.with_suffix(".md").write_text(table(cells.cells))
    print(table(cells.cells))


if __name__ == "__main__":
    main()
