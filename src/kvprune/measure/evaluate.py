"""`evaluate`: perplexity of one source, or of two on the very same tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprune.errors import BadOption
from kvprune.measure import memory
from kvprune.measure.perplexity import perplexity
from kvprune.models.source import load_model, load_tokenizer, resolve
from kvprune.progress import Progress
from kvprune.text.corpus import read_text
from kvprune.text.windows import windows


def evaluate(
    source: str | Path,
    against: str | Path | None = None,
    *,
    texts: Sequence[str] = ("wikitext2",),
    window_lengths: Sequence[int] = (2048,),
    tokens: int = 16384,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity on the test split of each text (or on a file), in windows of each length.

    A window longer than the model's context becomes that long. tokens: how many of each text, 0 for all. Returns
    {"sources": [{"source", "kv_bytes_per_token", "parameters"}], "perplexity": [{"text", "window", "tokens",
    "values"}]} with one value per source. Raises BadOption when two sources tokenise differently: their figures could
    not be compared.
    """
    progress = progress or Progress()
    if min(window_lengths, default=0) < 2:
        raise BadOption("a window must have at least 2 tokens")
    if tokens and tokens < 2:
        raise BadOption(f"--tokens {tokens} is too few: give at least 2, or 0 for the whole text")
    sources = [resolve(s, revision, trust_remote_code) for s in (source, against) if s is not None]
    tokenizers = [load_tokenizer(s) for s in sources]
    if len(sources) == 2 and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise BadOption(f"{sources[0].name} and {sources[1].name} have different tokenizers; compare them apart")
    contents = {name: read_text(name, "test") for name in texts}
    rows: list[dict[str, Any]] = []
    costs = []
    for index, one in enumerate(sources):
        with progress.phase(f"load {index + 1}"):
            model = load_model(one, device, dtype)
        if index == 0:
            limit = model.config.max_position_embeddings
            lengths = sorted({min(n, limit, tokens or limit) for n in window_lengths})
            cut = {(t, n): windows(contents[t], tokenizers[0], n, tokens or None, t) for t in texts for n in lengths}
            rows = [{"text": t, "window": n, "tokens": 0, "values": []} for t, n in cut]
        with progress.phase(f"evaluate {index + 1}", sum(len(ids) for ids in cut.values())) as advance:
            for row, ids in zip(rows, cut.values(), strict=True):
                result = perplexity(model, ids, advance)
                row["tokens"] = result.tokens
                row["values"].append(result.value)
        costs.append(
            {
                "source": one.name,
                "kv_bytes_per_token": bytes_per_token(model),
                "parameters": memory.parameters(model),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
        )
        del model
    return {"sources": costs, "perplexity": rows}


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that a token leaves in the model's cache, measured on a real one of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    return memory.cache_bytes(model(ids, use_cache=True).past_key_values) // 2
