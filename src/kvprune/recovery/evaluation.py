"""Perplexities of a recovery: the texts, and the rows of the record."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.errors import BadOption
from kvprune.measure.perplexity import Perplexity, perplexity
from kvprune.recovery.data import Data, has_examples
from kvprune.recovery.settings import Settings
from kvprune.text.corpus import NAMES, is_file
from kvprune.text.given import Text, find_text
from kvprune.text.judged import judged_windows, same

Texts = list[tuple[str, torch.Tensor]]


def texts(
    settings: Settings,
    text: Text,
    judged: Sequence[Text],
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    held_out: Data,
) -> Texts:
    """(name, windows) of every evaluation; windows longer than the model's context become that long.

    text: that is trained on, held_out its end; judged: what --eval named. Without: the test split of a named text; else
    the named texts that the folder's record has; else, but for examples, the held-out end. Raises BadOption,
    UnknownText and TextTooShort.
    """
    s = settings
    for one in judged:
        if same(one, text):
            raise BadOption(f"--eval {one.name} is the text that is trained on; name another one")
    if not judged:
        known = dict.fromkeys(row["text"] for row in record.get("perplexity", []))
        names = [name for name in known if name in NAMES and not is_file(name)]
        judged = [find_text(name, "evaluation") for name in names] if text.judges else [*text.parts]
    lengths = sorted({min(window, limit, s.eval_tokens) for window in s.eval_windows})
    if judged:
        return judged_windows(judged, tokenizer, lengths, s.eval_tokens)
    if has_examples(text):
        raise BadOption(f"{s.text} has no text to evaluate on; name one with --eval")
    ids = text.uncut(held_out.ids, tokenizer)[-text.at_end(s.eval_tokens) :]
    lengths = sorted({min(n, len(ids), text.row or n) for n in lengths})
    return [(f"{s.text} (its held-out end)", text.cut(ids, n, tokenizer)) for n in lengths]


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
