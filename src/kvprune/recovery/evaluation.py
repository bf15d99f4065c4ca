"""Perplexities of a recovery: the texts, and the rows of the record."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.errors import BadOption
from kvprune.measure.perplexity import Perplexity, perplexity
from kvprune.recovery import alpaca
from kvprune.recovery.data import Data
from kvprune.recovery.settings import Settings
from kvprune.text.corpus import NAMES, SELF, is_file, local_file
from kvprune.text.windows import cut_windows, judged_windows, start_token

Texts = list[tuple[str, torch.Tensor]]


def texts(
    settings: Settings, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int, held_out: Data
) -> Texts:
    """(name, windows) of every evaluation; windows longer than the model's context become that long.

    Without --eval: the test split of a named text; with a file, or sampled text, the named texts that the folder's
    record has; with a plain or sampled text and no such names, its held-out end. Raises BadOption, UnknownText and
    TextTooShort.
    """
    s = settings
    trained = None if s.text == SELF else local_file(s.text, "valid")
    for name in s.eval:
        if trained is not None and is_file(name) and trained.samefile(name):
            raise BadOption(f"--eval {name} is the text that is trained on; name another one")
    names = list(s.eval)
    if not names:
        known = dict.fromkeys(row["text"] for row in record.get("perplexity", []))
        named = not is_file(s.text) and s.text != SELF
        names = [s.text] if named else [name for name in known if name in NAMES and not is_file(name)]
    lengths = sorted({min(window, limit, s.eval_tokens) for window in s.eval_windows})
    if names:
        return judged_windows(names, tokenizer, lengths, s.eval_tokens)
    if alpaca.is_named_so(s.text):
        raise BadOption(f"{s.text} has no text to evaluate on; name one with --eval")
    start = start_token(tokenizer)
    ids = (held_out.ids if start is None else held_out.ids[:, 1:]).flatten()[-s.eval_tokens :]
    lengths = sorted({min(n, len(ids)) for n in lengths})
    return [(f"{s.text} (its held-out end)", cut_windows(ids, n, start)) for n in lengths]


def perplexities(lm: PreTrainedModel, texts: Texts, advance: Callable[..., None]) -> list[Perplexity]:
    """One for each text."""
    return [perplexity(lm, ids, advance) for _, ids in texts]


def rows(
    texts: Texts, before: list[Perplexity], dense: list[Perplexity] | None, record: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the record without "pruned". The dense figure is the teacher's where there is one, else the one that the
    folder's record has for the same text, window and tokens, else None."""
    known = {(r["text"], r["window"], r["tokens"]): r["dense"] for r in record.get("perplexity", [])}
    found = []
    for i, ((name, _), b) in enumerate(zip(texts, before, strict=True)):
        value = known.get((name, b.window, b.tokens)) if dense is None else dense[i].value
        found.append({"text": name, "window": b.window, "tokens": b.tokens, "dense": value, "before": b.value})
    return found
