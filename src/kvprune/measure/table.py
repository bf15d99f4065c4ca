"""The records as tables for a terminal."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table


def pruned_table(record: dict[str, Any]) -> RenderableType:
    """Dense against pruned: KV bytes, parameters, perplexity; then widths, seconds and memory."""
    kv, parameters = record["kv_bytes_per_token"], record["parameters"]
    table = Table(title=f"{record['source']}, {record['ratio_achieved']:.1%} of the KV cache removed")
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("KV bytes per token", f"{kv['dense']:,}", f"{kv['pruned']:,}", _ratio(kv))
    table.add_row("parameters", f"{parameters['dense']:,}", f"{parameters['pruned']:,}", _ratio(parameters))
    for row in record["perplexity"]:
        name = f"perplexity, {row['text']}, window {row['window']}, {row['tokens']:,} tokens"
        dense = "-" if row["dense"] is None else f"{row['dense']:.2f}"
        table.add_row(name, dense, f"{row['pruned']:.2f}", _ratio(row))
        if "before" in row:
            table.add_row("    before recovery", "", f"{row['before']:.2f}", _ratio({**row, "pruned": row["before"]}))
    return Group(table, _widths(record), _costs(record))


def evaluation_table(result: dict[str, Any]) -> RenderableType:
    """What `evaluate` returns, a column a source."""
    table = Table()
    table.add_column("")
    for source in result["sources"]:
        table.add_column(source["source"], justify="right", overflow="fold")
    table.add_row("KV bytes per token", *(f"{s['kv_bytes_per_token']:,}" for s in result["sources"]))
    table.add_row("parameters", *(f"{s['parameters']:,}" for s in result["sources"]))
    for row in result["perplexity"]:
        name = f"perplexity, {row['text']}, window {row['window']}, {row['tokens']:,} tokens"
        table.add_row(name, *(f"{value:.2f}" for value in row["values"]))
    return table


def print_table(table: RenderableType) -> None:
    """To stdout."""
    Console(highlight=False).print(table)


def _ratio(pair: dict[str, Any]) -> str:
    return "-" if pair["dense"] is None else f"{pair['pruned'] / pair['dense']:.3f}"


def _widths(record: dict[str, Any]) -> RenderableType:
    """A bar a layer, so that the eye finds the layers that lost most."""
    table = Table(title=f"channels kept per KV head, of {record['head_dim']}", show_header=False, box=None)
    for layer, width in enumerate(record["widths"]):
        full = round(32 * width / record["head_dim"])
        table.add_row(f"layer {layer}", f"{width}", "█" * full + "░" * (32 - full))
    return table


def _costs(record: dict[str, Any]) -> RenderableType:
    table = Table(title="what it took", show_header=False, box=None)
    for name, seconds in record["seconds"].items():
        table.add_row(name, f"{seconds:,.1f} s")
    table.add_row("peak memory above the imports", f"{record['peak_memory_bytes'] / 1e6:,.0f} MB")
    formula = record["memory_formula_bytes"]
    parts = " + ".join(f"{name} {size / 1e6:,.0f}" for name, size in formula.items())
    table.add_row("what it may need", f"{sum(formula.values()) / 1e6:,.0f} MB = {parts}")
    return table
