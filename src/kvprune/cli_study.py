"""The command line's `study`: what a choice would change, measured before it is made."""

import json
from typing import Annotated

import typer

import kvprune
from kvprune.cli_options import (
    TEXT_KINDS,
    AsPrune,
    Device,
    Dtype,
    Eval,
    EvalTokens,
    Json,
    Out,
    Resume,
    Revision,
    SourceArgument,
    Trust,
    given,
)
from kvprune.progress import on_stderr

study = typer.Typer(help="What a choice would change, measured before it is made.")
AsBench = typer.Option(help="as for bench")


@study.command(name="calibration")
def study_calibration(
    source: SourceArgument,
    out: Out,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", help=f"{TEXT_KINDS}, or self, repeatable  [default: wikitext2, ptb and self]"),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="how much of it, repeatable  [default: 2048 and 16384]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="stretches of each text, or samples of self")] = 3,
    ratio: Annotated[float, typer.Option(help="fraction of the KV bytes to remove")] = 0.5,
    importance: Annotated[str | None, AsPrune] = None,
    merge: Annotated[str | None, AsPrune] = None,
    allocation: Annotated[str | None, AsPrune] = None,
    repair: Annotated[str | None, AsPrune] = None,
    preset: Annotated[str | None, typer.Option(help="kvpruner: the paper's choices")] = None,
    align: Annotated[int | None, AsPrune] = None,
    min_width: Annotated[int | None, AsPrune] = None,
    eval: Annotated[
        list[str] | None,
        typer.Option(help=f"{TEXT_KINDS}, repeatable  [default: the test splits of the named texts]"),
    ] = None,
    eval_tokens: EvalTokens = 16384,
    window: Annotated[int, typer.Option(help="evaluation window")] = 512,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """How far perplexity moves with source, size and seed of the calibration text; with a picture."""
    report = kvprune.study_calibration(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import print_table
    from kvprune.studies.table import calibration_table

    print_table(calibration_table(report))


@study.command(name="depth")
def study_depth(
    source: SourceArgument,
    out: Out,
    ratios: Annotated[
        list[float] | None,
        typer.Option("--ratio", help="fraction of the KV bytes to remove, repeatable  [default: 0.25 and 0.5]"),
    ] = None,
    depths: Annotated[
        list[int] | None,
        typer.Option("--depth", help="layers without attention, repeatable  [default: 0, 1 and 2]"),
    ] = None,
    drop_blocks: Annotated[
        list[int] | None,
        typer.Option("--drop-blocks", help="whole blocks that go beside these, repeatable  [default: 0, 1 and 2]"),
    ] = None,
    calibration: Annotated[str | None, AsPrune] = None,
    calibration_tokens: Annotated[int | None, AsPrune] = None,
    repair_tokens: Annotated[int | None, AsPrune] = None,
    merge: Annotated[str | None, AsPrune] = None,
    align: Annotated[int | None, AsPrune] = None,
    min_width: Annotated[int | None, AsPrune] = None,
    eval: Eval = None,
    eval_tokens: EvalTokens = 16384,
    window: Annotated[int, typer.Option(help="evaluation window")] = 512,
    speed: Annotated[bool, typer.Option(help="also time decoding; left out, --resume does it later")] = True,
    batch: Annotated[int, typer.Option(help="of what is timed: sequences at once")] = 8,
    context: Annotated[int, typer.Option(help="of what is timed: tokens of the prompt")] = 1024,
    new_tokens: Annotated[int, AsBench] = 32,
    rounds: Annotated[int, AsBench] = 5,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Whole blocks and layers without attention against width, at equal KV bytes; with a picture."""
    report = kvprune.study_depth(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import print_table
    from kvprune.studies.table import depth_table

    print_table(depth_table(report))


@study.command(name="layers")
def study_layers(
    source: SourceArgument,
    text: Annotated[str, typer.Option(help="text name or file")] = "wikitext2",
    tokens: Annotated[int, typer.Option(help="how much of it")] = 4096,
    window: Annotated[int, typer.Option(help="tokens the model sees at once")] = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Which layers should skip attention first: one dense pass, for generate's --skip-layers."""
    report = kvprune.study_layers(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import print_table
    from kvprune.studies.table import layers_table

    print_table(layers_table(report))


@study.command(name="retrieval")
def study_retrieval(
    source: SourceArgument,
    out: Out,
    against: Annotated[str | None, typer.Option(metavar="SOURCE2", help="a second source, on the same texts")] = None,
    text: Annotated[str, typer.Option(help="text name (its test split) or file, to hide numbers in")] = "wikitext2",
    contexts: Annotated[
        list[int] | None, typer.Option("--context", help="tokens, repeatable  [default: 4096 and 8000]")
    ] = None,
    keeps: Annotated[
        list[float] | None,
        typer.Option("--keep", help="share of the KV bytes that is kept, repeatable  [default: 1, 0.75, 0.5 and 0.25]"),
    ] = None,
    kv_bits: Annotated[int | None, typer.Option(help="on a quantised cache: 8, 4 or 2")] = None,
    samples: Annotated[int, typer.Option(help="of each task and context")] = 10,
    seed: int = 0,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Whether numbers hidden in a long text are still found, at every share of tokens kept; with a picture."""
    report = kvprune.study_retrieval(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import print_table
    from kvprune.studies.table import retrieval_table

    print_table(retrieval_table(report))


@study.command(name="robustness")
def study_robustness(
    source: SourceArgument,
    out: Out,
    against: Annotated[str | None, typer.Option(metavar="SOURCE2", help="a second source, on the same text")] = None,
    text: Annotated[str, typer.Option(help="text name (its test split) or file")] = "wikitext2",
    tokens: Annotated[int, typer.Option(help="how much of it is read")] = 100_000,
    new_tokens: Annotated[int, typer.Option(help="how many are written")] = 4096,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity and repetition against position, beyond the model's context too; with a picture."""
    report = kvprune.study_robustness(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import print_table
    from kvprune.studies.table import robustness_table

    print_table(robustness_table(report))


@study.command(name="scaling")
def study_scaling(
    source: SourceArgument,
    out: Out,
    against: Annotated[str | None, typer.Option(help="the model beside it, such as a pruned folder")] = None,
    batch: Annotated[str, typer.Option(help="sequences at once")] = "1,2,4,8",
    context: Annotated[str, typer.Option(help="tokens of the prompt")] = "256,512,1024,2048,4096",
    new_tokens: Annotated[int, AsBench] = 32,
    rounds: Annotated[int, AsBench] = 5,
    skip: Annotated[float | None, AsBench] = None,
    skip_layers: Annotated[str | None, AsBench] = None,
    kv_bits: Annotated[int | None, AsBench] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """How decoding speed scales with batch and context, beside what the bytes allow; with a picture."""
    report = kvprune.study_scaling(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(report))
        return
    from kvprune.measure.table import bench_table, print_table

    print_table(bench_table(report))
