"""The picture of a bench: how much faster decoding and prefill are, beside the limit."""

import importlib.util
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvprune.errors import BadOption

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DECODE, _PREFILL, _LIMIT = "#0072B2", "#56B4E9", "#D55E00"  # Okabe and Ito


def check() -> None:
    """Raise BadOption if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BadOption("a picture is drawn with matplotlib, which is missing: pip install matplotlib")


def draw(report: dict[str, Any], target: IO[bytes]) -> None:
    """Write a bench's picture as PNG."""
    figure(report).savefig(target, dpi=150, format="png")


def figure(report: dict[str, Any]) -> "Figure":
    """A pair of bars per cell, spread and limit on them."""
    from matplotlib.figure import Figure

    cells = [cell for cell in report["cells"] if "error" not in cell]
    drawn = Figure(figsize=(max(5.0, 1.1 * len(report["cells"]) + 2), 4), layout="constrained")
    axes = drawn.subplots()
    for shift, name, colour in ((-0.2, "decode", _DECODE), (0.2, "prefill", _PREFILL)):
        places = [i + shift for i in range(len(cells))]
        ratios = [cell[f"{name}_ratio"] for cell in cells]
        spreads = [cell["spread"][name] for cell in cells]
        errors = [
            [ratio - low for ratio, (low, _) in zip(ratios, spreads, strict=True)],
            [high - ratio for ratio, (_, high) in zip(ratios, spreads, strict=True)],
        ]
        axes.bar(places, ratios, 0.38, color=colour, yerr=errors, ecolor="0.2", capsize=2, label=name)
    for i, cell in enumerate(cells):
        label = "limit of decoding" if i == 0 else None
        axes.plot([i - 0.4, i], [cell["decode_limit"]] * 2, color=_LIMIT, linewidth=2, label=label)
    axes.axhline(1, color="0.35", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(cells)), [f"{cell['batch']} x\n{cell['context']:,}" for cell in cells])
    axes.set_xlabel("batch x context")
    axes.set_ylabel("times as fast as dense")
    where = report["environment"]
    second = Path(where["against"] or where["source"]).name
    if where["pruned_shape_ratio"] is not None:
        second = f"the shape with {where['pruned_shape_ratio']:.0%} of its KV bytes removed"
    if where["skip"] is not None:
        second += f", skipping {where['skip']:.0%}"
    if where.get("keep") is not None:
        second += f", keeping {where['keep']:.0%}"
    if where.get("kv_bits") is not None:
        second += f", a cache of {where['kv_bits']} bits"
    axes.set_title(f"{Path(where['source']).name} against {second}\n{where['device']}", fontsize=10)
    drawn.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return drawn
