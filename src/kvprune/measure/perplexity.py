"""Perplexity over consecutive windows of a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvprune import processes
from kvprune.measure.loss import next_token_loss
from kvprune.models.finite import not_finite
from kvprune.models.logits import Head
from kvprune.models.stream import device_of, final_states
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import decoding_pieces, quantized_cache

BATCH_TOKENS = 4096
LARGEST = 700.0  # nats a token: exp of more is no number that a JSON file can hold


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood) of `tokens` scored tokens, in windows of `window`."""

    value: float
    window: int
    tokens: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    advance: Callable[[int], None] | None = None,
    kv_bits: int | None = None,
    shared: bool = False,
) -> Perplexity:
    """Perplexity of a Hugging Face causal LM, dense or pruned, on windows (n, T) of token ids.

    Each window starts afresh and its first token is not scored, so n * (T - 1) tokens are; there is no
    padding. `advance` is called with the number of windows done. shared: each process takes its share of the windows,
    and all of them call this. kv_bits: keys and values come out of transformers'
    quantised cache as they do in decoding. Raises NotFinite, BadOption for
    what cannot be quantised, and UnsupportedArchitecture for a model whose head is not known.
    """
    batches = list(windows.split(max(BATCH_TOKENS // windows.shape[1], 1)))
    batches = processes.mine(batches) if shared else batches
    found = final_states(model, batches) if kv_bits is None else (_read(model, batch, kv_bits) for batch in batches)
    total, count = 0.0, 0
    for batch, hidden in zip(batches, found, strict=True):
        loss, scored, _ = next_token_loss(Head.of(model), hidden, batch)
        total, count = total + loss, count + scored
        if advance:
            advance(len(batch))
    sums = torch.tensor([total, count], dtype=torch.float64)
    total, count = (processes.summed(sums) if shared else sums).tolist()
    mean = total / count
    if not math.isfinite(mean):
        raise not_finite("the model's loss on the evaluation text", model)
    return Perplexity(math.exp(min(mean, LARGEST)), windows.shape[1], int(count))


def _read(model: PreTrainedModel, batch: torch.Tensor, kv_bits: int) -> torch.Tensor:
    """Final hidden states (B, T, hidden) of ids (B, T), read from a quantised cache."""
    ids, cache = batch.to(device_of(model)), quantized_cache(model.config, kv_bits)
    pieces = ids.split(decoding_pieces(kv_bits, ids.shape[1]), dim=1)
    return torch.cat([model.base_model(input_ids=p, **{CACHE: cache}).last_hidden_state for p in pieces], dim=1)
