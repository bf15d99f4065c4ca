"""For users: load any source, and generate with it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvprune.errors import BadOption
from kvprune.measure.memory import cache_bytes
from kvprune.models import source as sources
from kvprune.models import tokenizer as tokenizers
from kvprune.progress import Progress
from kvprune.runtime.attention import pack_groups
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.linear import pack_weights
from kvprune.runtime.modeling import CACHE
from kvprune.text import conversations
from kvprune.tokens.filter import asked_filter

# What of a checkpoint's generation_config.json counts, and what besides where tokens are drawn
_KEPT, _KEPT_SAMPLING = ("eos_token_id", "repetition_penalty"), ("top_k", "top_p", "min_p", "typical_p")


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A hub id, checkpoint folder, pruned folder (whose plan and weights are checked) or .gguf file, in eval mode.

    Decoding packs the query heads of a group, and on a GPU leaves out kernels that plan for each length: see
    runtime/attention.py.
    dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own (bfloat16 for GGUF), but float32 on a CPU
    that has no instructions for that. Raises a KVPruneError: UnknownSource, UnsupportedArchitecture, UnsafeWeights,
    BrokenCheckpoint or BadOption.
    """
    return _ready(sources.resolve(source, revision, trust_remote_code), device, dtype)


def _ready(source: sources.Source, device: str, dtype: str) -> PreTrainedModel:
    model = sources.load_model(source, device, dtype)
    pack_groups(model)
    return model


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of any source that `load` takes."""
    return tokenizers.load_tokenizer(sources.resolve(source, revision, trust_remote_code))


def generate(
    source: str | Path,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    skip: float | None = None,
    skip_preset: str | None = None,
    skip_layers: str | Sequence[int] | None = None,
    keep: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Continue `prompt`; greedily, or sampled at `temperature`.

    chat: answer it instead, as a user's turn in the tokenizer's chat template, up to the token that ends a turn there;
    system: what the model is told before.
    keep: share of the KV bytes to keep online, by a TokenFilter, whose report is added as "filter". skip: share of all
    attention to skip instead, as Token Filtering does; skip_preset:
    "paper" for the paper's choices; skip_layers: the layers that may skip, best first, as numbers or "28,25,7" (see
    study_layers). Of the checkpoint's generation_config.json count the end tokens, the repetition penalty and, where
    sampled, what cuts the choice (top_k, top_p, ...); neither its cache nor beams, lengths or assistants: the cache is
    kvprune's own. Returns {"prompt", "text" (the continuation), "new_tokens", "cache_tokens", "cache_bytes"}; the bytes
    are those of the keys and values in it after the last step, without the room that a cache keeps free. Raises a
    KVPruneError, TokenizerMismatch for a prompt with tokens that the model has no embedding for.
    """
    if max_new_tokens < 1:
        raise BadOption("--max-new-tokens must be at least 1")
    if not prompt:
        raise BadOption("the prompt is empty")
    if system is not None and not chat:
        raise BadOption("--system needs --chat: only a conversation has a system's turn")
    if not temperature >= 0:
        raise BadOption("--temperature must not be negative")
    token_filter = asked_filter(skip, skip_preset, skip_layers, keep)
    resolved = sources.resolve(source, revision, trust_remote_code)
    progress = progress or Progress()
    sources.load_config(resolved)  # refuses what is not supported, before anything is said of the tokenizer
    tokenizer = tokenizers.load_tokenizer(resolved)
    ids, end = _asked(tokenizer, prompt, system) if chat else (tokenizer(prompt)["input_ids"], None)
    if not ids:
        raise BadOption(f"the prompt {prompt!r} makes no tokens; give some words")
    with progress.phase("load"):
        model = _ready(resolved, device, dtype)
    torch.manual_seed(seed)
    inputs = torch.tensor([ids])
    tokenizers.check_ids(inputs, model.config.vocab_size, "the prompt")
    inputs = inputs.to(model.device)
    pack_weights(model)
    model.generation_config = _generation_config(model.generation_config, max_new_tokens, temperature, end)
    filtering = nullcontext() if token_filter is None else token_filter(model)
    with progress.phase("generate", max_new_tokens) as advance, filtering:
        output: Any = model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            return_dict_in_generate=True,
            streamer=_Counter(advance),
            **{CACHE: GrowingCache(model.config)},
        )
    new = output.sequences[0, len(ids) :]
    cache = output[CACHE]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "cache_tokens": cache.get_seq_length(),
        "cache_bytes": cache_bytes(cache),
        **({} if token_filter is None else {"filter": token_filter.report}),
    }


def _asked(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> tuple[list[int], int | None]:
    """The ids of a conversation up to where the answer begins, and the token that ends the answer."""
    conversations.check_template(tokenizer, "leave out --chat")
    told = [] if system is None else [{"role": "system", "content": system}]
    messages = [*told, {"role": "user", "content": prompt}]
    return conversations.render(tokenizer, messages, answer=True), conversations.end_of_turn(tokenizer, messages)


class _Counter(BaseStreamer):
    """Tells `advance` of every new token."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance
        self.steps = 0  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.advance(self.steps)
        self.steps = 1

    def end(self) -> None:
        pass


def _generation_config(own: Any, max_new_tokens: int, temperature: float, end: int | None) -> GenerationConfig:
    """How to generate, with no more of the checkpoint's own config than `generate` says. end: one more end token, if
    there is one. One text is never padded."""
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    names = _KEPT + _KEPT_SAMPLING if temperature > 0 else _KEPT
    kept = {name: getattr(own, name, None) for name in names}
    if end is not None:
        ends = kept["eos_token_id"]
        kept["eos_token_id"] = sorted({end, *(ends if isinstance(ends, (list, tuple)) else [ends])} - {None})
    return GenerationConfig(**kept, **drawn, max_new_tokens=max_new_tokens, pad_token_id=0, use_cache=True)
