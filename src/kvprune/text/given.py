"""What a user gives to calibrate, train or judge on -> token ids: a text's name, a file, strings, a column, token ids,
conversations.

Every text is one stream of ids that is cut to windows; what its kinds differ in is where the ids come from, and what a
window begins with.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import BadOption, TextTooShort, UnknownText
from kvprune.models.check import first_line
from kvprune.text.conversations import Conversation, conversation_of, cut_conversations, read_conversations, stream
from kvprune.text.corpus import SELF, Split, check_known, is_file, is_test_split, read_text
from kvprune.text.windows import cut_windows, start_token, token_ids

CHAT, HUB, MIX = "chat:", "hub:", "mix:"
PIECE = 1024  # tokens of each text of several, in turn
BETWEEN = "\n\n"  # documents
_LONGEST_NAME = 1000  # characters
Use = Literal["calibration", "recovery", "evaluation"]


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
    def parts(self) -> tuple["Text", ...]:
        """The texts that it is made of: itself, unless it is several."""
        return (self,)

    @property
    def content(self) -> bytes | None:
        """What it says, where that was given and not a name to read it by."""
        return None

    @property
    def known_as(self) -> str:
        """A name that only this text has: where it was not given by a name, with the beginning of a fingerprint."""
        if self.content is None or self.name.startswith((CHAT, HUB)):
            return self.name
        return f"{self.name}, sha256 {hashlib.sha256(self.content).hexdigest()[:8]}"

    @property
    def file(self) -> str | None:
        """What is read, where that is a file."""
        return self.name

    def read(self, split: Split = "valid") -> str:
        """Its characters. split: of a named text. Raises UnknownText."""
        return read_text(self.name, split)

    def ids(self, tokenizer: Any, tokens: int | None = None, split: Split = "valid") -> torch.Tensor:
        """All ids (n,), or at least the first `tokens` of them. split: of a named text. Raises UnknownText or
        BadOption."""
        return token_ids(self.read(split), tokenizer, tokens)

    def cut(self, ids: torch.Tensor, window: int, tokenizer: Any) -> torch.Tensor:
        """Ids (n,) of this text as whole windows (count, window)."""
        return cut_windows(ids, window, start_token(tokenizer))

    def uncut(self, rows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
        """The ids (n,) of windows (count, window), without what each begins with."""
        return (rows if start_token(tokenizer) is None else rows[:, 1:]).flatten()

    def windows(
        self, tokenizer: Any, window: int, tokens: int | None = None, *, split: Split = "valid", what: str = "text"
    ) -> torch.Tensor:
        """The first windows (count, window) with `tokens` ids, rounded down to whole ones, at least one; None: all.

        Raises TextTooShort where there are fewer, and what `ids` raises. what: it is, for the message.
        """
        count = None if tokens is None else max(tokens // window, 1)
        ids = self.ids(tokenizer, None if count is None else count * window, split)
        rows = self.cut(ids, window, tokenizer)[:count]
        if len(rows) < (count or 1):
            raise TextTooShort(
                f"the {what} {self.name} has {len(ids)} tokens, but {(count or 1) * window} are needed; give a longer "
                "text or ask for fewer"
            )
        return rows

    def check_fits(self, limit: int) -> None:
        """Raise BadOption for windows that were given and are longer than the model's context."""
        if self.row is not None and self.row > limit:
            raise BadOption(f"{self.name}: the model takes windows of {limit} tokens; give shorter ones")

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

    @property
    def content(self) -> bytes:
        return json.dumps(self.documents).encode()

    def read(self, split: Split = "valid") -> str:
        return BETWEEN.join(self.documents)


@dataclass(frozen=True)
class Conversations(Text):
    """Conversations, one after the other as the chat template has them."""

    conversations: tuple[Conversation, ...] = field(repr=False)
    judges = True

    @property
    def content(self) -> bytes:
        return json.dumps(self.conversations, default=str).encode()

    @property
    def file(self) -> str | None:
        return self.name.removeprefix(CHAT) if self.name.startswith(CHAT) else None

    def ids(
        self, tokenizer: PreTrainedTokenizerBase, tokens: int | None = None, split: Split = "valid"
    ) -> torch.Tensor:
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

    @property
    def content(self) -> bytes:
        return self.given.numpy().tobytes()

    def ids(self, tokenizer: Any, tokens: int | None = None, split: Split = "valid") -> torch.Tensor:
        return self.given

    def cut(self, ids: torch.Tensor, window: int, tokenizer: Any) -> torch.Tensor:
        if self.row is None:
            return cut_windows(ids, window)
        rows = ids[: len(ids) // self.row * self.row].view(-1, self.row)
        return rows[:, : self.row // window * window].reshape(-1, window)

    def uncut(self, rows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
        return rows.flatten()


@dataclass(frozen=True)
class Mixed(Text):
    """Several texts, PIECE tokens of each in turn; where one ends the others go on."""

    of: tuple[Text, ...] = field(repr=False)
    file = None

    @property
    def parts(self) -> tuple[Text, ...]:
        return self.of

    @property
    def judges(self) -> bool:
        return any(part.judges for part in self.of)

    def ids(self, tokenizer: Any, tokens: int | None = None, split: Split = "valid") -> torch.Tensor:
        turns = zip_longest(*(part.ids(tokenizer, tokens, split).split(PIECE) for part in self.of))
        return torch.cat([piece for turn in turns for piece in turn if piece is not None])[:tokens]

    def read(self, split: Split = "valid") -> str:
        raise BadOption(f"{self.name} is several texts; name them one by one here")


GivenText = Text | str | Path | torch.Tensor | Iterable[str] | Iterable[Conversation]


def find_text(given: Any, use: Use = "calibration") -> Text:
    """What `given` is; a Text as it is. Raises UnknownText, for what is named as a test split too, but to evaluate on;
    or BadOption."""
    what = f"the {use} text"
    if isinstance(given, Text):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _named(str(given), use)
    if isinstance(given, torch.Tensor):
        return _tokens(given, what)
    if not isinstance(given, Iterable) or isinstance(given, (bytes, dict)):
        raise BadOption(
            f"{what} is a {type(given).__name__}; give a text's name, a file, strings, token ids or conversations"
        )
    columns = set(getattr(given, "column_names", None) or ())
    if columns and not (columns >= {"messages"} or columns >= {"instruction", "output"}):
        names = ", ".join(sorted(columns))
        raise BadOption(f"{what} is a whole data set; give one of its columns ({names}), as dataset['text']")
    column = getattr(given, "column_name", None)
    return _rows(tuple(given), f"a column {column!r}" if isinstance(column, str) else None, what)


def _named(name: str, use: Use) -> Text:
    if len(name) > _LONGEST_NAME or "\n" in name:
        raise BadOption(
            f"the {use} text {name[:20]!r}... is a string, which is a text's name or a file; give text itself as a "
            "list of strings"
        )
    if name.startswith(MIX) and not is_file(name):
        return _mixed(name, use)
    if name.startswith(HUB) and not is_file(name):
        return _rows(_column(name), name, f"the {use} text")
    chat = name.startswith(CHAT) and not is_file(name)
    path = name.removeprefix(CHAT) if chat else name
    if chat and not is_file(path):
        raise UnknownText(f"there is no file {path} with conversations")
    if use != "evaluation" and is_file(path) and is_test_split(path):
        raise UnknownText(f"{path} is a test split; calibrate and train on another text, keep this one for --eval")
    if not chat:
        check_known(name)
    return Conversations(name, read_conversations(path)) if chat else Text(name)


def _mixed(name: str, use: Use) -> Mixed:
    names = name.removeprefix(MIX).split(",")
    if len(set(names)) < 2 or len(set(names)) < len(names) or not all(names):
        raise UnknownText(f"{name} names no two different texts; give {MIX}A,B, as {MIX}wikitext2,ptb")
    for part in names:
        if part == SELF or part.startswith(MIX):
            raise UnknownText(f"{name}: {part!r} cannot be mixed with others; give named texts, files or columns")
    return Mixed(name, of=tuple(_named(part, use) for part in names))


def _rows(rows: tuple[Any, ...], name: str | None, what: str) -> Text:
    """Of strings, or of conversations."""
    if not rows:
        raise UnknownText(f"{what} is empty: {name or 'a list'} without anything in it")
    if all(isinstance(row, str) for row in rows):
        return Documents(name or _counted(rows, "string"), tuple(row for row in rows if row.strip()))
    odd = [(number, row) for number, row in enumerate(rows, 1) if not isinstance(row, (list, dict))]
    if odd:
        number, row = next((pair for pair in odd if not isinstance(pair[1], str)), odd[0])
        raise UnknownText(
            f"row {number} of {what} is a {type(row).__name__}; give strings alone, conversations alone, "
            "or token ids as a tensor"
        )
    found = tuple(conversation_of(row, f"row {number} of {what}") for number, row in enumerate(rows, 1))
    return Conversations(name or _counted(rows, "conversation"), found)


def _counted(rows: tuple[Any, ...], what: str) -> str:
    return f"{len(rows)} {what}{'s' if len(rows) > 1 else ''}"


def _tokens(given: torch.Tensor, what: str) -> Tokens:
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8)
    if given.dtype not in kinds:
        raise BadOption(f"{what} is a tensor of {given.dtype}; give token ids as int64")
    if given.dim() not in (1, 2) or not given.numel():
        raise BadOption(f"{what} is a tensor of the shape {tuple(given.shape)}; give ids (n,) or windows (n, tokens)")
    if int(given.min()) < 0:
        raise BadOption(f"{what} has the token id {int(given.min())}; ids begin at 0, and windows have no padding")
    row = given.shape[1] if given.dim() == 2 else None
    if row == 1:
        raise BadOption(f"{what} has windows of one token; give longer ones, or ids (n,)")
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
