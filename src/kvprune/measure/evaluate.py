"""`evaluate`: perplexity and tasks of one source, or of two on the very same tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvprune.errors import BadOption, NotFinite
from kvprune.measure import memory
from kvprune.measure.context import slides
from kvprune.measure.perplexity import perplexity
from kvprune.measure.tasks import load_tasks, run_tasks
from kvprune.models.source import Source, load_config, load_model, resolve
from kvprune.models.tokenizer import check_ids, one_tokenizer
from kvprune.progress import Progress
from kvprune.runtime.dtype import name_of
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import RECENT, decoding_pieces, quantized_cache, quantizer
from kvprune.text.judged import GivenTexts, find_texts, judged_windows
from kvprune.tokens.filter import TokenFilter, asked_filter

WINDOW = 2048  # tokens, where none is asked for and the models take so many


def evaluate(
    source: str | Path,
    against: str | Path | None = None,
    *,
    texts: GivenTexts | None = None,
    window_lengths: Sequence[int] | None = None,
    tokens: int = 16384,
    tasks: str | Sequence[str] = (),
    task_limit: int | None = None,
    kv_bits: int | None = None,
    keep: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity on the test split of each named text, or on what else was given, in windows of each length, and
    lm-eval's tasks.

    texts: one of the kinds that `prune` calibrates on, or a list of them (strings that are a text are a list in it);
    None is wikitext2, or none where tasks are asked for. window_lengths: None is 2048, or what
    the models take. tokens: how many of each text, 0 for all. tasks: names that lm-evaluation-harness knows or its
    .yaml files, also as "piqa,boolq"; task_limit: the first so many samples of each. kv_bits: 8, 4 or 2 for
    transformers' quantised cache in all perplexities; bytes per token then are those of the longest window but half of
    what stays unquantised, scales included. keep: under a TokenFilter(keep=keep) in all perplexities, read as decoding
    reads; bytes per token then are what is held at the end of the longest window, over its tokens.
    Returns {"sources": [{"source", "kv_bytes_per_token", "parameters", "weights_read_bytes" (by a step of decoding),
    "dtype", "kv_bits", "keep", "kv_share" (of the bytes without `keep`: more than that where layers have a sliding
    window, which are left alone)}], "perplexity": [{"text", "window", "tokens", "values"}], "tasks": [{"task",
    "metric", "samples", "values", "stderr"}]} with one value per source, and "errors": a line for every perplexity and
    for all tasks of a source that are None, since the model's loss was not finite or memory ran out. Raises BadOption,
    also when two sources tokenise differently: their figures could not be compared.
    """
    progress = progress or Progress()
    if tokens and tokens < 2:
        raise BadOption(f"--tokens {tokens} is too few: give at least 2, or 0 for the whole text")
    if task_limit is not None and task_limit < 2:
        raise BadOption(f"--task-limit {task_limit} is too few: give at least 2, for a standard error")
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    if texts is None:
        texts = () if names else ("wikitext2",)
    if kv_bits is not None:
        if names:
            raise BadOption("--kv-bits is for perplexity: tasks are answered without a cache; leave one of them out")
        quantizer(kv_bits)
    token_filter = asked_filter(keep=keep)
    if keep is not None and names:
        raise BadOption("--keep is for perplexity: tasks are answered without a cache; leave one of them out")
    sources = [resolve(s, revision, trust_remote_code) for s in (source, against) if s is not None]
    lengths = _lengths(window_lengths, sources, tokens, kv_bits)
    judged = find_texts(texts)
    tokenizer = one_tokenizer(sources)
    cut = judged_windows(judged, tokenizer, lengths, tokens or None)
    least = min(load_config(one).vocab_size for one in sources)
    for text, pages in cut:
        check_ids(pages, least, f"the text {text}")
    loaded = []
    if names:
        with progress.phase("load tasks"):
            loaded = load_tasks(names)
    rows: list[dict[str, Any]] = [
        {"text": text, "window": pages.shape[1], "tokens": 0, "values": []} for text, pages in cut
    ]
    scores: list[list[dict[str, Any]] | None] = []
    costs: list[dict[str, Any]] = []
    errors: list[str] = []
    for index, one in enumerate(sources):
        with progress.phase(f"load {index + 1}"):
            model = load_model(one, device, dtype)
        with progress.phase(f"evaluate {index + 1}", sum(len(ids) for _, ids in cut)) as advance:
            for row, (_, ids) in zip(rows, cut, strict=True):
                row["values"].append(None)
                with _noted(errors, f"{one.name}, {row['text']}, window {row['window']}"):
                    with nullcontext() if token_filter is None else token_filter(model):
                        result = perplexity(model, ids, advance, kv_bits)
                    row["tokens"], row["values"][-1] = result.tokens, result.value
        if loaded:
            scores.append(None)
            phase = partial(progress.phase, f"tasks {index + 1}")
            with _noted(errors, f"{one.name}, {', '.join(names)}"):
                scores[-1] = run_tasks(model, tokenizer, loaded, task_limit, phase)
        per_token = bytes_per_token(model, kv_bits, max(lengths), token_filter)
        costs.append(
            {
                "source": one.name,
                "kv_bytes_per_token": per_token,
                "parameters": memory.parameters(model),
                "weights_read_bytes": memory.weights_read_bytes(model),
                "dtype": name_of(model.dtype),
                "kv_bits": kv_bits,
                "keep": keep,
                "kv_share": None if keep is None else _share(model, keep, per_token, max(lengths)),
            }
        )
        del model
    return {"sources": costs, "perplexity": rows, "tasks": _side_by_side(scores), "errors": errors}


def _lengths(asked: Sequence[int] | None, sources: list[Source], tokens: int, kv_bits: int | None) -> list[int]:
    """Window lengths that every source takes. Raises BadOption."""
    limits = {source.name: load_config(source).max_position_embeddings for source in sources}
    least = min(limits, key=lambda name: limits[name])
    lengths = sorted(set((min(WINDOW, limits[least]),) if asked is None else asked))
    if min(lengths, default=0) < 2:
        raise BadOption("a window must have at least 2 tokens")
    if lengths[-1] > limits[least]:
        raise BadOption(f"--window {lengths[-1]} is more than the {limits[least]} tokens that {least} takes")
    lengths = sorted({min(n, tokens or n) for n in lengths})
    if kv_bits is not None and lengths[0] <= RECENT:
        raise BadOption(
            f"--kv-bits: windows of up to {RECENT} tokens are read before any is quantised; give longer ones"
        )
    return lengths


@contextmanager
def _noted(errors: list[str], what: str) -> Iterator[None]:
    """A loss that is not finite, or too little memory, ends what is inside and becomes a line of `errors`."""
    try:
        yield
        return
    except (NotFinite, RuntimeError, MemoryError) as error:
        if not (isinstance(error, NotFinite) or memory.is_out_of_memory(error)):
            raise
        errors.append(f"{what}: {error if isinstance(error, NotFinite) else 'out of memory'}")
    memory.release()  # not before the error, which holds on to the tensors, is gone


def _side_by_side(scores: list[list[dict[str, Any]] | None]) -> list[dict[str, Any]]:
    """A source's rows from `run_tasks` each, or None -> a row a task and metric."""
    known = [rows for rows in scores if rows is not None]
    found: list[dict[str, Any]] = []
    for number, one in enumerate(known[0] if known else []):
        same = [{} if rows is None else rows[number] for rows in scores]
        shared = {key: one[key] for key in ("task", "metric", "samples")}
        found.append({**shared, "values": [s.get("value") for s in same], "stderr": [s.get("stderr") for s in same]})
    return found


@torch.no_grad()
def _share(model: PreTrainedModel, keep: float, per_token: int, window: int) -> float:
    """Of the KV bytes of `window` tokens, what is left with `keep`."""
    if not slides(model.config):
        return keep
    cache, ids = DynamicCache(config=model.config), torch.zeros(1, window, dtype=torch.long, device=model.device)
    model(ids, logits_to_keep=1, **{CACHE: cache})
    return per_token * window / memory.cache_bytes(cache)


@torch.no_grad()
def bytes_per_token(
    model: PreTrainedModel, kv_bits: int | None = None, window: int = 2, token_filter: TokenFilter | None = None
) -> int:
    """Bytes that a token leaves in the model's cache, measured on a real one of two tokens; on a quantised one on as
    many of `window` as leave it half of the tokens that it keeps unquantised at most, its mean in decoding; under a
    filter on all of `window`."""
    if token_filter is not None:
        ids = torch.zeros(1, window, dtype=torch.long, device=model.device)
        cache = DynamicCache(config=model.config) if kv_bits is None else quantized_cache(model.config, kv_bits)
        with token_filter(model):
            model(ids, logits_to_keep=1, **{CACHE: cache})
            return round(token_filter.report["kv_bytes"] / window)
    if kv_bits is None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        return memory.cache_bytes(model(ids, use_cache=True)[CACHE]) // 2
    cache = quantized_cache(model.config, kv_bits)
    tokens = max(window - RECENT // 2, 2)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    for piece in ids.split(decoding_pieces(kv_bits, tokens), dim=1):
        model(piece, logits_to_keep=1, **{CACHE: cache})
    return round(memory.cache_bytes(cache) / tokens)
