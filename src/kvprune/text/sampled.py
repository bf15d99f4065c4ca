"""Text sampled from the model itself: calibration without a data set."""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvprune.models.finite import not_finite

DOCUMENTS = (
    32  # sampled side by side; always whole batches, so that what comes first does not depend on how much follows
)


@torch.no_grad()
def sample_ids(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    window: int,
    seed: int,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """Token ids (tokens,) of documents of `window` tokens, each sampled from the start token at temperature 1.

    An end token does not end a document: what the model says next follows, as in training. The same seed gives the
    same ids on the same machine, dtype and thread count. `advance` is called with the number of new tokens. Raises
    NotFinite.
    """
    named = (tokenizer.bos_token_id, lm.config.bos_token_id, tokenizer.eos_token_id)
    start = next((i for i in named if i is not None and 0 <= i < lm.config.vocab_size), 0)
    prompt = torch.full((DOCUMENTS, 1), start, device=lm.device)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=window, pad_token_id=start, use_cache=True)
    own, sampled = lm.generation_config, 0
    parts: list[torch.Tensor] = []

    def finite(_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(logits).all():
            raise not_finite("the model's logits, sampling", lm)
        return logits

    try:
        lm.generation_config = GenerationConfig()  # or its end token, penalties, ... would fill in what is not set here
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
            while sampled < tokens:
                torch.manual_seed(seed + 1_000_003 * len(parts))
                ids = cast(Any, lm).generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=config, logits_processor=[finite]
                )
                parts.append(ids[:, 1:].cpu().flatten())
                advance(min(len(parts[-1]), tokens - sampled))
                sampled += len(parts[-1])
    finally:
        lm.generation_config = own
    return torch.cat(parts)[:tokens]
