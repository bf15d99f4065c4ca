"""The records as tables for a terminal."""

from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from kvprune.runtime.shown import layer_numbers, whole_widths


def pruned_table(record: dict[str, Any]) -> RenderableType:
    """Dense against pruned: KV bytes, parameters, perplexity; then widths, seconds and memory. A record of an older
    kvprune has no merged heads, and does not say what a step reads."""
    kv, parameters, read = record["kv_bytes_per_token"], record["parameters"], record.get("weights_read_bytes")
    table = Table(title=f"{record['source']}, {record['ratio_achieved']:.1%} of the KV cache removed")
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("KV bytes per token", f"{kv['dense']:,}", f"{kv['pruned']:,}", _ratio(kv))
    table.add_row("parameters", f"{parameters['dense']:,}", f"{parameters['pruned']:,}", _ratio(parameters))
    if read is not None:
        table.add_row("bytes of weights that a step reads", f"{read['dense']:,}", f"{read['pruned']:,}", _ratio(read))
    for row in record["perplexity"]:
        name = f"perplexity, {row['text']}, window {row['window']}, {row['tokens']:,} tokens"
        dense = "-" if row["dense"] is None else f"{row['dense']:.2f}"
        table.add_row(name, dense, f"{row['pruned']:.2f}", _ratio(row))
        if "before" in row:
            table.add_row("    before recovery", "", f"{row['before']:.2f}", _ratio({**row, "pruned": row["before"]}))
    return Group(table, *merged_heads(record), _widths(record), _costs(record))


def merged_heads(record: dict[str, Any]) -> list[str]:
    """A line that says which became which, if any did."""
    if record.get("merge", 1) == 1:
        return []
    if "per_layer" in record:  # not as many in every layer
        return [f"every {record['merge']} KV heads merged into one"]
    return ["{dense} KV heads merged into {pruned}".format(**record["kv_heads"])]


def bench_table(report: dict[str, Any]) -> RenderableType:
    """A row per batch and context: speed of both, the ratio beside its limit, and bytes."""
    where = report["environment"]
    merged = f", every {where['merge']} KV heads of the second merged" if where.get("merge", 1) > 1 else ""
    title = f"{where['source']}, {where['dtype']}, {where['device']}, {where['threads']} threads{merged}"
    table = Table(title=title)
    for column in ("batch", "context", "prefill, s", "ratio", "tokens/s", "ratio", "of limit"):
        table.add_column(column, justify="right")
    held = Table(title="memory, MB (beside: what a prefill needs beyond weights and cache)")
    for column in ("batch", "context", "weights", "KV cache", "beside", "peak", "a step reads", "latency, s"):
        held.add_column(column, justify="right")
    words = []
    for cell in report["cells"]:
        place = (str(cell["batch"]), str(cell["context"]))
        if "error" in cell:
            words.append(cell["error"])
            continue
        prefill, speed, latency = (_pair(cell[n]) for n in _TIMES)
        low, high = cell["spread"]["decode"]
        table.add_row(
            *(*place, prefill, f"{cell['prefill_ratio']:.2f}", speed),
            f"{cell['decode_ratio']:.2f}\n{low:.2f} to {high:.2f}",
            f"{cell['decode_ratio_over_limit']:.0%} of {cell['decode_limit']:.2f}",
        )
        sides = cell["memory_bytes"].values()
        sizes = [[side[name] for side in sides] for name in ("weights", "kv_cache", "activations", "peak")]
        sizes.append([side["all"] for side in cell["decode_bytes_read"].values()])
        held.add_row(
            *place, *("\n".join("-" if n is None else f"{n / 1e6:,.0f}" for n in pair) for pair in sizes), latency
        )
        if "largest_batch" in cell:
            sizes_of = (f"{name} {'unknown' if n is None else f'{n:,}'}" for name, n in cell["largest_batch"].items())
            words.append(f"largest batch of context {place[1]}, as batch {place[0]} took: {', '.join(sizes_of)}")
        slower = [what for what in ("prefill", "decode") if cell["spread"][what][1] < 1]
        if slower:
            words.append(f"batch {place[0]}, context {place[1]}: the second is slower in {' and '.join(slower)}")
    return Group(
        table, "upper line: the first model, lower line: the second; ratio: how many times as fast", held, *words
    )


_TIMES = ("prefill_seconds", "decode_tokens_per_second", "latency_seconds")


def _pair(values: dict[str, float]) -> str:
    return "\n".join(f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in values.values())


def fit_table(report: dict[str, Any]) -> RenderableType:
    """What fits: dense, and pruned at the ratio that is needed."""
    asked = f"{report['batch']} x {report['context']:,} tokens in {report['memory_bytes'] / 2**30:.4g} GiB"
    each = f" on each of {report['tensor_parallel']} ranks" if report["tensor_parallel"] > 1 else ""
    table = Table(
        title=f"{report['source']}, {report['dtype']}: {asked}{each}, {report['reserve_bytes'] / 2**30:.3g} in reserve"
    )
    for column in ("", "dense", "pruned"):
        table.add_column(column, justify="left" if not column else "right")
    pruned = report["pruned"]
    if each:
        kv = report["kv_bytes_per_token_of_a_rank"]
        table.add_row("KV bytes a token, of a rank", *(f"{kv[side]:,}" for side in ("dense", "pruned")))
    for name, label in (("weights", "weights, GiB"), ("kv_cache", "KV cache, GiB"), ("total", "together, GiB")):
        table.add_row(label, f"{report['dense'][name] / 2**30:.2f}", f"{pruned[name] / 2**30:.2f}" if pruned else "-")
    read = (f"{report['weights_read_bytes'][side] / 2**30:.2f}" for side in ("dense", "pruned"))
    table.add_row("weights that a step reads, GiB", *read)
    for name, label in (("largest_batch", "largest batch"), ("largest_context", "largest context")):
        table.add_row(label, *(f"{report[name][side]:,}" for side in ("dense", "pruned")))
    if report["ratio"] is None:
        verdict = f"no ratio is enough; at the largest, {report['largest_ratio']:.3g}, what fits is in the right column"
    elif report["ratio"] == 0:
        verdict = "the dense model fits: ratio 0"
    else:
        verdict = f"--ratio {report['ratio']:.4g} is needed"
        if report["merge"] > 1:
            verdict += f", every {report['merge']} KV heads merged into one"
        if report["drop_blocks"]:
            verdict += f", with --drop-blocks {report['drop_blocks']}"
    return Group(table, verdict, *_with_bits(report))


def _with_bits(report: dict[str, Any]) -> list[str]:
    """What a quantised cache would need instead, and what to try first, where that is not the dense model."""
    if report["ratio"] == 0:
        return []
    found = []
    for way in report["quantized"]:
        ratio = way["ratio"]
        says = "fits as it is" if ratio == 0 else "does not fit" if ratio is None else f"needs --ratio {ratio:.4g}"
        found.append(f"with a KV cache of {way['kv_bits']} bits it {says}")
    if 0 < report["keep"] < 1:
        found.append(f"with late admission it fits at --keep {report['keep']:.2g}")
    best = report["recommended"]
    if best is not None and best["kv_bits"] is not None:
        beside = "the dense model" if best["ratio"] == 0 else f"--ratio {best['ratio']:.4g}"
        why = "down to 4, bits cost less quality than width" if best["kv_bits"] > 2 else "so much width would cost more"
        found.append(f"recommended: {best['kv_bits']} bits with {beside}: {why}")
    return found


def evaluation_table(result: dict[str, Any]) -> RenderableType:
    """What `evaluate` returns, a column a source."""
    table = Table()
    table.add_column("")
    for source in result["sources"]:
        table.add_column(source["source"], justify="right", overflow="fold")
    table.add_row("KV bytes per token", *(f"{s['kv_bytes_per_token']:,}" for s in result["sources"]))
    table.add_row("parameters", *(f"{s['parameters']:,}" for s in result["sources"]))
    table.add_row("bytes of weights that a step reads", *(f"{s['weights_read_bytes']:,}" for s in result["sources"]))
    if result["sources"][0]["kv_bits"] is not None:
        table.add_row("bits of the cache", *(str(s["kv_bits"]) for s in result["sources"]))
    if result["sources"][0].get("keep") is not None:
        table.add_row("KV bytes kept", *(f"{s.get('kv_share', s['keep']):.0%}" for s in result["sources"]))
    for row in result["perplexity"]:
        name = f"perplexity, {row['text']}, window {row['window']}, {row['tokens']:,} tokens"
        table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in row["values"]))
    for row in result["tasks"]:
        samples = "" if row["samples"] is None else f", {row['samples']:,} samples"
        pairs = zip(row["values"], row["stderr"], strict=True)
        table.add_row(f"{row['task']}, {row['metric']}{samples}", *(_with_error(*pair) for pair in pairs))
    return Group(table, *result["errors"])


def _with_error(value: float | None, error: Any) -> str:
    """lm-eval writes "N/A" where a metric has no standard error."""
    if value is None:
        return "-"
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, float) else f"{value:.4f}"


def print_table(table: RenderableType) -> None:
    """To stdout."""
    console = Console(highlight=False)
    for part in table.renderables if isinstance(table, Group) else [table]:
        console.print(part, soft_wrap=isinstance(part, str))  # a line stays one


def _ratio(pair: dict[str, Any]) -> str:
    return "-" if pair["dense"] is None else f"{pair['pruned'] / pair['dense']:.3f}"


def _widths(record: dict[str, Any]) -> RenderableType:
    """A bar a layer, so that the eye finds the layers that lost most; layers that are alike, one after the other, share
    one."""
    wholes = whole_widths(record)
    of = " or ".join(map(str, sorted(set(wholes))))
    table = Table(title=f"channels kept per KV head, of {of}", show_header=False, box=None)
    dropped = record.get("dropped_blocks", ())
    rows = list(zip(layer_numbers(record), wholes, record["widths"], strict=True))
    for (whole, width, is_dropped), alike in groupby(rows, lambda row: (*row[1:], row[0] in dropped)):
        full = round(32 * width / whole)
        bar = "block dropped" if is_dropped else "█" * full + "░" * (32 - full)
        table.add_row(_told([number for number, *_ in alike]), f"{width}", bar)
    return table


def _told(layers: list[int]) -> str:
    first, last = layers[0], layers[-1]
    if first == last:
        return f"layer {first}"
    is_run = layers == list(range(first, last + 1))
    return f"layers {first} to {last}" if is_run else f"layers {', '.join(map(str, layers))}"


def _costs(record: dict[str, Any]) -> RenderableType:
    table = Table(title="what it took", show_header=False, box=None)
    for name, seconds in record["seconds"].items():
        table.add_row(name, f"{seconds:,.1f} s")
    table.add_row("peak memory above the imports", f"{record['peak_memory_bytes'] / 1e6:,.0f} MB")
    formula = record["memory_formula_bytes"]
    table.add_row("what it may need", f"{sum(formula.values()) / 1e6:,.0f} MB (kvprune.json says for what)")
    return table
