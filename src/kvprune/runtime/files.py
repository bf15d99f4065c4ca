"""What lies in a pruned folder, and the checks that it is whole. Needs no torch."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvprune.errors import BrokenCheckpoint, NoSpace

RECORD = "kvprune.json"  # the plan's summary, every measured figure, and a checksum of every other file
PLAN = "plan.json"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
RESUME = ".resume"  # the state of an unfinished run


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into NoSpace; other errors stay what they are."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers wrap what the operating system said
        wrapped = re.search(r"os error (\d+)", str(error))
        code = int(wrapped.group(1)) if wrapped else getattr(error, "errno", None)
        if code not in _DISK_ERRORS:
            raise
        raise NoSpace(f"cannot write to {folder}: {error}; free some space or choose another --out") from error


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(partial, path)


def checksum(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Of every file of the folder but the record itself."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != RECORD)
    return {name: checksum(folder / name) for name in names}


def read_record(folder: Path) -> dict[str, Any]:
    """kvprune.json of a pruned folder. Raises BrokenCheckpoint."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8-sig"))
        if not isinstance(record["files"], dict):
            raise TypeError
        return record
    except OSError:
        raise BrokenCheckpoint(f"{folder} has no {RECORD}; it is not a folder that kvprune wrote") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenCheckpoint(f"{folder / RECORD} is damaged; prune the model again") from None


def read_shown(folder: Path) -> dict[str, Any]:
    """The same, with what is shown of a folder. Raises BrokenCheckpoint."""
    record = read_record(folder)
    if not {"source", "widths", "head_dim", "kv_bytes_per_token", "perplexity", "seconds"} <= set(record):
        raise BrokenCheckpoint(f"{folder / RECORD} lacks what was measured; prune the model again")
    return record


def verify_files(folder: Path) -> None:
    """Raise BrokenCheckpoint if a file that was saved is missing or not what was saved.

    Files that were added later are none of our business; every saved one is read once (about a second per GB).
    """
    for name, expected in read_record(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpoint(f"{path} is missing; copy the folder again or prune again")
        if checksum(path) != expected:
            raise BrokenCheckpoint(f"{path} is not what was saved; copy the folder again or prune again")
