"""A pruned folder's record, and a bench if there is one, as one HTML file: no script, nothing to fetch."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from kvprune.errors import BadOption, BrokenCheckpoint
from kvprune.measure import plot
from kvprune.measure.table import merged_heads
from kvprune.runtime.files import (
    CHANGED,
    SHOWN,
    note_changed,
    read_json,
    read_shown,
    write_whole,
    writing_to,
)
from kvprune.runtime.shown import Bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "report.html"
THEMES = ("light", "dark")
_NEEDED = (*SHOWN, "layout", "seed", "dtype", "device", "method", "versions")


def report(
    folder: str | Path,
    *,
    others: Sequence[str | Path] = (),
    bench: str | Path | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write the report of a pruned folder and return its path: out, or report.html in the folder.

    others: more pruned folders of the same model, for the figure of quality against KV bytes. bench: what `bench --out`
    wrote. Each figure is written as PNG too, beside the report. Raises BrokenCheckpoint and BadOption.
    """
    plot.check()
    record, target = read_shown(Path(folder), _NEEDED), Path(folder) / NAME if out is None else Path(out)
    if target.suffix != ".html":
        raise BadOption(f"--out {target} is no .html file")
    if not target.parent.is_dir():
        raise BadOption(f"--out {target}: {target.parent} is no folder; make it first")
    here, *beside = dict.fromkeys(Path(one).resolve() for one in (folder, *others))
    read = {here: record} | {one: read_shown(one, _NEEDED) for one in beside}
    records = [(one.name, other) for one, other in read.items()]
    for name, other in records:
        if Path(other["source"]).name != Path(record["source"]).name:
            raise BadOption(f"--with: {name} was made of {other['source']}, not of {record['source']}; leave it out")
    timed = None if bench is None else _read_bench(Path(bench))
    drawings = _drawings(record, quality_rows(records), timed)
    changed = [f"{one.name}: {CHANGED}." for one, other in read.items() if note_changed(one, other)]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("kvprune.pages", "."), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        name=here.name,
        record=record,
        bench=timed,
        images={name: {theme: _image(draw, theme) for theme in THEMES} for name, draw in drawings.items()},
        warnings=[*changed, *warnings(record, timed)],
        merged=merged_heads(record),
        provenance=provenance(record),
    )
    with writing_to(target.parent):
        for name, draw in drawings.items():
            _draw(draw, "light", target.with_name(f"{target.stem}-{name}.png"), dpi=150, facecolor="white")
        write_whole(target, page)
    return target


def _drawings(record: dict[str, Any], rows: list, timed: dict[str, Any] | None) -> "dict[str, Callable[[], Figure]]":
    """Name -> what draws it; only those for which there are figures."""
    from kvprune.pages import figures

    found: dict[str, Callable[[], Figure]] = {"plan": lambda: figures.plan(record)}
    if rows:
        found["quality"] = lambda: figures.quality(rows)
    if timed is not None:
        found["speed"] = lambda: plot.figure(timed)
        found["memory"] = lambda: figures.memory(timed)
    return found


def quality_rows(records: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What every named record says of quality: {"name", "share" (of the dense KV bytes), "text", "window", "ratio"}."""
    return [
        {
            "name": name,
            "share": record["kv_bytes_per_token"]["pruned"] / record["kv_bytes_per_token"]["dense"],
            "text": row["text"],
            "window": row["window"],
            "ratio": row["pruned"] / row["dense"],
        }
        for name, record in records
        for row in record["perplexity"]
        if row["dense"]
    ]


def warnings(record: dict[str, Any], bench: dict[str, Any] | None) -> list[str]:
    """What a reader of the figures should know."""
    found = []
    learnt = {record["calibration"]["text"]} if record.get("calibration") else set()
    learnt |= {record["recovered"]["text"]} if record.get("recovered") else set()
    judged = {row["text"] for row in record["perplexity"]}
    if judged and judged <= learnt:
        found.append("Quality was judged only on the kind of text that the model was calibrated or trained on.")
    if any(row["tokens"] < 8192 for row in record["perplexity"]):
        found.append("Some perplexities come from fewer than 8,192 tokens: they are rough.")
    if any(row["dense"] and row["pruned"] > 1.5 * row["dense"] for row in record["perplexity"]):
        found.append("Perplexity is more than one and a half times that of the dense model.")
    if record.get("recovered", {}).get("loss") == "next-token":
        found.append(
            "Training on next tokens also adapts a model to its text: compare with the dense model trained alike."
        )
    for cell in (bench or {}).get("cells", ()):
        if "error" in cell:
            found.append(f"Bench: {cell['error']}.")
        elif cell["spread"]["decode"][1] < 1:
            found.append(f"Bench: the second model decodes slower at batch {cell['batch']}, context {cell['context']}.")
    return found


def provenance(record: dict[str, Any]) -> dict[str, str]:
    """How the model was made, as words."""
    parts: dict[str, Any] = {"source": record["source"], "revision": record.get("revision")}
    parts |= {"layout": record["layout"], "seed": record["seed"], "dtype": record["dtype"], "device": record["device"]}
    parts |= record["method"]
    if record.get("calibration"):
        parts["calibration text"] = f"{record['calibration']['text']}, {record['calibration']['tokens']:,} tokens"
    if record.get("recovered"):
        done = record["recovered"]
        parts["recovered"] = f"{done['loss']}, {done['steps']} steps, {done['tokens']:,} tokens of {done['text']}"
    parts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts["minutes"] = f"{sum(record['seconds'].values()) / 60:.1f}"
    return {name.replace("_", " "): str(value) for name, value in parts.items() if value is not None}


def _image(draw: "Callable[[], Figure]", theme: str) -> str:
    """A figure as the address of its own bytes."""
    data = io.BytesIO()
    _draw(draw, theme, data, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()


def _draw(draw: "Callable[[], Figure]", theme: str, target: Any, **how: Any) -> None:
    from kvprune.pages import figures

    with figures.theme(theme):
        draw().savefig(target, **how)


def _read_bench(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        Bench.model_validate(found)
    except OSError:
        raise BadOption(f"--bench {path} cannot be read; give the file that bench --out wrote") from None
    except ValueError:
        raise BrokenCheckpoint(f"{path} is not what bench --out writes; run bench again") from None
    return found
