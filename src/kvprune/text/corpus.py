"""A text's name or file -> its characters. Calibration reads the valid split, evaluation the test split."""

import codecs
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic_core import from_json

from kvprune.errors import UnknownText
from kvprune.models.check import first_line

Split = Literal["valid", "test"]

# name -> (hub data set, configuration, revision, column, how its rows are joined)
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text", ""),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "refs/convert/parquet", "sentence", "\n"),
}
LOCAL_ONLY = ("wiki",)  # `make demo` writes it
SELF = "self"  # sampled from the model: see sampled.py
NAMES = (*HUB, *LOCAL_ONLY)


def read_text(name: str, split: Split) -> str:
    """The text called `name`, or the file of that path (which has no splits).

    A name is looked up as NAME-valid.txt / NAME-test.txt in $KVPRUNE_DATA, then on the hub. Raises UnknownText.
    """
    if is_file(name):
        if split == "valid" and is_test_split(name):
            raise UnknownText(f"{name} is a test split; calibrate and train on other text, keep this one for --eval")
        return read_file(Path(name))
    path = local_file(name, split)
    if path is not None:
        return read_file(path)
    if name in HUB:
        return _from_hub(name, split)
    if name == SELF:
        raise UnknownText(f"text {SELF!r} is sampled from the model and is none to judge on; name another")
    check_known(name)
    raise UnknownText(f"text {name!r} needs {name}-{split}.txt in the folder that $KVPRUNE_DATA names")


def check_known(name: str) -> None:
    """Raise UnknownText for what is neither a file nor a text's name, whether that can be read or not."""
    known = name in NAMES or name == SELF or local_file(name, "valid") or local_file(name, "test")
    if not known and (Path(name).suffix or os.sep in name):
        raise UnknownText(f"there is no file {name}; give one, or a text's name: {', '.join(NAMES)}")
    if not known:
        raise UnknownText(f"unknown text {name!r}; give a file or one of: {', '.join(NAMES)}")


def text_names(names: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """One name or path, or several, as names."""
    return (str(names),) if isinstance(names, (str, Path)) else tuple(map(str, names))


def is_file(name: str) -> bool:
    """Whether a text is named by its path."""
    return os.path.isfile(name)


def local_file(name: str, split: Split) -> Path | None:
    """Where a text's split is read from, unless it comes from the hub: the file itself, or one in $KVPRUNE_DATA."""
    if is_file(name):
        return Path(name)
    folder = os.environ.get("KVPRUNE_DATA")
    path = Path(folder) / f"{name}-{split}.txt" if folder else None
    return path if path is not None and path.is_file() else None


def is_test_split(path: str) -> bool:
    """Whether a file says in its name or its folder's, or in those of what it links to, that it is a test split: the
    folder's, where there is one with the training or the valid split beside it."""
    for file in (Path(path).absolute(), Path(path).resolve()):
        words = re.split(r"[^a-z]+", file.name.lower())
        known = {f"{re.sub('[^a-z]', '', name)}{end}" for name in ("", *NAMES) for end in ("test", "tests", "testset")}
        beside = [file.parent.parent / name for name in ("train", "valid", "validation", "dev")]
        if known & set(words) or (file.parent.name.lower() == "test" and any(map(Path.is_dir, beside))):
            return True
    return False


def read_file(path: Path) -> str:
    """A file's text, without the byte order mark that some editors put first. Raises UnknownText."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UnknownText(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        with path.open("rb") as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        how = f"UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {path}" if is_utf16 else "no UTF-8; convert it first"
        raise UnknownText(f"{path} is {how}") from None
    if "\0" in text:
        raise UnknownText(f"{path} has zero bytes, as no text has; convert it first")
    return text


def json_values(content: str, path: str) -> list[Any]:
    """The values of a JSON list, or one JSON value a line, which may be lists too. content: without blanks around it.
    Raises UnknownText."""
    try:
        if content.startswith("["):
            with suppress(ValueError):  # or lists, one a line
                return from_json(content)
        return [from_json(line) for line in content.split("\n") if line.strip()]
    except ValueError as error:
        raise UnknownText(f"{path} is neither a JSON list nor JSON lines: {error}") from None


def _from_hub(name: str, split: Split) -> str:
    repository, configuration, revision, column, joiner = HUB[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise UnknownText(
            f"text {name!r}: put {name}-{split}.txt into the folder that $KVPRUNE_DATA names, "
            "or pip install datasets to fetch it from the hub, or give a file"
        ) from None
    try:
        part = "validation" if split == "valid" else "test"
        rows = load_dataset(repository, configuration, revision=revision, split=part)
    except Exception as error:  # the hub's errors have no common class
        reason = first_line(error)
        raise UnknownText(
            f"text {name!r} is not in $KVPRUNE_DATA and the hub did not give {repository}: {reason}; give a file"
        ) from error
    return joiner.join(rows[column])
