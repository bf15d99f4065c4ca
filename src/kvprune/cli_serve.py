"""The verbs for serving a pruned folder elsewhere."""

import json
from typing import Annotated

import typer

import kvprune
from kvprune.cli_options import Device, Dtype, Json, given
from kvprune.errors import UnsupportedTarget

FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="a pruned folder")]


def export(
    folder: FolderArgument,
    gguf: Annotated[str, typer.Option(help="file to write, for llama.cpp")],
    type: Annotated[str, typer.Option(help="of the matrices: f32, f16 or q8_0")] = "f16",
    as_json: Json = False,
) -> None:
    """Write a folder of the layout stock or portable as a GGUF file."""
    found = kvprune.export(**given(locals()))
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['file']}: {found['architecture']}, {found['type']}, {found['bytes']:,} bytes, read back and checked")
    if found["not_quantised"]:
        print(f"{len(found['not_quantised'])} matrices stay f16: their rows are no multiple of 32 numbers")
    print(*found["differences"], sep="\n", end="\n" if found["differences"] else "")


def push(
    folder: FolderArgument,
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository on the hub; made if there is none")],
    private: Annotated[bool | None, typer.Option(help="of a new repository")] = None,
    revision: Annotated[str | None, typer.Option(help="branch to write to  [default: main]")] = None,
    as_json: Json = False,
) -> None:
    """Upload a pruned folder to the hub; the token is HF_TOKEN, or what `hf auth login` stored."""
    done = kvprune.push(**given(locals()))
    print(json.dumps(done) if as_json else done["url"])


def doctor(
    folder: FolderArgument,
    target: Annotated[
        str | None, typer.Option(help="look at one engine: transformers, vllm, vllm-cpu or llama.cpp")
    ] = None,
    check: Annotated[bool, typer.Option(help="load the model, and see whether it does what its record says")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Which engines take a pruned folder, and whether it is sound; exit code 2 if --target cannot, or it is not."""
    report = kvprune.doctor(**given(locals()))
    from kvprune.engines.doctor import lines

    print(json.dumps(report) if as_json else "\n".join(lines(report)))
    if target is not None and report["engines"][target]["why"]:
        raise UnsupportedTarget("; ".join(report["engines"][target]["why"]))
    if report["checks"] is not None and not report["checks"]["passed"]:
        raise UnsupportedTarget(
            f"{folder} does not do what its record says: copy it again, update kvprune, or prune again"
        )
