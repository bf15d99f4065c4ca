"""Text -> windows of token ids."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import TextTooShort, UnknownText
from kvprune.text.corpus import read_text

_FIRST_GUESS = 6  # characters per token, to begin with


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int | None = None) -> torch.Tensor:
    """The ids (n,) of the text, or of as much of its beginning as makes `tokens` of them.

    Only as many characters are tokenised as are needed, cut at the end of a line: a whole corpus
    would cost more memory than the model.
    """
    if not text.strip():
        raise UnknownText("the text is empty")
    length = len(text) if tokens is None else min(len(text), tokens * _FIRST_GUESS)
    while True:
        end = length if length >= len(text) else text.find("\n", length) + 1 or len(text)
        ids = tokenizer(text[:end], return_attention_mask=False, verbose=False)["input_ids"]
        if tokens is None or len(ids) >= tokens or end >= len(text):
            return torch.tensor(ids[:tokens], dtype=torch.long)
        length = end * 2


def windows(
    text: str, tokenizer: PreTrainedTokenizerBase, window: int, tokens: int | None = None, what: str = "the text"
) -> torch.Tensor:
    """Consecutive windows (n, window) of ids, none padded; an incomplete last one is left out.

    `tokens` is how many ids are wanted (rounded down to whole windows, at least one); None takes the whole text.
    Raises TextTooShort when the text has fewer.
    """
    wanted = window if tokens is None else max(tokens // window, 1) * window
    ids = token_ids(text, tokenizer, None if tokens is None else wanted)
    if len(ids) < wanted:
        raise TextTooShort(
            f"{what} has {len(ids)} tokens, but {wanted} are needed; give a longer text or ask for fewer"
        )
    return cut_windows(ids, window)


def cut_windows(ids: torch.Tensor, window: int) -> torch.Tensor:
    """Ids (n,) as whole windows (n // window, window)."""
    count = len(ids) // window
    return ids[: count * window].view(count, window)


def judged_windows(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], tokens: int
) -> list[tuple[str, torch.Tensor]]:
    """(name, windows (n, length)) of every text's test split at every length. Raises UnknownText, TextTooShort."""
    texts = {name: read_text(name, "test") for name in names}
    return [
        (name, windows(texts[name], tokenizer, length, tokens, f"the evaluation text {name}"))
        for name in names
        for length in lengths
    ]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of token ids, to tell texts apart."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
