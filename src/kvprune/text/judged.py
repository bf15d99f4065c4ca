"""What a user gives to judge a model on, or to compare: one text or several, of every kind that calibration takes."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import BadOption
from kvprune.text.corpus import local_file
from kvprune.text.given import GivenText, Text, Use, find_text

GivenTexts = GivenText | Sequence[GivenText]


def find_texts(given: Any, use: Use = "evaluation") -> tuple[Text, ...]:
    """One text, or those of a list, in which a string is a name or a file: strings that are a text are a list in it.

    Raises UnknownText or BadOption.
    """
    is_column = isinstance(getattr(given, "column_name", None), str)
    if isinstance(given, (Text, str, os.PathLike, torch.Tensor)) or is_column or not isinstance(given, Iterable):
        given = (given,)
    found = {}
    for one in given:
        if isinstance(one, dict):
            raise BadOption(f"the {use} text is a list of conversations; give it in a list, as one text of several")
        text = find_text(one, use)
        found[text.known_as] = text
    return tuple(found.values())


def judged_windows(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None, lengths: Sequence[int], tokens: int | None
) -> list[tuple[str, torch.Tensor]]:
    """(name, windows (n, length)) of every text at every length: of a named one the test split. tokens: how many, None
    for all. Windows that were given are cut to shorter ones, not joined. Raises UnknownText, TextTooShort."""
    found = []
    for text in texts:
        for length in sorted({min(length, text.row or length) for length in lengths}):
            pages = text.windows(tokenizer, length, tokens, split="test", what="evaluation text")
            found.append((text.known_as, pages))
    return found


def same(judged: Text, read: Text) -> bool:
    """Whether a text to judge on is, or is part of, the one that is calibrated or trained on."""
    if len(read.parts) > 1:
        return any(same(part, other) for part in judged.parts for other in read.parts)
    if judged.content is not None and judged.content == read.content:
        return True
    mine = None if judged.file is None else local_file(judged.file, "test")
    theirs = None if read.file is None else local_file(read.file, "valid")
    return mine is not None and theirs is not None and mine.samefile(theirs)
