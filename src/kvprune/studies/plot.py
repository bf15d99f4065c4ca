"""The picture of a calibration study: a panel per evaluation text, a line with a min-max band per calibration text."""

import math
from pathlib import Path
from typing import Any

from kvprune.text.given import CHAT

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito
_MARKERS = "osD^vPX"
_MARGIN = 1.35  # the axis goes on by this factor at both ends
_LOG_FROM = 6.0  # a ratio above this makes the axis logarithmic


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a study's report as PNG. All panels have the same y axis, which begins at dense."""
    from matplotlib.figure import Figure

    judged, texts = report["eval"], report["texts"]
    columns = min(len(judged), 3)
    lines = math.ceil(len(judged) / columns)
    figure = Figure(figsize=(max(4.3 * columns, 6.4), 3.6 * lines + 1.3), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for index, axes in enumerate(panels.flat):
        if index >= len(judged):
            axes.set_visible(False)
            continue
        for number, text in enumerate(texts):
            rows = [row for row in report["summary"] if (row["eval"], row["text"]) == (judged[index], text)]
            handles[short(text)] = _line(axes, rows, number, 0.015 * (number - (len(texts) - 1) / 2))
        handles["dense"] = axes.axhline(1, color="0.35", linewidth=1, linestyle="--")
        _frame(axes, report, judged[index], first=index % columns == 0)
    _limits(panels[0, 0], [row[end] for row in report["summary"] for end in ("min", "max")])
    seeds = f"{report['seeds']} seeds: mean, band from min to max" if report["seeds"] > 1 else "1 seed"
    figure.suptitle(
        f"{short(report['source'])}, {report['ratio']:.0%} of the KV cache removed, repair {report['repair']}\n"
        f"what the calibration text does to perplexity ({seeds})",
        fontsize=11,
    )
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5), frameon=False
    )
    figure.savefig(path, dpi=150, format="png")


def _line(axes, rows: list[dict[str, Any]], number: int, aside: float):
    """One calibration text; `aside`, as a share of the axis, keeps the bars of lines from hiding each other."""
    shift = (rows[-1]["tokens"] / rows[0]["tokens"] * _MARGIN**2) ** aside
    x = [row["tokens"] * shift for row in rows]
    mean, low, high = ([row[name] for row in rows] for name in ("mean", "min", "max"))
    colour = COLOURS[number % len(COLOURS)]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.vlines(x, low, high, color=colour, linewidth=1.5, alpha=0.7)
    (line,) = axes.plot(x, mean, color=colour, marker=_MARKERS[number % len(_MARKERS)], markersize=5, linewidth=1.6)
    return line


def _frame(axes, report: dict[str, Any], judged: str, first: bool) -> None:
    sizes = report["tokens"]
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / _MARGIN, sizes[-1] * _MARGIN)
    shown = _legible(sizes)
    axes.set_xticks(shown, [f"{size:,}" for size in shown])
    axes.set_xticks([size for size in sizes if size not in shown], minor=True)
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.set_xlabel("calibration tokens")
    if first:
        axes.set_ylabel("perplexity, pruned / dense")
    axes.set_title(f"judged on {short(judged)} (dense: {report['dense'][judged]:.2f})", fontsize=10)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legible(sizes: list[int]) -> list[int]:
    """The sizes that get a label: none nearer to the one before than a seventh of the axis."""
    room = math.log(sizes[-1] / sizes[0] * _MARGIN**2) / 7
    shown = [sizes[0]]
    for size in sizes[1:]:
        if math.log(size / shown[-1]) >= room:
            shown.append(size)
    return shown


def _limits(axes, values: list[float]) -> None:
    """From dense (or from the least value, if one is better than dense) to a little above the largest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(1.0, *values), max(1.0, *values)
    if high > _LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.05, high * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    span = max(high - low, 0.01)
    axes.set_ylim(low - 0.04 * span, high + 0.08 * span)
    axes.ticklabel_format(axis="y", useOffset=False)


def short(name: str) -> str:
    """A path's last part, also of conversations' file; a name as it is."""
    kind = CHAT if name.startswith(CHAT) else ""
    path = name.removeprefix(kind)
    return kind + Path(path).name if Path(path).exists() or path.startswith(("/", ".")) else name
