"""The picture of a study of depth: a panel a text, and one of what a step of decoding gains."""

from pathlib import Path
from typing import Any

from kvprune.studies.plot import COLOURS

_STYLES = ("-", "--", ":", "-.")
_NAMES = {"depth": "layers without attention", "drop_blocks": "blocks dropped"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Perplexity over dense, and decoding (or, where that was not timed, the weights that a step reads) over dense. The
    longer one of the grid's two axes lies along x; a colour is a ratio, a style a value of the other."""
    from matplotlib.figure import Figure

    along, beside = "drop_blocks", "depth"
    if len(report["depths"]) > len(report["drop_blocks"]):
        along, beside = beside, along
    texts = list(dict.fromkeys(row["text"] for row in report["cells"][0]["perplexity"]))
    figure = Figure(figsize=(4.2 * (len(texts) + 1), 4.4), layout="constrained")
    *panels, last = figure.subplots(1, len(texts) + 1)
    is_timed = all(cell["speed"] for cell in report["cells"])
    for number, ratio in enumerate(report["ratios"]):
        for other in sorted({cell[beside] for cell in report["cells"]}):
            cells = [cell for cell in report["cells"] if (cell["ratio"], cell[beside]) == (ratio, other)]
            cells.sort(key=lambda cell: cell[along])
            x = [cell[along] for cell in cells]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": _STYLES[other % len(_STYLES)], "marker": "o"}
            style["label"] = f"{ratio:.0%} cut, {other} {_NAMES[beside]}"
            for axes, text in zip(panels, texts, strict=True):
                rows = [next(row for row in cell["perplexity"] if row["text"] == text) for cell in cells]
                axes.plot(x, [row["pruned"] / row["dense"] for row in rows], **style)
            last.plot(x, [_gain(cell, is_timed) for cell in cells], **style)
    titles = [*(f"perplexity / dense, {Path(text).name}" for text in texts), _of(is_timed)]
    for axes, title in zip((*panels, last), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(_NAMES[along])
        axes.set_xticks(sorted({cell[along] for cell in report["cells"]}))
        axes.grid(alpha=0.3)
    handles, labels = last.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{Path(report['source']).name}: depth against width at equal KV bytes", fontsize=11)
    figure.savefig(path, dpi=150, format="png")


def _of(is_timed: bool) -> str:
    return "decoding, times as fast as dense" if is_timed else "weights that a step reads / dense"


def _gain(cell: dict[str, Any], is_timed: bool) -> float:
    read = cell["weights_read_bytes"]
    return cell["speed"]["decode_ratio"] if is_timed else read["pruned"] / read["dense"]
