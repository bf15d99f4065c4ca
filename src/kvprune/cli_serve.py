"""The verbs for serving a pruned folder elsewhere."""

import json
from typing import Annotated

import typer

import kvprune
from kvprune.cli_options import Json, given

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
