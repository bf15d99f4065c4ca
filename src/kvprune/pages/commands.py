"""docs/commands.md, made from the command line itself: python -m kvprune.pages.commands > docs/commands.md"""

from typing import Any

import typer

ABOVE = """# Commands

Made by `python -m kvprune.pages.commands` from the command line itself, which `kvprune VERB --help` shows too; a test
compares the two. Exit codes: 0 success, 2 a mistake in what was asked (one line on stderr), 1 a fault of kvprune's.
"""


def page() -> str:
    """The whole page."""
    from kvprune.cli import app

    return "\n".join([ABOVE, *_sections("kvprune", typer.main.get_command(app))])


def _sections(name: str, command: Any) -> list[str]:
    """One section for each verb, those of a group behind the group's own."""
    found = []
    for verb, inner in sorted(command.commands.items()):
        whole, text = f"{name} {verb}", (inner.help or "").strip()
        if hasattr(inner, "commands"):
            found += [f"## {whole}\n", f"{text}\n", *_sections(whole, inner)]
            continue
        named = [p.metavar or p.name.upper() for p in inner.params if p.param_type_name == "argument"]
        found += [
            f"{'##' if name == 'kvprune' else '###'} {whole}\n",
            f"    {' '.join([whole, *named])} [OPTIONS]\n",
            f"{text}\n",
            "| option | what |",
            "| --- | --- |",
            *(_row(p) for p in inner.params if p.name != "help"),
            "",
        ]
    return found


def _row(parameter: Any) -> str:
    """An option or argument; the default is in words where the help has it, else what the verb's own default is."""
    if parameter.param_type_name == "argument":
        names = parameter.metavar or parameter.name.upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    text = (parameter.help or "").replace("  [default:", " [default:").replace("|", "\\|")
    default = parameter.default
    if parameter.required:
        text += " **(required)**"
    elif default is not None and not isinstance(default, bool | list | tuple) and "[default" not in text:
        text += f" [default: {default}]"
    return f"| `{names}` | {text.strip()} |"


if __name__ == "__main__":
    print(page(), end="")
