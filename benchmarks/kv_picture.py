"""The README's picture, quality against KV bytes, from what the other scripts have measured; nothing is run here.

    python benchmarks/kv_picture.py [--out docs]

OUT/kv-bytes-light.png and -dark.png, for pages of these colours, on PTB: text that nothing was calibrated or trained
on. Their two panels are not to be compared with each other: windows of 2,048 tokens (width: quality.json, the first
16,384 tokens of the test split; bits, tokens and products: kv_curve_2048.json, the first 8,192 tokens), and contexts of
1,024 of which the next 128 tokens are scored (kv_peers.json: kvpress, and ours on the same contexts). A ratio is over
the dense model of the same run.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from kv_peers import KEEPS, PRESSES
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
TEXT = "ptb"
WINDOW, HIGHEST = 2048, 3.85
SCHEMES = {  # Okabe and Ito, lighter where the page is dark; markers tell apart too
    "light": {"ink": "#1f2328", "faint": "#6e7781", "width": "#0072B2", "mixed": "#007A5A", "bits": "#B35900"},
    "dark": {"ink": "#e6edf3", "faint": "#8b949e", "width": "#56B4E9", "mixed": "#2FC99A", "bits": "#F0A030"},
}
SIZE = {"font.size": 13, "axes.titlesize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())["cells"]


def widths(pattern: str) -> list[tuple[float, float]]:
    """(KV bytes, perplexity) over dense of quality.json's cells; {} in the pattern is the share that is gone."""
    cells = read("quality")

    def value(name: str) -> float:
        rows = cells[name]["perplexity"]
        return next(row["pruned"] for row in rows if (row["text"], row["window"]) == (TEXT, WINDOW))

    return [(1 - gone, value(pattern.format(gone)) / value("dense")) for gone in (0.25, 0.5, 0.75)]


def read_as(name: str) -> tuple[float, float]:
    """(KV bytes, perplexity) over dense of a cell of kv_curve_2048.json."""
    cells = read("kv_curve_2048")
    cell, dense = cells[name][TEXT], cells["dense: as it is"][TEXT]
    return cell["kv_bytes"] / dense["kv_bytes"], cell["perplexity"] / dense["perplexity"]


def peers(name: str) -> list[tuple[float, float]]:
    """(share of the tokens, perplexity over dense) of a press, or of ours."""
    cells = read("kv_peers")
    found = []
    for keep in KEEPS:
        pairs = zip(cells[f"{name}: {keep}"][TEXT], cells["dense"][TEXT], strict=True)
        found.append((keep, math.exp(statistics.mean(one - dense for one, dense in pairs))))
    return found


def draw(colours: dict[str, str]) -> Figure:
    import matplotlib

    with matplotlib.rc_context({**SIZE, "text.color": colours["ink"], "axes.labelcolor": colours["ink"]}):
        figure = Figure(figsize=(5.6, 7.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
        _whole(upper, colours)
        _presses(lower, colours)
    return figure


def _whole(axes: Axes, colours: dict[str, str]) -> None:
    cut, recovered = widths("merged {}"), widths("merged {}, distilled")
    axes.plot(*_apart(cut), "--o", color=colours["width"], mfc="none")
    _name(axes, "width, as cut", cut[-1], (9, -5), colours["width"], "left")
    axes.plot(*_apart(recovered), "-o", color=colours["width"])
    _name(axes, "width, recovered", recovered[-1], (9, -5), colours["width"], "left")

    for pattern, marker, words, place, side in (
        ("closed form {}", "v", "inside each\nhead, repaired", (-9, 4), "right"),
        ("paper {}", "X", "as KVPruner", (0, 9), "center"),
    ):
        points = widths(pattern)
        inside = [point for point in points if point[1] < HIGHEST]
        share, ratio = points[len(inside)]
        axes.plot(*_apart(inside), ":", marker=marker, color=colours["faint"])
        words += f"\n({share:.0%}: {ratio:.3g})"
        _name(axes, words, inside[min(len(inside), 2) - 1], place, colours["faint"], side)

    for name, marker, words, place, group in (
        ("dense: as it is", "P", "dense", (0, -19), "ink"),
        ("dense: 4 bits", "s", "4-bit cache", (0, -19), "bits"),
        ("dense: 2 bits", "s", "2-bit cache", (0, 9), "bits"),
        ("dense: 50% of tokens kept", "*", "½ tokens", (0, -19), "mixed"),
        ("dense: 4 bits, 50% of tokens kept", "D", "4 bits,\n½ tokens", (0, 9), "mixed"),
        ("merged-0.5, distilled: 4 bits", "D", "½ width,\n4 bits", (-4, 9), "mixed"),
        ("merged-0.5, distilled: 4 bits, 50% of tokens kept", "D", "all\nthree", (7, 9), "mixed"),
    ):
        point = read_as(name)
        axes.plot(*point, marker, markersize=13 if marker == "*" else 8, color=colours[group])
        _name(axes, words, point, place, colours[group], "center")

    axes.set_xscale("log", base=2)
    axes.set_xlim(1.2, 1 / 10.5)
    axes.set_xticks(*_shares(1, 0.75, 0.5, 0.25, 0.125))
    axes.set_title("PTB, windows of 2,048 tokens", color=colours["ink"])
    _finish(axes, colours, (1, 1.25, 1.5, 2, 3), HIGHEST)


def _presses(axes: Axes, colours: dict[str, str]) -> None:
    found = {name: peers(name) for name in PRESSES}
    for points in found.values():
        axes.plot(*_apart(points), "o", color=colours["faint"], mfc="none", markersize=7)
    ours = peers("ours, key-distance")
    axes.plot(*_apart(ours), "-*", markersize=13, color=colours["mixed"])
    last = sorted((points[-1][1], name.replace("(Expected)", "")) for name, points in found.items())
    for ratio, name in (last[0], last[-1]):
        _name(axes, name, (KEEPS[-1], ratio), (9, -7 if ratio == last[0][0] else -4), colours["faint"], "left")
    _name(axes, "tokens", ours[1], (-6, 9), colours["mixed"], "right")
    _name(
        axes,
        "the presses\nof kvpress",
        (KEEPS[1], max(points[1][1] for points in found.values())),
        (9, -4),
        colours["faint"],
        "left",
    )
    axes.set_xlim(0.85, 0.0)
    axes.set_xticks(*_shares(*KEEPS))
    axes.set_title("PTB, the 128 tokens behind 1,024", color=colours["ink"])
    axes.set_xlabel("KV bytes that are left, % of dense")
    _finish(axes, colours, (1, 1.25, 1.5, 1.75), 1.85)


def _name(axes: Axes, words: str, point: tuple[float, float], place: tuple[int, int], colour: str, side: str) -> None:
    axes.annotate(words, point, place, textcoords="offset points", ha=side, fontsize=11.5, color=colour)


def _apart(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _shares(*shares: float) -> tuple[tuple[float, ...], list[str]]:
    return shares, [f"{100 * share:g}" for share in shares]


def _finish(axes: Axes, colours: dict[str, str], ratios: tuple[float, ...], highest: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(0.87, highest)
    axes.set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_ylabel("perplexity / dense")
    axes.patch.set_alpha(0)
    axes.tick_params(colors=colours["ink"])
    axes.grid(alpha=0.25, color=colours["faint"])
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(colours["faint"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    out = parser.parse_args().out
    for scheme, colours in SCHEMES.items():
        draw(colours).savefig(out / f"kv-bytes-{scheme}.png", dpi=150, transparent=True)


if __name__ == "__main__":
    main()
