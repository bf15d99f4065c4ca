"""What lies in a pruned folder, and the checks that it is whole. Needs no torch.

Weights and plan are checked against the record. What people edit or write again (generation config, tokenizer, chat
template, fields of config.json) only has to be there and readable, and modeling.py does not matter: kvprune runs its
own. Weights that are whole but not those of the record were trained further, or a bit of them flipped: nobody can
tell which from the outside, so they load and a note says both.
"""

import codecs
import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from kvprune.errors import BrokenCheckpoint, NoSpace, OutputExists, UnknownSource

RECORD = "kvprune.json"  # the plan's summary, every measured figure, and a checksum of every other file
PLAN = "plan.json"
CARD = "README.md"  # the model card
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
CHANGED = (
    "the weights are not those that kvprune measured, so the figures of its record are not theirs; "
    "if you did not train them further, they are damaged: copy the folder again"
)
_INDEX = "model.safetensors.index.json"
_log = logging.getLogger("kvprune")
_noted: set[tuple[Path, str]] = set()
# What `show` needs of a record
SHOWN: tuple[str, ...] = ("source", "ratio_achieved", "kv_bytes_per_token", "parameters", "perplexity", "widths")
SHOWN += ("head_dim", "seconds", "peak_memory_bytes", "memory_formula_bytes")
RESUME = ".resume"  # the state of an unfinished run
DENSE = ".dense"  # while one works: weights that the source's files do not hold as the model wants them


@contextmanager
def writing_to(folder: Path, mend: str = "free some space or choose another --out") -> Iterator[None]:
    """Turn a full or read-only disk into NoSpace, which says how to mend it; other errors stay what they are."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers wrap what the operating system said
        wrapped = re.search(r"os error (\d+)", str(error))
        code = int(wrapped.group(1)) if wrapped else getattr(error, "errno", None)
        if code not in _DISK_ERRORS:
            raise
        raise NoSpace(f"cannot write to {folder}: {error}; {mend}") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Work in a folder, which is made if it is missing, while no other process does. Raises OutputExists if one does,
    and NoSpace.

    The operating system holds the lock, and lets go of it however the process ends: no file is left behind. A file
    system without locks has none.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExists(f"{folder} is a file; choose another --out")
    made = not folder.exists()
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputExists(
                f"another run is writing to {folder}; wait until it is done, or choose another --out"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8, to the disk, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        flush(partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def note(folder: Path, about: str, message: str) -> None:
    """A line for the user about something of a folder, once in a process."""
    key = (folder.resolve(), about)
    if key not in _noted:
        _noted.add(key)
        _log.warning("%s: %s", folder, message)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError, and ValueError for what is damaged, nested without end, or no UTF-8 (half
    characters that are escaped too: nobody could print them)."""
    return from_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))


def checksum(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Of every file of the folder but the record itself, and the model card, which people edit, or take away: nothing
    is loaded from it, and all that it says is in the record."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in (RECORD, CARD))
    return {name: checksum(folder / name) for name in names}


def check_there(folder: Path) -> None:
    """Raise UnknownSource where there is no such folder."""
    if not folder.is_dir():
        raise UnknownSource(f"there is no folder {folder}; give a pruned folder (download what is on the hub first)")


def read_record(folder: Path) -> dict[str, Any]:
    """kvprune.json of a pruned folder. Raises BrokenCheckpoint."""
    from kvprune.runtime.shown import Files

    try:
        record = read_json(folder / RECORD)
        Files.model_validate(record)
        return record
    except OSError:
        if not folder.is_dir():
            raise BrokenCheckpoint(f"there is no folder {folder}") from None
        raise BrokenCheckpoint(f"{folder} has no {RECORD}; it is not a folder that kvprune wrote") from None
    except ValueError:
        raise BrokenCheckpoint(f"{folder / RECORD} is damaged; prune the model again") from None


def read_shown(folder: Path, needs: Iterable[str] = SHOWN) -> dict[str, Any]:
    """The same, whose figures can be read: those that are needed are there. Raises BrokenCheckpoint."""
    from pydantic import ValidationError

    from kvprune.runtime.shown import Recorded

    record = read_record(folder)
    try:
        Recorded.validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([".".join(map(str, first["loc"])), first["msg"].lower()])
        raise BrokenCheckpoint(f"{folder / RECORD}: {where.removeprefix(': ')}; prune the model again") from None
    if lacking := sorted(set(needs) - set(record)):
        raise BrokenCheckpoint(f"{folder / RECORD} lacks {lacking[0]}; prune the model again")
    return record


def weight_files(folder: Path) -> list[str]:
    """The names of the files that transformers reads the weights from, there or not. Raises BrokenCheckpoint."""
    if (folder / "model.safetensors").is_file() or not (folder / _INDEX).is_file():
        return ["model.safetensors"]
    from kvprune.runtime.shown import Index

    try:
        return sorted(set(Index.model_validate(read_json(folder / _INDEX)).weight_map.values()))
    except ValueError:
        raise BrokenCheckpoint(f"{folder / _INDEX} is damaged; copy the folder again or prune again") from None


def weight_checksums(folder: Path) -> dict[str, str]:
    """sha256 of each file of weights that is there, read once (about a second per GB)."""
    return {name: checksum(folder / name) for name in weight_files(folder) if (folder / name).is_file()}


def changed_files(folder: Path, record: dict[str, Any]) -> list[str]:
    """The names of the files that are there, and are not as they were recorded; weights that were saved in other pieces
    are not among them."""
    recorded = record["files"].items()
    return sorted(name for name, kept in recorded if (folder / name).is_file() and checksum(folder / name) != kept)


def note_changed(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the weights, if they are there, are others than the record's; then with a note."""
    changed = any(digest != record["files"].get(name) for name, digest in weight_checksums(folder).items())
    if changed:
        note(folder, "weights", CHANGED)
    return changed


def verify_files(folder: Path) -> None:
    """Raise BrokenCheckpoint if something that was saved is missing, unreadable, or a plan that was changed.

    Names and shapes of the weights are checked when they are loaded. Files that were added later are none of our
    business.
    """
    record = read_record(folder)
    weights = weight_files(folder)
    for name in sorted({*record["files"], *weights}):
        path = folder / name
        is_weights = path.suffix == ".safetensors" or name == _INDEX
        if name == "modeling.py" or (is_weights and name not in weights):  # saved again, in other pieces
            continue
        if not path.is_file():
            raise BrokenCheckpoint(f"{path} is missing; copy the folder again or prune again")
        if name == PLAN and checksum(path) != record["files"][name]:
            raise BrokenCheckpoint(f"{path} is not what was saved; copy the folder again or prune again")
        _check_readable(path)
    note_changed(folder, record)


def _check_readable(path: Path) -> None:
    """A safetensors file is as long as its header says, a JSON file is JSON. Raises BrokenCheckpoint."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                pass
        elif path.suffix == ".json":
            read_json(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path} is damaged ({error}); copy the folder again or prune again") from None
