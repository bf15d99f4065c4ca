"""The texts of a prune: what is scored, what is repaired on, and what the result is judged on, always apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.channels.settings import Settings
from kvprune.errors import BadOption, TextTooShort
from kvprune.models.tokenizer import check_ids
from kvprune.progress import Progress
from kvprune.text.corpus import SELF
from kvprune.text.given import Text
from kvprune.text.judged import judged_windows, same
from kvprune.text.sampled import sample_ids


@dataclass(frozen=True)
class Texts:
    """scored, repaired: batches of token ids (B, T); evaluated: (name, windows (n, T)) pairs."""

    scored: list[torch.Tensor]
    repaired: list[torch.Tensor]
    evaluated: list[tuple[str, torch.Tensor]]


def prepare(
    s: Settings,
    text: Text,
    judged: Sequence[Text],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibrate: bool,
    batch_tokens: int,
    progress: Progress,
) -> Texts:
    """Read, or sample, every text of a prune. text: to calibrate on; judged: to judge on, none: what `text` has for
    that; calibrate: whether scores or repair need a text at all. batch_tokens: of a calibration batch, at most, but one
    window.

    Calibration is the valid split, the beginning of what was given, or sampled. Windows longer than the model's context
    become that long. Raises UnknownText, TextTooShort, BadOption, TokenizerMismatch.
    """
    for one in judged:
        if same(one, text):
            raise BadOption(f"--eval {one.name} is the calibration text; leave --eval out, or name another text")
    limit = lm.config.max_position_embeddings
    text.check_fits(limit)
    own_end = not judged and text.judges
    wanted = max(s.calibration_tokens, s.repair_tokens if s.refits else 0) if calibrate else 0
    ids = _calibration_ids(s, text, lm, tokenizer, wanted, own_end, progress) if wanted or own_end else torch.empty(0)
    check_ids(ids, lm.config.vocab_size, f"the calibration text {s.calibration}")
    lengths = _lengths(s, text.row or limit if own_end else limit)
    if own_end:
        count = text.at_end(s.eval_tokens)
        ids, end = ids[:-count], ids[-count:]
        name = s.calibration if s.calibration == SELF else f"{s.calibration} (its end)"
        evaluated = [(name, text.cut(end, n, tokenizer)) for n in lengths]
    else:
        evaluated = judged_windows(judged or text.parts, tokenizer, lengths, s.eval_tokens)
    for name, pages in evaluated:
        check_ids(pages, lm.config.vocab_size, f"the evaluation text {name}")
    if not calibrate:
        return Texts([], [], evaluated)
    length = text.row or min(s.calibration_window, limit, s.calibration_tokens)
    if len(ids) < max(s.calibration_tokens // length, 1) * length:
        raise TextTooShort(
            f"the calibration text {s.calibration} has {len(ids)} tokens to calibrate on, but {s.calibration_tokens} "
            "are needed; give a longer text or ask for fewer"
        )
    size = max(batch_tokens // length, 1)
    scored = text.cut(ids[: text.whole(s.calibration_tokens)], length, tokenizer)
    repaired = text.cut(ids[: text.whole(s.repair_tokens)], length, tokenizer) if s.refits else scored[:0]
    if s.refits and len(repaired) < 2:
        raise TextTooShort(
            f"--repair {s.repair} holds out every eighth window of {length} tokens and needs at least two: ask for "
            "more --repair-tokens, give a longer text, or choose --repair rotate or none"
        )
    return Texts(list(scored.split(size)), list(repaired.split(size)) if len(repaired) else [], evaluated)


def _lengths(s: Settings, limit: int) -> list[int]:
    return sorted({min(window, limit, s.eval_tokens) for window in s.windows})


def _calibration_ids(
    s: Settings, text: Text, lm: PreTrainedModel, tokenizer: Any, wanted: int, own_end: bool, progress: Progress
) -> torch.Tensor:
    """Ids (n,): `wanted` of them or what there is; where the end is to be judged on, that comes on top."""
    if s.calibration == SELF:
        total = wanted + (s.eval_tokens if own_end else 0)
        with progress.phase("sample", total) as advance:
            window = min(s.calibration_window, lm.config.max_position_embeddings)
            return sample_ids(lm, tokenizer, total, window, s.seed, advance)[:total]
    if not own_end:
        return text.ids(tokenizer, text.whole(wanted))
    ids = text.ids(tokenizer)
    needed = text.whole(s.calibration_tokens) if wanted else 0
    if len(ids) < needed + text.at_end(s.eval_tokens):
        raise BadOption(
            f"{s.calibration} has {len(ids)} tokens, too few to calibrate on {needed} and to evaluate on "
            f"{s.eval_tokens} others; give a longer text, or name another one with --eval"
        )
    return ids
