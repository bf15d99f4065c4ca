"""The copy of modeling.py that a pruned folder carries: how old it is, and today's in its place. Needs no torch.

kvprune never runs that copy, only transformers and vLLM without kvprune do. Its number is read, not executed.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from kvprune.errors import BrokenCheckpoint, NewerFolder
from kvprune.pages.card import card
from kvprune.runtime import PREFIX
from kvprune.runtime.files import (
    CARD,
    RECORD,
    alone,
    check_there,
    note,
    read_json,
    read_record,
    write_whole,
    writing_to,
)

CODE = "modeling.py"
OWN = Path(__file__).with_name(CODE)
_MEND = "make the folder writable, or free some space"
# What copies of an older version do wrong with the model of their own folder. Version 2 knows no merged heads, and no
# folder that it came with has any.
_IN_VLLM = "does not start in vLLM 0.32 and newer where heads are merged"
FAULTS = {
    1: "loses the KV cache with transformers 5.24 and newer, without an error",
    **dict.fromkeys((4, 5, 6), _IN_VLLM),
}


def version_of(code: bytes) -> int:
    """The VERSION that a modeling.py says; 1 for the first ones, which say none."""
    found = re.search(rb"^VERSION\s*=\s*(\d+)", code, re.MULTILINE)
    return int(found.group(1)) if found else 1


def look(name: str | Path) -> None:
    """Note a copy in a folder that runs wrong, once. Raises NewerFolder. A hub id is left alone: there is no folder to
    mend."""
    path = Path(name)
    copy = (path.parent if path.is_file() else path) / CODE
    if not copy.is_file():
        return
    found, mine = version_of(copy.read_bytes()), version_of(OWN.read_bytes())
    _refuse_newer(copy.parent, found, mine)
    if found in FAULTS:
        note(
            copy.parent,
            CODE,
            f"its {CODE} is version {found}, which {FAULTS[found]}; kvprune uses its own (version {mine}), and so that "
            f"others can load the folder run: kvprune refresh {copy.parent}",
        )


def refresh(folder: str | Path) -> dict[str, Any]:
    """Give a pruned folder today's modeling.py, and its record the checksum of it; and a model card if it has none.

    Returns {"folder", "was", "is" (versions; None where there is no such file), "changed", "card" (whether one was
    written)}. A portable or stock folder has no code of ours. The code is written first and the record behind it, each
    whole, so that whatever happens in between the folder loads. Raises UnknownSource, BrokenCheckpoint, NewerFolder or
    NoSpace.
    """
    folder = Path(folder)
    check_there(folder)
    with alone(folder):
        return _refresh(folder)


def _refresh(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    model_type, has_card = _model_type(folder), (folder / CARD).exists()
    written = None if has_card else card_of(folder, record, model_type)
    found = {"folder": str(folder), "was": None, "is": None, "changed": False, "card": not has_card}
    if model_type.startswith(PREFIX):
        found |= _refresh_code(folder, record)
    if written is not None:
        with writing_to(folder, _MEND):
            write_whole(folder / CARD, written)
    return found


def _refresh_code(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """{"was", "is", "changed"}"""
    own, path = OWN.read_bytes(), folder / CODE
    code = path.read_bytes() if path.is_file() else None
    was, now = None if code is None else version_of(code), version_of(own)
    _refuse_newer(folder, was or 0, now)
    digest = hashlib.sha256(own).hexdigest()
    is_recorded = record["files"].get(CODE) == digest
    with writing_to(folder, _MEND):
        if code != own:
            write_whole(path, own)
        if not is_recorded:
            record["files"][CODE] = digest
            write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
    return {"was": was, "is": now, "changed": code != own or not is_recorded}


def card_of(folder: Path, record: dict[str, Any], model_type: str) -> str:
    """The model card that a folder of this record wants. Raises BrokenCheckpoint."""
    try:
        return card(record, model_type)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise BrokenCheckpoint(f"{folder / RECORD} is damaged; prune the model again") from None


def _model_type(folder: Path) -> str:
    try:
        return str(read_json(folder / "config.json")["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BrokenCheckpoint(f"{folder / 'config.json'} is missing or damaged; copy the folder again") from None


def _refuse_newer(folder: Path, found: int, mine: int) -> None:
    if found > mine:
        raise NewerFolder(
            f"{folder} has {CODE} version {found}, and this kvprune knows {mine}: upgrade kvprune, or load the folder "
            "with trust_remote_code=True in a program that does not import kvprune"
        )
