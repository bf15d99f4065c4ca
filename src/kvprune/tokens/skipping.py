"""A context in which a model skips the attention of tokens that look like what it has just seen."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kvprune.errors import CacheMismatch, FilterMisuse
from kvprune.models.family import check_config, family_of
from kvprune.models.view import ModelView
from kvprune.runtime import PREFIX
from kvprune.runtime.modeling import CACHE, take_cache
from kvprune.runtime.quantized import is_quantized
from kvprune.tokens.attention import FilteredAttention
from kvprune.tokens.binding import (
    attention_to_filter,
    begun_call,
    check_attention,
    check_even,
    check_generate,
    check_model,
    forward_of,
    has_attention,
    is_capped,
    own_layers,
    replaced,
    setting_of,
)
from kvprune.tokens.cache import HOST, FilteredLayer
from kvprune.tokens.projections import Projections
from kvprune.tokens.quantized import QuantizedFilteredLayer
from kvprune.tokens.report import bytes_of, no_bytes, report
from kvprune.tokens.settings import Settings
from kvprune.tokens.step import Step


class Skipping:
    """The way of Token Filtering (arXiv 2512.07090; our choices: see Settings): skip attention online."""

    def __init__(self, settings: Settings, record: bool = False):
        self.settings = settings
        self.record = record
        self._model: PreTrainedModel | None = None
        self._layers: list[FilteredAttention] = []
        self._cache: Any = None
        self._bytes = no_bytes()
        self._active = False
        self._prompt_ends: torch.Tensor | None = None
        self._undo = ExitStack()
        self._own_generate: Callable[..., Any] = _nothing

    def __call__(self, model: PreTrainedModel) -> "Skipping":
        """Bind to a model, which is not changed before the context is entered."""
        if self._active:
            raise FilterMisuse("this TokenFilter is in use already; leave its context, or make another one")
        check_model(model)
        config = model.config
        family = family_of(config.model_type)
        check_config(config)
        modules = [module for module in attention_to_filter(model, family).values() if has_attention(module)]
        if any(map(is_capped, modules)):
            raise FilterMisuse(f"skipping cannot work on {config.model_type}, whose attention has a cap or sinks")
        if family.norm_behind_rope or family.temperature:
            raise FilterMisuse(
                f"skipping turns queries and keys by RoPE last, and {config.model_type} does more behind it; use keep"
            )
        check_attention(config)
        if len(modules) < len(family.blocks(model)):
            raise FilterMisuse("skipping needs attention in every layer, and some have none; use keep")
        s = self.settings
        skip = s.rates(s.ratio, len(modules))
        drop = skip if s.drop_ratio is None else s.rates(s.drop_ratio, len(modules))
        is_pruned = config.model_type.startswith(PREFIX)
        views = [None] * len(modules) if is_pruned else ModelView(model).attention
        parts = [Projections(module, family, view) for module, view in zip(modules, views, strict=True)]
        self._layers = [
            FilteredAttention(
                modules[i], parts[i], i, s, skip.get(i, 0.0), None if s.drop_ratio is None else drop.get(i, 0.0)
            )
            for i in sorted(skip | drop)
        ]
        _share_decisions(self._layers, s.decide_every)
        self._model, self._cache, self._bytes = model, None, no_bytes()
        return self

    def __enter__(self) -> "Skipping":
        if self._model is None:
            raise FilterMisuse("a TokenFilter needs a model: with TokenFilter(...)(model)")
        self(self._model)  # counts from the beginning, and the checks once more
        with ExitStack() as stack:
            for layer in self._layers:
                layer.decisions = [] if self.record else None
                stack.callback(replaced(layer.module, forward_of(layer.module), layer.forward))
            self._own_generate = cast(Callable[..., Any], self._model.generate)
            stack.callback(replaced(self._model, "generate", self._generate))
            decoder = family_of(self._model.config.model_type).stack(self._model)
            stack.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            self._undo = stack.pop_all()
        self._active = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._active = False
        self._undo.close()
        for layer in self._layers:
            layer.step = layer.decided = None
        assert self._model is not None
        self._bytes, self._cache = bytes_of(self._model, self._cache), None

    @property
    def model(self) -> PreTrainedModel | None:
        return self._model

    def rates(self, layers: int) -> dict[int, float]:
        """The share of tokens that skips, of the layers in which some do."""
        return self.settings.rates(self.settings.ratio, layers)

    @property
    def report(self) -> dict[str, Any]:
        """What was skipped and saved since the context was entered; see report.py."""
        if self._model is None:
            raise FilterMisuse("this TokenFilter has no model yet, and nothing to report")
        found = bytes_of(self._model, self._cache) if self._active else self._bytes
        counts = [(layer.index, layer.counts.read()) for layer in self._layers]
        return report(self._model, self.settings, counts) | found

    @property
    def skipped(self) -> np.ndarray:
        """Which tokens skipped which layer, (layers, B, tokens) bool, with record=True and one batch in the context."""
        if not self.record or self._model is None:
            raise FilterMisuse("decisions are not recorded; make the filter with TokenFilter(..., record=True)")
        none = torch.zeros(1, 0, dtype=torch.bool)
        found = {layer.index: torch.cat([d.cpu() for d in layer.decisions or [none]], 1) for layer in self._layers}
        nothing = torch.zeros_like(next(iter(found.values())))
        return torch.stack([found.get(i, nothing) for i in range(self._model.config.num_hidden_layers)]).numpy()

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, told where the prompts end."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        embeds, mask, cache = kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), take_cache(dict(kwargs))
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        check_generate(self._model, kwargs, config)
        if self.settings.prompt_length is None:
            if mask is None and ids is not None:
                mask = self._padding(ids, kwargs, config)
            if mask is not None:
                self._prompt_ends = mask.sum(1)
            elif embeds is not None:
                seen = 0 if cache is None else cache.get_seq_length()
                self._prompt_ends = torch.full((len(embeds),), seen + embeds.shape[1], device=embeds.device)
        try:
            return self._own_generate(*args, **kwargs)
        finally:
            self._prompt_ends = None

    def _padding(self, ids: torch.Tensor, given: dict[str, Any], config: Any) -> torch.Tensor:
        """The mask that generate makes where it gets none: pad tokens, unless they may be text as well."""
        pad, end = (setting_of(self._model, name, given, config) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, list) else [end]
        return torch.ones_like(ids) if pad is None or pad in ends else ids.ne(pad).long()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before every forward of the base model: checks, the cache, and what all layers need to know of the call."""
        assert self._model is not None
        kwargs = begun_call(self._model, module, args, kwargs)
        ids = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, tokens = ids.shape[:2]
        mask, cache = kwargs.get("attention_mask"), kwargs[CACHE]
        layers = self._cached(cache) if cache is not None else {i.index: FilteredLayer(i.window) for i in self._layers}
        some = next(iter(layers.values()))
        on_device = some.decides_next(tokens)
        all_real = mask is None or (on_device and not some.has_padding)
        real = torch.ones(batch, tokens, dtype=torch.bool, device=some.device if on_device else HOST)
        if mask is not None and not all_real:
            real = mask[:, -tokens:].to(real)
        if on_device and (all_real or len(layers) == self._model.config.num_hidden_layers):
            kwargs["attention_mask"] = None  # nobody needs it, and models look into it, which makes the host wait
        step = Step.of(real, self._ends(batch), layers, self.settings, not on_device, all_real)
        for layer in self._layers:
            layer.step = step
        self._cache = cache
        return (), kwargs

    def _ends(self, batch: int) -> torch.Tensor:
        """Absolute positions behind the prompts' final tokens, (B,)."""
        ends = self._prompt_ends
        if ends is None or batch % len(ends):
            assert self._model is not None
            return torch.full((batch,), self.settings.prompt_length or 0, device=self._model.device)
        return ends.repeat_interleave(batch // len(ends))  # beams, or several answers to a prompt

    def _cached(self, cache: Any) -> dict[int, FilteredLayer]:
        """The filtered layers of a cache; of an empty one they are put in. Raises CacheMismatch."""
        assert self._model is not None
        windows = {attention.index: attention.window for attention in self._layers}
        found = own_layers(self._model, cache, windows, FilteredLayer, lambda i, layer: _filtered(layer, windows[i]))
        others = any(isinstance(layer, FilteredLayer) and i not in found for i, layer in enumerate(cache.layers))
        if others or not all(_are_alike(layer.settings, self.settings) for layer in found.values()):
            raise CacheMismatch("this cache was made with another TokenFilter; start with an empty one")
        check_even(cache)
        return found


def _are_alike(made_by: Settings | None, mine: Settings) -> bool:
    """Whether a layer with settings made_by, or one that is new, can go on with these."""
    return made_by in (None, mine) or replace(cast(Settings, made_by), prompt_length=mine.prompt_length) == mine


def _share_decisions(layers: list[FilteredAttention], every: int) -> None:
    """Let the first of every so many layers in a row decide for all of them, if they are to skip and drop alike."""
    leader, led = None, 0
    for layer in layers:
        if leader is not None and led < every and layer.rates == leader.rates:
            layer.leader = leader
        else:
            leader, led = layer, 0
        led += 1


def _filtered(layer: Any, window: int | None) -> FilteredLayer:
    """What stands for an empty layer of a cache."""
    return QuantizedFilteredLayer(layer) if is_quantized(layer) else FilteredLayer(window)


def _nothing(*args: Any, **kwargs: Any) -> None:
    raise FilterMisuse("a TokenFilter generates in its context only")
