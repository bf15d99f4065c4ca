"""Studies as tables for a terminal."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from kvprune.studies.plot import short


def calibration_table(report: dict[str, Any]) -> RenderableType:
    """A row per text and size for every evaluation text, then what moved the ratio by how much."""
    parts: list[RenderableType] = []
    for judged in report["eval"]:
        table = Table(
            title=f"perplexity on {short(judged)}, pruned / dense ({report['dense'][judged]:.2f}), "
            f"{report['ratio']:.0%} of the KV cache removed, repair {report['repair']}"
        )
        table.add_column("calibration")
        for column in ("tokens", "seeds", "mean", "min", "max", "stdev"):
            table.add_column(column, justify="right")
        for row in report["summary"]:
            if row["eval"] == judged:
                name = short(row["text"]) + (" *" if row["overlap"] else "")
                figures = (_figure(row[column]) for column in ("mean", "min", "max", "stdev"))
                table.add_row(name, f"{row['tokens']:,}", str(row["seeds"]), *figures)
        parts.append(table)
    if any(row["overlap"] for row in report["summary"]):
        parts.append("* the text is too short for so many stretches apart: they overlap, and seeds differ too little")
    parts.append(_overall(report))
    return Group(*parts)


def layers_table(report: dict[str, Any]) -> RenderableType:
    """The layers, those that should skip first at the top."""
    table = Table(title=f"error of the output anchor, {short(report['text'])}, {report['tokens']:,} tokens")
    for column in ("layer", "error"):
        table.add_column(column, justify="right")
    for layer in report["layers"]:
        table.add_row(str(layer), f"{report['errors'][layer]:.4f}")
    return Group(table, f"--skip-layers {','.join(map(str, report['layers']))}")


def _overall(report: dict[str, Any]) -> Table:
    table = Table(title="how far pruned / dense moves")
    table.add_column("judged on")
    names = {"min": "least", "max": "most", "by_seed": "by seed", "by_text": "by text", "by_tokens": "by size"}
    for title in names.values():
        table.add_column(title, justify="right")
    table.add_column("most / least - 1", justify="right")
    for row in report["overall"]:
        table.add_row(short(row["eval"]), *(_figure(row[name]) for name in names), f"{row['relative']:.2%}")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def robustness_table(report: dict[str, Any]) -> RenderableType:
    """A row a stretch of positions, a column a source: reading, then writing."""
    parts: list[RenderableType] = []
    for part, name, what in (("reading", "perplexity", "perplexity"), ("writing", "repetition", "4-grams repeated")):
        table = Table(title=f"{what} at positions of {report['text'] if part == 'reading' else 'the answer'}")
        for column in ("from", "to", *report["sources"]):
            table.add_column(column, justify="right", overflow="fold")
        for row in report[part]:
            shown = (f"{value:.2f}" for value in row[name])
            table.add_row(f"{row['from']:,}", f"{row['to']:,}", *shown)
        parts.append(table)
    return Group(*parts, f"the model's context: {report['context']:,} tokens")


def retrieval_table(report: dict[str, Any]) -> RenderableType:
    """A row a source, task and context; a column a share that is kept."""
    bits = "" if report["kv_bits"] is None else f", a cache of {report['kv_bits']} bits"
    table = Table(title=f"numbers found in {short(report['text'])}{bits} (beside: loss of the answer, nats)")
    for column in ("source", "task", "tokens"):
        table.add_column(column, overflow="fold")
    for keep in report["keeps"]:
        table.add_column(f"{keep:.0%} kept", justify="right")
    found = {(r["source"], r["task"], r["context"], r["keep"]): r for r in report["rows"]}
    for index, task, n in dict.fromkeys(key[:3] for key in found):
        cells = (found[index, task, n, keep] for keep in report["keeps"])
        shown = (f"{cell['exact']:.0%} ({cell['loss']:.2f})" for cell in cells)
        table.add_row(report["sources"][index], task, f"{n:,}", *shown)
    return table


def depth_table(report: dict[str, Any]) -> RenderableType:
    """A row a ratio, number of blocks and depth, and what is best."""
    table = Table(title="perplexity, pruned / dense, at equal KV bytes; decoding: times as fast as dense")
    texts = list(dict.fromkeys(row["text"] for row in report["cells"][0]["perplexity"]))
    names = ("KV bytes cut", "blocks dropped", "without attention", "width", *map(short, texts))
    for column in (*names, "weights a step reads", "KV bytes a token", "decoding"):
        table.add_column(column, justify="right", overflow="fold")
    for cell in report["cells"]:
        found = {row["text"]: row["pruned"] / row["dense"] for row in cell["perplexity"]}
        which = (", ".join(map(str, cell[name])) or "-" for name in ("blocks", "dropped"))
        sizes = (f"{cell[name]['pruned']:,}" for name in ("weights_read_bytes", "kv_bytes_per_token"))
        speed = f"{cell['speed']['decode_ratio']:.3f}" if cell["speed"] else "-"
        shown = (f"{found[text]:.3f}" for text in texts)
        table.add_row(f"{cell['ratio']:.0%}", *which, f"{cell['width']:.0f}", *shown, *sizes, speed)
    return Group(table, report["said"])
