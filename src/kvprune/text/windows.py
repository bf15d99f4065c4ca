"""Text -> windows of token ids."""

import hashlib
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import TextTooShort, UnknownText

_FIRST_GUESS = 6  # characters per token, to begin with
_LONG_LINE = 1 << 16  # characters: how far to look for the end of a line
_MARGIN = 256  # characters: how far the choice of a token is taken to reach


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int | None = None) -> torch.Tensor:
    """The ids (n,) of the text, or of as much of its beginning as makes `tokens` of them, without a start token.

    Only as many characters are tokenised as are needed, cut at the end of a line: a whole corpus
    would cost more memory than the model. Where no line ends, the cut is anywhere, and of the ids behind it only those
    are taken that _MARGIN more characters leave as they are.
    """
    if not text.strip():
        raise UnknownText("the text is empty")
    length = len(text) if tokens is None else min(len(text), tokens * _FIRST_GUESS)
    while True:
        end = length if length >= len(text) else text.find("\n", length, length + _LONG_LINE) + 1
        if not end and length + _LONG_LINE >= len(text):
            end = len(text)
        ids = _ids(text[:end], tokenizer) if end else _sure_ids(text, length, tokenizer)
        if tokens is None or len(ids) >= tokens or end >= len(text):
            return torch.tensor(ids[:tokens], dtype=torch.long)
        length = min((end or length) * 2, len(text))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return ids[1:] if start_token(tokenizer) is not None else ids


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What the tokenizer puts before every text, if it does: some models are another model without it."""
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        return None
    ids = tokenizer("a", return_attention_mask=False)["input_ids"]
    return start if ids[:1] == [start] and len(ids) > 1 else None


def _sure_ids(text: str, length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those ids of the first `length` characters that are the same with _MARGIN more of them."""
    short, long = _ids(text[:length], tokenizer), _ids(text[: length + _MARGIN], tokenizer)
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))
    return short[:same]


def started(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Ids (n,) behind the start token, if there is one."""
    start = start_token(tokenizer)
    return ids if start is None else torch.cat((ids.new_tensor([start]), ids))


def windows(
    text: str, tokenizer: PreTrainedTokenizerBase, window: int, tokens: int | None = None, what: str = "the text"
) -> torch.Tensor:
    """Consecutive windows (n, window) of ids, none padded; an incomplete last one is left out. Each begins with the
    start token where the tokenizer puts one before a text.

    `tokens` is how many ids are wanted, start tokens among them (rounded down to whole windows, at least one); None
    takes the whole text.
    Raises TextTooShort when the text has fewer.
    """
    start = start_token(tokenizer)
    own = window - (start is not None)  # of the text, in a window
    wanted = own if tokens is None else max(tokens // window, 1) * own
    ids = token_ids(text, tokenizer, None if tokens is None else wanted)
    if len(ids) < wanted:
        raise TextTooShort(
            f"{what} has {len(ids)} tokens, but {wanted} are needed; give a longer text or ask for fewer"
        )
    return cut_windows(ids, window, start)


def cut_windows(ids: torch.Tensor, window: int, start: int | None = None) -> torch.Tensor:
    """Ids (n,) as whole windows (count, window), each behind `start` if there is one."""
    own = window - (start is not None)
    count = len(ids) // own
    found = ids[: count * own].view(count, own)
    return found if start is None else torch.cat((torch.full_like(found[:, :1], start), found), 1)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of token ids, to tell texts apart."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
