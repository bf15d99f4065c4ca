"""The verbs that measure: quality, speed, and what fits in a memory."""

import json
from typing import Annotated

import typer

import kvprune
from kvprune.cli_options import TEXT_KINDS, AsPrune, Device, Dtype, Json, Revision, SourceArgument, Trust, given
from kvprune.progress import on_stderr


def evaluate(
    source: SourceArgument,
    against: Annotated[str | None, typer.Option(metavar="SOURCE2", help="a second source, on the same tokens")] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", help=f"{TEXT_KINDS}, repeatable  [default: wikitext2, or none with --tasks]"),
    ] = None,
    window_lengths: Annotated[
        list[int] | None, typer.Option("--window", help="tokens, repeatable  [default: 2048]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="how much of each text; 0 for all")] = 16384,
    tasks: Annotated[str | None, typer.Option(help="lm-eval's, as piqa,boolq, or its .yaml files")] = None,
    task_limit: Annotated[int | None, typer.Option(help="the first so many samples of each task")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="perplexity on a quantised cache: 8, 4 or 2")] = None,
    keep: Annotated[float | None, typer.Option(help="perplexity while this share of the KV bytes is kept")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity and tasks of a source, or of two side by side."""
    result = kvprune.evaluate(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(result))
        return
    from kvprune.measure.table import evaluation_table, print_table

    print_table(evaluation_table(result))


def bench(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a model, or with --pruned-shape a known shape")],
    against: Annotated[str | None, typer.Option(help="the model beside it, such as a pruned folder")] = None,
    batch: Annotated[str, typer.Option(help="sequences at once, as 1,8,32")] = "1",
    context: Annotated[str, typer.Option(help="tokens of the prompt, as 512,4096")] = "512",
    new_tokens: Annotated[int, typer.Option(help="how many are decoded behind it")] = 64,
    rounds: Annotated[int, typer.Option(help="how often both are timed")] = 5,
    keep: Annotated[float | None, typer.Option(help="let the second keep this share of its KV bytes")] = None,
    skip: Annotated[float | None, typer.Option(help="run the second under token filtering, at this share")] = None,
    skip_layers: Annotated[str | None, typer.Option(help="layers that may skip, best first, as 28,25,7")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="give the second a quantised cache: 8, 4 or 2")] = None,
    memory_size: Annotated[
        str | None, typer.Option("--memory", help="also the largest batch that fits in it, as 24GiB")
    ] = None,
    pruned_shape: Annotated[bool, typer.Option(help="random weights of the source's shape, dense and pruned")] = False,
    ratio: Annotated[
        float | None, typer.Option(help="of --pruned-shape: fraction of the KV bytes that are gone  [default: 0.5]")
    ] = None,
    merge: Annotated[
        str | None, typer.Option(help="of --pruned-shape: how many KV heads become one, as in prune  [default: auto]")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="JSON file, written after every cell; and a picture beside it")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Speed and memory of one model or two, over a grid of batch x context."""
    report = kvprune.bench(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import bench_table, print_table

    print_table(bench_table(report))


def fit(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a dense model, or llama-7b, llama-3-8b, mistral-7b")],
    memory: Annotated[str, typer.Option(help="of the device, as 24GiB")],
    context: Annotated[int, typer.Option(help="tokens a sequence")],
    batch: Annotated[int, typer.Option(help="sequences at once")] = 1,
    dtype: Dtype = "auto",
    reserve: Annotated[float, typer.Option(help="share of the memory left to activations")] = 0.1,
    layout: Annotated[str, AsPrune] = "per-layer",
    merge: Annotated[str, AsPrune] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option(help="how many devices share the model, each with that much memory")
    ] = 1,
    align: Annotated[int, AsPrune] = 8,
    min_width: Annotated[int, AsPrune] = 16,
    drop_blocks: Annotated[int, AsPrune] = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Which ratio makes a context and a batch fit in a memory."""
    report = kvprune.fit(**given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import fit_table, print_table

    print_table(fit_table(report))
