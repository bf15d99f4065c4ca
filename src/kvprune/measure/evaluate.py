"""`evaluate`: perplexity and tasks of one source, or of two on the very same tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprune.errors import BadOption
from kvprune.measure import memory
from kvprune.measure.perplexity import perplexity
from kvprune.measure.tasks import load_tasks, run_tasks
from kvprune.models.source import load_model, one_tokenizer, resolve
from kvprune.progress import Progress
from kvprune.runtime.quantized import RECENT, decoding_pieces, quantized_cache, quantizer
from kvprune.text.corpus import read_text
from kvprune.text.windows import windows


def evaluate(
    source: str | Path,
    against: str | Path | None = None,
    *,
    texts: Sequence[str] | None = None,
    window_lengths: Sequence[int] = (2048,),
    tokens: int = 16384,
    tasks: str | Sequence[str] = (),
    task_limit: int | None = None,
    kv_bits: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity on the test split of each text (or on a file), in windows of each length, and lm-eval's tasks.

    texts: names or files; None is wikitext2, or none where tasks are asked for. A window longer than the model's
    context becomes that long. tokens: how many of each text, 0 for all. tasks: names that lm-evaluation-harness knows
    or its .yaml files, also as "piqa,boolq"; task_limit: the first so many samples of each. kv_bits: 8, 4 or 2 for
    transformers' quantised cache in all perplexities (tasks read no cache); bytes per token then are those of the
    longest window but half of what stays unquantised, scales included. Returns {"sources": [{"source",
    "kv_bytes_per_token", "parameters", "dtype", "kv_bits"}], "perplexity": [{"text", "window", "tokens", "values"}],
    "tasks": [{"task", "metric", "samples", "values", "stderr"}]} with one value per source. Raises BadOption, also
    when two sources tokenise differently: their figures could not be compared.
    """
    progress = progress or Progress()
    if min(window_lengths, default=0) < 2:
        raise BadOption("a window must have at least 2 tokens")
    if tokens and tokens < 2:
        raise BadOption(f"--tokens {tokens} is too few: give at least 2, or 0 for the whole text")
    if task_limit is not None and task_limit < 2:
        raise BadOption(f"--task-limit {task_limit} is too few: give at least 2, for a standard error")
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    if texts is None:
        texts = () if names else ("wikitext2",)
    if kv_bits is not None:
        quantizer(kv_bits)
    sources = [resolve(s, revision, trust_remote_code) for s in (source, against) if s is not None]
    tokenizer = one_tokenizer(sources)
    contents = {name: read_text(name, "test") for name in texts}
    loaded = load_tasks(names) if names else []
    rows: list[dict[str, Any]] = []
    scores: list[list[dict[str, Any]]] = []
    costs = []
    for index, one in enumerate(sources):
        with progress.phase(f"load {index + 1}"):
            model = load_model(one, device, dtype)
        if index == 0:
            limit = model.config.max_position_embeddings
            lengths = sorted({min(n, limit, tokens or limit) for n in window_lengths})
            cut = {(t, n): windows(contents[t], tokenizer, n, tokens or None, t) for t in texts for n in lengths}
            rows = [{"text": t, "window": n, "tokens": 0, "values": []} for t, n in cut]
        with progress.phase(f"evaluate {index + 1}", sum(len(ids) for ids in cut.values())) as advance:
            for row, ids in zip(rows, cut.values(), strict=True):
                result = perplexity(model, ids, advance, kv_bits)
                row["tokens"] = result.tokens
                row["values"].append(result.value)
        if loaded:
            scores.append(run_tasks(model, tokenizer, loaded, task_limit))
        costs.append(
            {
                "source": one.name,
                "kv_bytes_per_token": bytes_per_token(model, kv_bits, max(lengths)),
                "parameters": memory.parameters(model),
                "dtype": str(model.dtype).removeprefix("torch."),
                "kv_bits": kv_bits,
            }
        )
        del model
    return {"sources": costs, "perplexity": rows, "tasks": _side_by_side(scores)}


def _side_by_side(scores: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A source's rows from `run_tasks` each -> a row a task and metric."""
    rows = []
    for same in zip(*scores, strict=True):
        shared = {key: same[0][key] for key in ("task", "metric", "samples")}
        rows.append({**shared, "values": [row["value"] for row in same], "stderr": [row["stderr"] for row in same]})
    return rows


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel, kv_bits: int | None = None, window: int = 2) -> int:
    """Bytes that a token leaves in the model's cache, measured on a real one of two tokens; on a quantised one on as
    many of `window` as leave it half of the tokens that it keeps unquantised at most, its mean in decoding."""
    if kv_bits is None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        return memory.cache_bytes(model(ids, use_cache=True).past_key_values) // 2
    cache = quantized_cache(model.config, kv_bits)
    tokens = max(window - RECENT // 2, 2)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    for piece in ids.split(decoding_pieces(kv_bits, tokens), dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return round(memory.cache_bytes(cache) / tokens)
