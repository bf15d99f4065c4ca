"""The texts of a prune: what is scored, what is repaired on, and what the result is judged on, always apart."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.channels.settings import Settings
from kvprune.errors import BadOption, TextTooShort
from kvprune.models.tokenizer import check_ids
from kvprune.progress import Progress
from kvprune.text.corpus import SELF, is_file, local_file, read_text
from kvprune.text.sampled import sample_ids
from kvprune.text.windows import cut_windows, judged_windows, start_token, token_ids


@dataclass(frozen=True)
class Texts:
    """scored, repaired: batches of token ids (B, T); evaluated: (name, windows (n, T)) pairs."""

    scored: list[torch.Tensor]
    repaired: list[torch.Tensor]
    evaluated: list[tuple[str, torch.Tensor]]


def prepare(
    s: Settings,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibrate: bool,
    batch_tokens: int,
    progress: Progress,
) -> Texts:
    """Read, or sample, every text of a prune. calibrate: whether scores or repair need a text at all. batch_tokens: of
    a calibration batch, at most, but one window.

    Calibration is the valid split, the beginning of a file, or sampled. Windows longer than the model's context
    become that long. Raises UnknownText, TextTooShort, BadOption, TokenizerMismatch.
    """
    _check_apart(s)
    limit, start = lm.config.max_position_embeddings, start_token(tokenizer)
    own_end = not s.eval and (is_file(s.calibration) or s.calibration == SELF)
    wanted = max(s.calibration_tokens, s.repair_tokens if s.refits else 0) if calibrate else 0
    ids = _calibration_ids(s, lm, tokenizer, wanted, own_end, progress) if wanted or own_end else torch.empty(0)
    check_ids(ids, lm.config.vocab_size, f"the calibration text {s.calibration}")
    if own_end:
        ids, end = ids[: -s.eval_tokens], ids[-s.eval_tokens :]
        name = f"{s.calibration} (its end)" if is_file(s.calibration) else s.calibration
        evaluated = [(name, cut_windows(end, n, start)) for n in _lengths(s, limit)]
    else:
        evaluated = judged_windows(s.eval or (s.calibration,), tokenizer, _lengths(s, limit), s.eval_tokens)
    for name, pages in evaluated:
        check_ids(pages, lm.config.vocab_size, f"the evaluation text {name}")
    if not calibrate:
        return Texts([], [], evaluated)
    length = min(s.calibration_window, limit, s.calibration_tokens)
    if len(ids) < s.calibration_tokens // length * length:
        raise TextTooShort(
            f"the calibration text {s.calibration} has {len(ids)} tokens to calibrate on, but {s.calibration_tokens} "
            "are needed; give a longer text or ask for fewer"
        )
    size = max(batch_tokens // length, 1)
    scored = cut_windows(ids[: s.calibration_tokens], length, start)
    repaired = cut_windows(ids[: s.repair_tokens], length, start) if s.refits else ids[:0].view(0, length)
    if s.refits and len(repaired) < 2:
        raise TextTooShort(
            f"--repair {s.repair} holds out every eighth window of {length} tokens and needs at least two: ask for "
            "more --repair-tokens, give a longer text, or choose --repair rotate or none"
        )
    return Texts(list(scored.split(size)), list(repaired.split(size)) if len(repaired) else [], evaluated)


def _check_apart(s: Settings) -> None:
    """Raise BadOption for an evaluation text that is read for calibration too."""
    calibration = local_file(s.calibration, "valid")
    for name in s.eval:
        if is_file(name) and calibration is not None and calibration.samefile(name):
            raise BadOption(f"--eval {name} is the calibration text; leave --eval out, or name another text")


def _lengths(s: Settings, limit: int) -> list[int]:
    return sorted({min(window, limit, s.eval_tokens) for window in s.windows})


def _calibration_ids(
    s: Settings, lm: PreTrainedModel, tokenizer: Any, wanted: int, own_end: bool, progress: Progress
) -> torch.Tensor:
    """Ids (n,): `wanted` of them or what there is; where the end is to be judged on, that comes on top."""
    if s.calibration == SELF:
        total = wanted + (s.eval_tokens if own_end else 0)
        with progress.phase("sample", total) as advance:
            window = min(s.calibration_window, lm.config.max_position_embeddings)
            return sample_ids(lm, tokenizer, total, window, s.seed, advance)[:total]
    if not own_end:
        return token_ids(read_text(s.calibration, "valid"), tokenizer, wanted)
    ids = token_ids(read_text(s.calibration, "valid"), tokenizer)
    needed = s.calibration_tokens if wanted else 0
    if len(ids) < needed + s.eval_tokens:
        raise BadOption(
            f"{s.calibration} has {len(ids)} tokens, too few to calibrate on {needed} and to evaluate on "
            f"{s.eval_tokens} others; name another text with --eval"
        )
    return ids
