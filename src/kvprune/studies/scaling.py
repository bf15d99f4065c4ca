"""How speed and memory scale with batch and context: a bench over a grid, against the bytes that it reads [ours].

KVPruner (arXiv 2409.11057) reports one batch and one context. What pruning gains depends on what share of the bytes
that a step reads is KV cache: it is nothing for a short prompt alone, and the limit where the cache is all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvprune.benchmark import bench
from kvprune.errors import OutputExists
from kvprune.measure.plot import check as check_matplotlib
from kvprune.progress import Progress
from kvprune.runtime.files import write_whole, writing_to
from kvprune.studies.journal import PICTURE, REPORT
from kvprune.studies.plot import COLOURS


def study_scaling(
    source: str | Path,
    out: str | Path,
    *,
    against: str | Path | None = None,
    batch: str | int | Sequence[int] = (1, 2, 4, 8),
    context: str | int | Sequence[int] = (256, 512, 1024, 2048, 4096),
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
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`bench` of two models over a grid, and each cell's decoding ratio against the share of KV in what a step reads.

    The options are those of `bench`. Writes out/study.json (the report, which is returned), study.png, and bench's own
    bench.json and bench.png, after every cell. Returns bench's report with {"study", "scaling": [{"batch", "context",
    "kv_share" (of the dense model's bytes), "decode_ratio", "decode_limit", "kv_bytes_saved"}]}; cells that do not fit
    in memory are left out of it. Raises a KVPruneError before anything is timed for what can be known by then.
    """
    options = locals() | {"out": Path(out) / "bench.json"}
    check_matplotlib()
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExists(f"{folder} exists and is not empty; choose another --out or remove it")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        found = bench(**options)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    report = {"study": "scaling", **found, "scaling": [_row(cell) for cell in found["cells"] if "error" not in cell]}
    with writing_to(folder):
        write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")
        if report["scaling"]:
            draw(report, folder / PICTURE)
    return report


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    dense, pruned = (cell["memory_bytes"][name] for name in ("dense", "pruned"))
    read = cell["decode_bytes_read"]["dense"]
    return {
        **{name: cell[name] for name in ("batch", "context", "decode_ratio", "decode_limit")},
        "kv_share": read["kv_cache"] / read["all"],
        "kv_bytes_saved": dense["kv_cache"] - pruned["kv_cache"],
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """The ratio against context, a line a batch; and all cells against the share of KV, with the limit."""
    from matplotlib.figure import Figure

    rows = report["scaling"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_context, by_share = figure.subplots(1, 2, sharey=True)
    for number, batch in enumerate(sorted({row["batch"] for row in rows})):
        mine = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["context"])
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 4}
        by_context.plot(
            [r["context"] for r in mine], [r["decode_ratio"] for r in mine], label=f"batch {batch}", **style
        )
        by_share.plot([r["kv_share"] for r in mine], [r["decode_ratio"] for r in mine], linestyle="", **style)
    limits = sorted((row["kv_share"], row["decode_limit"]) for row in rows)
    by_share.plot(*zip(*limits, strict=True), color="0.4", linestyle="--", linewidth=1, label="what the bytes allow")
    by_context.set_xscale("log", base=2)
    by_context.set_xlabel("context, tokens")
    by_share.set_xlabel("share of KV cache in what a step reads, dense")
    by_context.set_ylabel("decoding, times as fast as dense")
    for axes in (by_context, by_share):
        axes.axhline(1, color="0.35", linewidth=1)
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
