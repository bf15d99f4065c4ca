"""Text sampled from the model itself: calibration without a data set."""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 32768  # sampled side by side


@torch.no_grad()
def sample_ids(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    window: int,
    seed: int,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """Token ids (n,), n >= tokens, of documents of `window` tokens, each sampled from the start token at temperature 1.

    An end token does not end a document: what the model says next follows, as in training. The same seed gives the
    same ids on the same machine, dtype and thread count. `advance` is called with the tokens sampled so far.
    """
    start = next(
        (i for i in (tokenizer.bos_token_id, lm.config.bos_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
    documents = -(-tokens // window)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=window, pad_token_id=start, use_cache=True
    )
    parts = []
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, documents, max(BATCH_TOKENS // window, 1)):
            count = min(max(BATCH_TOKENS // window, 1), documents - first)
            prompt = torch.full((count, 1), start, device=lm.device)
            sampled = cast(Any, lm).generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            parts.append(sampled[:, 1:].cpu())
            advance(parts[-1].numel())
    return torch.cat(parts).flatten()
