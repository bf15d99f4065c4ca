"""What a user gives to calibrate on -> token ids: a text's name, a file, strings, a column, token ids, conversations.

Every text is one stream of ids that is cut to windows; what its kinds differ in is where the ids come from, and what a
window begins with.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import BadOption, UnknownText
from kvprune.models.check import first_line
from kvprune.text.conversations import Conversation, conversation_of, cut_conversations, read_conversations, stream
from kvprune.text.corpus import SELF, is_file, is_test_split, read_text
from kvprune.text.windows import cut_windows, start_token, token_ids

CHAT, HUB = "chat:", "hub:"
BETWEEN = "\n\n"  # documents
Calibration = str | Path | torch.Tensor | Iterable[str] | Iterable[Conversation]


@dataclass(frozen=True)
class Text:
    """A named text, or a file. name: what the record says. row: how many tokens a window must have, None: as asked."""

    name: str
    row: int | None = field(default=None, kw_only=True)
    needs_tokenizer = True

    @property
    def judges(self) -> bool:
        """Whether there is no test split of it, so that its own end is what a result is judged on."""
        return is_file(self.name) or self.name == SELF

    @property
    def file(self) -> str | None:
        """What is read, where that is a file."""
        return self.name

    def ids(self, tokenizer: Any, tokens: int | None = None) -> torch.Tensor:
        """All ids (n,), or at least the first `tokens` of them. Raises UnknownText or BadOption."""
        return token_ids(read_text(self.name, "valid"), tokenizer, tokens)

    def cut(self, ids: torch.Tensor, window: int, tokenizer: Any) -> torch.Tensor:
        """Ids (n,) of this text as whole windows (count, window)."""
        return cut_windows(ids, window, start_token(tokenizer))

    def whole(self, tokens: int) -> int:
        """So many tokens, in whole rows, at least one, where it has rows."""
        return tokens if self.row is None else max(tokens // self.row, 1) * self.row

    def at_end(self, tokens: int) -> int:
        """The same, rounded up."""
        return tokens if self.row is None else math.ceil(tokens / self.row) * self.row


@dataclass(frozen=True)
class Documents(Text):
    """Strings, read as one text with an empty line between them."""

    documents: tuple[str, ...] = field(repr=False)
    judges = True
    file = None

    def ids(self, tokenizer: PreTrainedTokenizerBase, tokens: int | None = None) -> torch.Tensor:
        return token_ids(BETWEEN.join(self.documents), tokenizer, tokens)


@dataclass(frozen=True)
class Conversations(Text):
    """Conversations, one after the other as the chat template has them."""

    conversations: tuple[Conversation, ...] = field(repr=False)
    judges = True

    @property
    def file(self) -> str | None:
        return self.name.removeprefix(CHAT) if self.name.startswith(CHAT) else None

    def ids(self, tokenizer: PreTrainedTokenizerBase, tokens: int | None = None) -> torch.Tensor:
        return stream(self.conversations, tokenizer, tokens)

    def cut(self, ids: torch.Tensor, window: int, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        return cut_conversations(ids, window, start_token(tokenizer))


@dataclass(frozen=True)
class Tokens(Text):
    """Ids as they are: nothing is put before them. With rows these are the windows, and what is judged on in shorter
    ones is cut within them."""

    given: torch.Tensor = field(repr=False)
    judges = True
    file = None
    needs_tokenizer = False

    def ids(self, tokenizer: Any, tokens: int | None = None) -> torch.Tensor:
        return self.given

    def cut(self, ids: torch.Tensor, window: int, tokenizer: Any) -> torch.Tensor:
        if self.row is None:
            return cut_windows(ids, window)
        rows = ids[: len(ids) // self.row * self.row].view(-1, self.row)
        return rows[:, : self.row // window * window].reshape(-1, window)


def find_text(given: Any) -> Text:
    """What `given` is. Raises UnknownText or BadOption."""
    if isinstance(given, (str, os.PathLike)):
        return _named(str(given))
    if isinstance(given, torch.Tensor):
        return _tokens(given)
    if not isinstance(given, Iterable) or isinstance(given, (bytes, dict)):
        raise BadOption(
            f"calibration is a {type(given).__name__}; give a text's name, a file, strings, token ids or conversations"
        )
    columns = set(getattr(given, "column_names", None) or ())
    if columns and not (columns >= {"messages"} or columns >= {"instruction", "output"}):
        names = ", ".join(sorted(columns))
        raise BadOption(f"calibration is a whole data set; give one of its columns ({names}), as dataset['text']")
    column = getattr(given, "column_name", None)
    return _rows(tuple(given), f"a column {column!r}" if isinstance(column, str) else None)


def _named(name: str) -> Text:
    if is_file(name) or not name.startswith((CHAT, HUB)):
        return Text(name)
    if name.startswith(HUB):
        return _rows(_column(name), name)
    path = name.removeprefix(CHAT)
    if not is_file(path):
        raise UnknownText(f"there is no file {path} with conversations")
    if is_test_split(path):
        raise UnknownText(f"{path} is a test split; calibrate on other conversations")
    return Conversations(name, read_conversations(path))


def _rows(rows: tuple[Any, ...], name: str | None) -> Text:
    """Of strings, or of conversations."""
    if not rows:
        raise UnknownText(f"the calibration text is empty: {name or 'a list'} without anything in it")
    if all(isinstance(row, str) for row in rows):
        return Documents(name or _counted(rows, "string"), tuple(row for row in rows if row.strip()))
    odd = [(number, row) for number, row in enumerate(rows, 1) if not isinstance(row, (list, dict))]
    if odd:
        number, row = next((pair for pair in odd if not isinstance(pair[1], str)), odd[0])
        raise UnknownText(
            f"row {number} of the calibration text is a {type(row).__name__}; give strings alone, conversations alone, "
            "or token ids as a tensor"
        )
    found = tuple(conversation_of(row, f"row {number} of the calibration text") for number, row in enumerate(rows, 1))
    return Conversations(name or _counted(rows, "conversation"), found)


def _counted(rows: tuple[Any, ...], what: str) -> str:
    return f"{len(rows)} {what}{'s' if len(rows) > 1 else ''}"


def _tokens(given: torch.Tensor) -> Tokens:
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8)
    if given.dtype not in kinds:
        raise BadOption(f"calibration is a tensor of {given.dtype}; give token ids as int64")
    if given.dim() not in (1, 2) or not given.numel():
        raise BadOption(
            f"calibration is a tensor of the shape {tuple(given.shape)}; give ids (n,) or windows (n, tokens)"
        )
    if int(given.min()) < 0:
        raise BadOption(f"calibration has the token id {int(given.min())}; ids begin at 0, and windows have no padding")
    row = given.shape[1] if given.dim() == 2 else None
    if row == 1:
        raise BadOption("calibration has windows of one token; give longer ones, or ids (n,)")
    name = f"{given.numel()} token ids" if row is None else f"{len(given)} windows of {row} token ids"
    return Tokens(name, given.detach().to("cpu", torch.long, copy=True).flatten(), row=row)


def _column(name: str) -> tuple[Any, ...]:
    """The rows of hub:NAME:COLUMN, hub:NAME:SPLIT:COLUMN or hub:NAME:CONFIG:SPLIT:COLUMN."""
    parts = name.removeprefix(HUB).split(":")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise UnknownText(f"{name} names no column; give {HUB}NAME[[:CONFIG]:SPLIT]:COLUMN, where SPLIT is else train")
    configuration = parts[1] if len(parts) == 4 else None
    split, column = (parts[-2] if len(parts) > 2 else "train"), parts[-1]
    try:
        from datasets import load_dataset
    except ImportError:
        raise UnknownText(f"to read {name}, pip install datasets") from None
    try:
        rows = load_dataset(parts[0], configuration, split=split)
    except Exception as error:  # the hub's errors have no common class
        raise UnknownText(f"{name} cannot be read: {first_line(error)}") from error
    if column not in rows.column_names:
        raise UnknownText(f"{name} has no column {column!r}; there are: {', '.join(rows.column_names)}")
    return tuple(rows[column])
