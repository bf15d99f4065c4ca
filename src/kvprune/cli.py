"""The command line: one verb, one thin function; all logic is behind the public API.

Exit codes: 0 success, 2 a user's mistake (one line on stderr), 1 a fault of kvprune's (a traceback).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as hf_logging

import kvprune
from kvprune.cli_measure import bench, evaluate, fit
from kvprune.cli_options import (
    TEXT_KINDS,
    Device,
    Devices,
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
from kvprune.cli_serve import doctor, export, push
from kvprune.cli_study import study
from kvprune.errors import KVPruneError
from kvprune.measure.memory import is_out_of_memory
from kvprune.processes import is_main
from kvprune.progress import on_stderr
from kvprune.runtime.files import note_changed, read_shown
from kvprune.tokens.admission import Admission
from kvprune.versions import versions

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make the KV cache of a Hugging Face language model smaller, and say what that cost.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def every_verb(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the versions that count")
    ] = False,
) -> None:
    """What every verb shares."""


@app.command()
def prune(
    source: SourceArgument,
    out: Out,
    ratio: Annotated[float | None, typer.Option(help="fraction of the KV bytes to remove  [default: 0.5]")] = None,
    fit: Annotated[str | None, typer.Option(help="a memory, as 24GiB: remove what makes --context fit in it")] = None,
    context: Annotated[int | None, typer.Option(help="with --fit: tokens a sequence")] = None,
    batch: Annotated[int | None, typer.Option(help="with --fit: sequences at once  [default: 1]")] = None,
    reserve: Annotated[float | None, typer.Option(help="with --fit: as for fit  [default: 0.1]")] = None,
    importance: Annotated[
        str | None, typer.Option(help="variance, energy, taylor, l1 or l2  [default: variance]")
    ] = None,
    channels: Annotated[str | None, typer.Option(help="split or joint  [default: split]")] = None,
    merge: Annotated[
        str | None, typer.Option(help="auto, or how many KV heads become one; 1: none are merged  [default: auto]")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="an engine, whose widths are kept to: vllm, vllm-cpu, llama.cpp or transformers")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="how many ranks share the KV heads that are left  [default: 1]")
    ] = None,
    depth: Annotated[
        str | None, typer.Option(help="auto, or how many layers lose their attention altogether  [default: 0]")
    ] = None,
    drop_blocks: Annotated[
        int | None, typer.Option(help="how many whole blocks go, attention and MLP  [default: 0]")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="uniform, budget, sensitivity or rank  [default: uniform]")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="per-layer, uniform, portable or stock  [default: per-layer]")
    ] = None,
    repair: Annotated[
        str | None, typer.Option(help="rotate+refit, rotate, refit or none  [default: rotate+refit; joint: refit]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="kvpruner: the paper's choices")] = None,
    calibration: Annotated[
        str,
        typer.Option(help=f"{TEXT_KINDS}, or self: sampled from the model"),
    ] = "wikitext2",
    calibration_tokens: Annotated[int, typer.Option(help="how much of it")] = 16384,
    eval: Eval = None,
    eval_tokens: EvalTokens = 16384,
    windows: Annotated[
        list[int] | None, typer.Option("--window", help="evaluation window, repeatable  [default: 128 and 2048]")
    ] = None,
    repair_tokens: Annotated[
        int | None, typer.Option(help="how much of it refit takes, at most  [default: 32768]")
    ] = None,
    probes: Annotated[
        str | None, typer.Option(help="estimated (one backward pass) or measured  [default: estimated]")
    ] = None,
    probe: Annotated[float | None, typer.Option(help="fraction a probe removes  [default: the ratio]")] = None,
    probe_tokens: Annotated[
        int | None, typer.Option(help="calibration tokens that probes read  [default: 2048; measured: all]")
    ] = None,
    tau: Annotated[float | None, typer.Option(help="softness of the allocation by sensitivity  [default: 3]")] = None,
    align: Annotated[int | None, typer.Option(help="widths are multiples of this  [default: 8]")] = None,
    min_width: Annotated[int | None, typer.Option(help="no layer keeps fewer channels  [default: 16]")] = None,
    plan: Annotated[str | None, typer.Option(help="apply this plan.json instead of making one")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="of each device, as 20GiB; more is done block by block  [default: what is free]"),
    ] = None,
    resume: Resume = False,
    device: Devices = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Remove KV channels from a model and write it to a folder that loads again."""
    _show(kvprune.prune(progress=on_stderr(), **given(locals())).record, as_json, out)


@app.command()
def recover(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a pruned folder")],
    out: Out,
    text: Annotated[
        str,
        typer.Option(help=f"{TEXT_KINDS}, .json or .jsonl of Alpaca's, or self: sampled from the dense model"),
    ] = "wikitext2",
    tokens: Annotated[int, typer.Option(help="how much of it; 0 for all")] = 0,
    window: Annotated[int | None, typer.Option(help="tokens trained on at a time  [default: 512]")] = None,
    batch: Annotated[int | None, typer.Option(help="windows a step, of all processes together  [default: 4]")] = None,
    steps: Annotated[int | None, typer.Option(help="how many updates  [default: 100]")] = None,
    epochs: Annotated[int | None, typer.Option(help="instead of --steps: passes over the text")] = None,
    rank: Annotated[int | None, typer.Option(help="of the LoRA adapters  [default: 16]")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha  [default: twice the rank]")] = None,
    dropout: Annotated[float | None, typer.Option(help="before the adapters  [default: 0]")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="highest learning rate  [default: 0.001; next-token, or less than 3/8 cut: 0.0005]"),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="steps up to it, then a cosine to 0  [default: 10]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="of AdamW  [default: 0]")] = None,
    clip: Annotated[float | None, typer.Option(help="largest norm of the gradient  [default: 1]")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="layers with an adapter, repeatable: q_proj, ... [default: all-linear]"),
    ] = None,
    loss: Annotated[str | None, typer.Option(help="logits, logits+attention or next-token  [default: logits]")] = None,
    temperature: Annotated[float | None, typer.Option(help="of distillation  [default: 1]")] = None,
    attention_weight: Annotated[float | None, typer.Option(help="for logits+attention  [default: 1]")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="SOURCE", help="[default: the dense model of DIR]")] = None,
    held_out: Annotated[int | None, typer.Option(help="tokens at its end kept apart  [default: 4096]")] = None,
    patience: Annotated[
        int | None, typer.Option(help="stop after so many evaluations without a new best; 0: never  [default: 3]")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps between evaluations  [default: 25]")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="less memory, a third more time")
    ] = False,
    preset: Annotated[str | None, typer.Option(help="kvpruner: what its neighbours train with")] = None,
    eval: Eval = None,
    eval_tokens: EvalTokens = 16384,
    eval_windows: Annotated[
        list[int] | None, typer.Option("--eval-window", help="evaluation window, repeatable  [default: 128 and 2048]")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="what may be used, as 20GiB: the teacher comes block by block  [default: what is free]"),
    ] = None,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train a pruned model with LoRA and write it, merged, to a folder of the same kind."""
    result = kvprune.recover(progress=on_stderr(), **given(locals()))
    if result.record is not None:  # only the main process of several has one
        _show(result.record, as_json, out)


@app.command()
def generate(
    source: SourceArgument,
    prompt: Annotated[str, typer.Argument(help="the text to continue, or with --chat to answer")],
    chat: Annotated[bool, typer.Option("--chat", help="answer the prompt, through the model's chat template")] = False,
    system: Annotated[str | None, typer.Option(help="with --chat: what the model is told first")] = None,
    max_new_tokens: Annotated[int, typer.Option()] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    keep: Annotated[float | None, typer.Option(help="share of the KV bytes to keep, by late admission")] = None,
    skip: Annotated[float | None, typer.Option(help="share of all attention to skip, by token filtering")] = None,
    skip_preset: Annotated[str | None, typer.Option(help="paper: Token Filtering as published")] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="layers that may skip, best first, as 28,25,7  [default: from the last on]")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, or answer it."""
    result = kvprune.generate(progress=on_stderr(), **given(locals()))
    if as_json:
        print(json.dumps(result))
    else:
        print(result["text"] if chat else result["prompt"] + result["text"])
        print(f"({result['cache_bytes']:,} bytes of cache for {result['cache_tokens']} tokens)", file=sys.stderr)
        if "filter" in result:
            print(_skipped(result["filter"]), file=sys.stderr)


@app.command()
def show(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="a pruned folder")], as_json: Json = False
) -> None:
    """What was done to a pruned model, and what it cost."""
    record = read_shown(Path(directory))
    _show(record, as_json)
    note_changed(Path(directory), record)


@app.command()
def refresh(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="a pruned folder")], as_json: Json = False
) -> None:
    """Give a pruned folder of an older kvprune the code of this one."""
    found = kvprune.refresh(directory)
    if as_json:
        print(json.dumps(found))
        return
    if found["card"]:
        print(f"{directory}: wrote a model card, README.md")
    if found["is"] is None:
        print(f"{directory} is a stock checkpoint without code of kvprune's: nothing to do")
    elif not found["changed"]:
        print(f"{directory} is up to date: modeling.py version {found['is']}")
    else:
        was = "missing" if found["was"] is None else f"version {found['was']}"
        print(f"{directory}: modeling.py was {was}, is version {found['is']}")


@app.command()
def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="a pruned folder")],
    others: Annotated[
        list[str] | None, typer.Option("--with", help="another pruned folder for the quality figure, repeatable")
    ] = None,
    bench: Annotated[str | None, typer.Option(help="what bench --out wrote")] = None,
    out: Annotated[str | None, typer.Option(help=".html file to write  [default: DIR/report.html]")] = None,
    as_json: Json = False,
) -> None:
    """One HTML file: plan, quality, speed, memory, provenance and warnings; and its figures as PNG."""
    page = kvprune.report(directory, others=others or (), bench=bench, out=out)
    print(json.dumps({"report": str(page)}) if as_json else page)


app.command(name="eval")(evaluate)  # the help lists them in this order
for verb in (bench, fit, doctor, export, push):
    app.command()(verb)
app.add_typer(study, name="study")


def _skipped(report: dict[str, Any]) -> str:
    if report.get("keep_achieved") == 1 > report["keep_asked"]:
        enough = Admission.block + Admission.window
        return f"(--keep left out none of so short a text: the first tokens are decided on behind {enough})"
    if "keep_asked" in report:
        return (
            f"(kept {report['keep_achieved']:.1%} of the tokens, those not decided yet with them, asked were "
            f"{report['keep_asked']:.1%}; {report['kv_bytes']:,} KV bytes kept of {report['kv_bytes_dense']:,} dense)"
        )
    return (
        f"(skipped {report['ratio_achieved']:.1%} of the attention behind the warm-up, asked were "
        f"{report['ratio_asked']:.1%}; {report['kv_bytes']:,} KV bytes kept of {report['kv_bytes_dense']:,} dense)"
    )


def _show(record: dict[str, Any], as_json: bool, out: str | None = None) -> None:
    """out: where it was written just now."""
    if not is_main():
        return
    if as_json:
        print(json.dumps(record))
        return
    from kvprune.measure.table import print_table, pruned_table

    print_table(pruned_table(record))
    if out is not None:
        print(f"{out} is written; kvprune generate, recover, eval and doctor take it")


# What takes less memory, by command
_ON = "or free some memory, and go on with --resume"
_LESS = {
    "prune": f"give --memory, so that more is done block by block, or less --calibration-tokens; {_ON}",
    "recover": f"give --memory, a smaller --batch or --window, or --gradient-checkpointing; {_ON}",
    "eval": "give a smaller --window, or --dtype bfloat16",
    "generate": "give a shorter prompt, less --max-new-tokens, or --dtype bfloat16",
    "bench": "give a smaller --batch or --context, or --dtype bfloat16",
}
_LESS_OF_ANY = "give a smaller batch, context, window or model, or another --device"


def main() -> None:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    hf_logging.disable_progress_bar()  # ours say more
    hf_logging.set_verbosity_error()
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except KVPruneError as error:
        _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if is_out_of_memory(error):
            _refuse(f"out of memory; {_LESS.get(sys.argv[1], _LESS_OF_ANY)}")
        if not hasattr(error, "format_message"):  # what the parser raises for wrong words
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", "kvprune")
        _refuse(f"{error.format_message().rstrip('.')}. See: {path} --help")
    else:
        sys.exit(code if isinstance(code, int) else 0)  # the parser returns 130 after Ctrl-C


def _refuse(message: str) -> None:
    print("kvprune: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
