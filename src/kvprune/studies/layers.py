"""Which layers should skip attention: those whose output anchor misses least on a page of text [ours].

Token Filtering (arXiv 2512.07090) takes the last layers. Some of those lose much by skipping and some others little;
one dense pass over a page tells them apart.
"""

import math
from pathlib import Path
from typing import Any

from kvprune.errors import BadOption
from kvprune.models import source as sources
from kvprune.models.finite import not_finite
from kvprune.models.tokenizer import check_ids, load_tokenizer
from kvprune.progress import Progress
from kvprune.text.corpus import read_text
from kvprune.text.windows import windows
from kvprune.tokens.layers import anchor_errors
from kvprune.tokens.settings import Settings


def study_layers(
    source: str | Path,
    *,
    text: str | Path = "wikitext2",
    tokens: int = 4096,
    window: int = 512,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every layer's `anchor_errors` on the valid split of `text`, or a file, in windows.

    Returns {"source", "text", "tokens", "window", "layers" (the ones to skip first come first: for
    TokenFilter(layers=...)), "errors" (by layer number)}. Raises a KVPruneError for the source, the text or the window.
    """
    least = Settings().first + 1
    if window < least:
        raise BadOption(f"--window {window} is too short: the first {least - 1} tokens never skip; give more")
    if tokens < window:
        raise BadOption(f"--tokens {tokens} is less than one --window of {window}; give more")
    resolved = sources.resolve(source, revision, trust_remote_code)
    config = sources.load_config(resolved)
    if window > config.max_position_embeddings:
        raise BadOption(
            f"--window {window} is more than the {config.max_position_embeddings} tokens that the model takes"
        )
    tokenizer = load_tokenizer(resolved)
    pages = windows(read_text(str(text), "valid"), tokenizer, window, tokens, f"the text {text}")
    check_ids(pages, config.vocab_size, f"the text {text}")
    progress = progress or Progress()
    with progress.phase("load"):
        model = sources.load_model(resolved, device, dtype)
    found = []
    with progress.phase("layers", len(pages)) as advance:
        for page in pages:
            found.append(anchor_errors(model, page[None]))
            advance(1)
    errors = [sum(column) / len(found) for column in zip(*found, strict=True)]
    broken = [index for index, error in enumerate(errors) if not math.isfinite(error)]
    if broken:
        raise not_finite(f"layer {broken[0]}: its output on this text", model)
    return {
        "source": str(source),
        "text": str(text),
        "tokens": pages.numel(),
        "window": window,
        "layers": sorted(range(len(errors)), key=lambda layer: errors[layer]),
        "errors": errors,
    }
