"""The report's figures. Each takes plain records and returns a matplotlib Figure, drawn in the colours of the theme."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from kvprune.runtime.shown import layer_numbers, whole_widths

KEPT, SENSITIVE, SECOND = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito, readable on light and on dark
THEMES = {"light": "#1b1b1b", "dark": "#e6e6e6"}


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Text and lines in the theme's colour, nothing behind them."""
    colour = THEMES[name]
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    style: Any = dict.fromkeys(coloured, colour) | {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "font.size": 9}
    with rc_context(style):
        yield


def plan(record: dict[str, Any]) -> Figure:
    """Per layer: how much worse the model got when the layer alone was cut, and what width it kept."""
    widths, dense = record["widths"], whole_widths(record)
    layers = layer_numbers(record)
    sensitivity = record.get("sensitivity")
    measured = sensitivity is not None and len(sensitivity) == len(widths)  # budget has several per layer
    figure = Figure(figsize=(7, 4.2 if measured else 2.4), layout="constrained")
    panels = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False)[:, 0]
    if measured:
        panels[0].bar(layers, sensitivity, color=SENSITIVE)
        panels[0].set_ylabel("sensitivity, nats")
    sizes = " or ".join(map(str, sorted(set(dense))))
    panels[-1].bar(layers, dense, color=KEPT, alpha=0.2, label=f"dense, {sizes}")
    panels[-1].bar(layers, widths, color=KEPT, label="kept")
    panels[-1].set_ylabel("channels per KV head")
    panels[-1].set_xlabel("layer")
    panels[-1].legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def quality(rows: list[dict[str, Any]]) -> Figure:
    """Perplexity over dense against the share of the KV bytes; rows: name, share, text, window, ratio."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    texts = list(dict.fromkeys((row["text"], row["window"]) for row in rows))
    for number, (text, window) in enumerate(texts):
        mine = [row for row in rows if (row["text"], row["window"]) == (text, window)]
        places = [(100.0, 1.0), *((100 * row["share"], row["ratio"]) for row in mine)]
        colour, marker = (KEPT, SENSITIVE, SECOND)[number % 3], "osD^vPX"[number % 7]
        axes.plot(*zip(*places, strict=True), marker, color=colour, label=f"{text}, windows of {window}")
    folders = list(dict.fromkeys((row["name"], row["share"]) for row in rows))
    for name, share in folders if len(folders) > 1 else ():
        lowest = min(row["ratio"] for row in rows if (row["name"], row["share"]) == (name, share))
        where: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "ha": "center", "va": "top"}
        axes.annotate(name, (100 * share, lowest), (0, -6), **where)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("KV bytes per token, % of dense")
    axes.set_ylabel("perplexity / dense")
    axes.set_xlim(0, 104)
    axes.legend(frameon=False)
    return figure


def memory(report: dict[str, Any]) -> Figure:
    """Of a bench: weights, cache and the rest of both models, cell by cell."""
    cells = [cell for cell in report["cells"] if "error" not in cell]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    parts = (("weights", KEPT), ("kv_cache", SENSITIVE), ("activations", SECOND))
    for shift, side in ((-0.2, "dense"), (0.2, "pruned")):
        bottom = [0.0] * len(cells)
        for name, colour in parts:
            sizes = [(cell["memory_bytes"][side][name] or 0) / 1e6 for cell in cells]
            label = name.replace("_", " ") if side == "dense" else None
            axes.bar([i + shift for i in range(len(cells))], sizes, 0.36, bottom=bottom, color=colour, label=label)
            bottom = [b + s for b, s in zip(bottom, sizes, strict=True)]
    axes.set_xticks(range(len(cells)), [f"{cell['batch']} x\n{cell['context']:,}" for cell in cells])
    axes.set_xlabel("batch x context; left: dense, right: pruned")
    axes.set_ylabel("MB")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
