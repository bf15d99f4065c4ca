"""Options that several verbs share."""

from typing import Annotated, Any

import typer

TEXT_KINDS = "text name, file, chat:FILE of conversations, hub:NAME:COLUMN, mix:A,B"
SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help="hub id, checkpoint folder or .gguf file")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Devices = Annotated[
    str, typer.Option(help="auto, cpu, cuda, ..., or several, as cuda:0,cuda:1, for a model that fits on none alone")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's own; float32 where the CPU is slow in that), float32, bfloat16 or float16"
    ),
]
Revision = Annotated[str | None, typer.Option(help="of a hub id: branch, tag or commit")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the source")]
Out = Annotated[str, typer.Option(help="the folder to write; it must be missing or empty")]
Resume = Annotated[bool, typer.Option("--resume", help="continue a run that was interrupted")]
Eval = Annotated[
    list[str] | None,
    typer.Option(help=f"{TEXT_KINDS}, repeatable  [default: the test split of a named text]"),
]
EvalTokens = Annotated[int, typer.Option(help="how much of each text is evaluated")]
AsPrune = typer.Option(help="as for prune")


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """Of a verb's parameters, named as the public API names them, those that the user gave or that have a default."""
    return {name: value for name, value in parameters.items() if value not in (None, []) and name != "as_json"}
