"""`TokenFilter`: a context in which a model skips the attention of tokens that look like what it has just seen."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvprune.errors import BadOption, CacheMismatch, FilterMisuse
from kvprune.models.family import family_of
from kvprune.tokens.attention import FilteredAttention, Step
from kvprune.tokens.cache import FilteredLayer
from kvprune.tokens.report import report
from kvprune.tokens.settings import PRESETS, Settings

ATTENTION = ("eager", "sdpa")


class TokenFilter:
    """Skip attention online, with no calibration (Token Filtering, arXiv 2512.07090; our choices: see Settings).

        with kvprune.TokenFilter(ratio=0.25)(model) as f:
            model.generate(...)
        f.report

    options: the fields of Settings, and preset="paper". record: keep every decision, for `skipped`. The model, dense or
    pruned by kvprune, is as it was when the context ends. Raises BadOption and UnreachableRatio for the options;
    UnsupportedArchitecture and FilterMisuse for the model; FilterMisuse and CacheMismatch from inside the context, each
    before anything changes.
    """

    def __init__(self, ratio: float | None = None, *, preset: str | None = None, record: bool = False, **options: Any):
        if preset is not None and preset not in PRESETS:
            raise BadOption(f"unknown preset {preset!r}; choose {', '.join(PRESETS)}")
        chosen = PRESETS.get(preset or "", {})
        decided = ", ".join(name for name in options if name in chosen)
        if decided:
            raise BadOption(f"preset {preset} decides {decided} itself; leave one of them out")
        if ratio is not None:
            options["ratio"] = ratio
        unknown = ", ".join(name for name in options if name not in Settings.__dataclass_fields__)
        if unknown:
            raise BadOption(f"unknown option {unknown}; choose among {', '.join(Settings.__dataclass_fields__)}")
        self.settings = Settings(**chosen, **options)
        self.record = record
        self._model: PreTrainedModel | None = None
        self._layers: list[FilteredAttention] = []
        self._cache: Any = None
        self._prompt_ends: np.ndarray | None = None
        self._undo = ExitStack()

    def __call__(self, model: PreTrainedModel) -> "TokenFilter":
        """Bind to a model, which is not changed before the context is entered."""
        family = family_of(model.config.model_type)
        config = model.config
        if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise FilterMisuse("partial rotary embeddings are not supported by TokenFilter")
        name = config._attn_implementation
        if name not in ATTENTION:
            raise FilterMisuse(
                f"attention implementation {name!r} is not supported; load with {' or '.join(ATTENTION)}"
            )
        blocks = cast(nn.ModuleList, model.base_model.get_submodule(family.layers))
        modules = [getattr(block, family.attention) for block in blocks]
        if any("forward" in vars(m) and isinstance(_owner(m), FilteredAttention) for m in modules):
            raise FilterMisuse("the model has a TokenFilter already; leave its context first")
        s = self.settings
        skip = s.rates(s.ratio, len(modules))
        drop = None if s.drop_ratio is None else s.rates(s.drop_ratio, len(modules))
        self._layers = [
            FilteredAttention(modules[i], family, i, s, rate, None if drop is None else drop[i])
            for i, rate in skip.items()
        ]
        self._model, self._cache = model, None
        return self

    def __enter__(self) -> "TokenFilter":
        if self._model is None:
            raise FilterMisuse("a TokenFilter needs a model: with TokenFilter(...)(model)")
        self(self._model)  # counts from the beginning, and the checks once more
        with ExitStack() as stack:
            for layer in self._layers:
                layer.decisions = [] if self.record else None
                stack.callback(_replace(layer.module, "forward", layer.forward))
            stack.callback(_replace(self._model, "generate", self._generate))
            stack.callback(self._model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        for layer in self._layers:
            layer.step = None

    @property
    def report(self) -> dict[str, Any]:
        """What was skipped and saved since the context was entered; see report.py."""
        assert self._model is not None
        return report(self._model, self.settings, [(layer.index, layer.counts) for layer in self._layers], self._cache)

    @property
    def skipped(self) -> np.ndarray:
        """Which tokens skipped which layer, (layers, B, tokens) bool, with record=True and one batch in the context."""
        if not self.record or self._model is None:
            raise FilterMisuse("decisions are not recorded; make the filter with TokenFilter(..., record=True)")
        found = {
            layer.index: np.concatenate(layer.decisions or [np.zeros((1, 0), bool)], axis=1) for layer in self._layers
        }
        nothing = np.zeros_like(next(iter(found.values())))
        return np.stack([found.get(i, nothing) for i in range(self._model.config.num_hidden_layers)])

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, told where the prompts end."""
        assert self._model is not None
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask")
        if self.settings.prompt_length is None and ids is not None:
            self._prompt_ends = np.full(len(ids), ids.shape[1]) if mask is None else mask.sum(1).cpu().numpy()
        try:
            return type(self._model).generate(self._model, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            self._prompt_ends = None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before every forward of the base model: checks, the cache, and what all layers need to know of the call."""
        assert self._model is not None
        config = self._model.config
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._model.parameters()):
            raise FilterMisuse("a TokenFilter does not train; run the model under torch.no_grad()")
        wanted = kwargs.get("output_attentions")
        if config.output_attentions if wanted is None else wanted:
            raise FilterMisuse("output_attentions: the attention of skipped tokens is never computed; leave it out")
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs["inputs_embeds"] if ids is None else ids
        batch, tokens = ids.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise FilterMisuse("a TokenFilter makes its own masks: give a mask of shape (batch, tokens), or none")
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        layers = self._cached(cache) if cache is not None else {i.index: FilteredLayer(i.window) for i in self._layers}
        real = np.ones((batch, tokens), dtype=bool)
        if mask is not None:
            real = mask[:, -tokens:].cpu().numpy().astype(bool)
        step = Step(real, self._ends(batch), layers)
        for layer in self._layers:
            layer.step = step
        if cache is not None:
            self._cache = cache
        return args, kwargs

    def _ends(self, batch: int) -> np.ndarray:
        """Absolute positions behind the prompts' final tokens, (B,)."""
        ends = self._prompt_ends
        if ends is None or batch % len(ends):
            return np.full(batch, self.settings.prompt_length or 0)
        return np.repeat(ends, batch // len(ends))  # beams, or several answers to a prompt

    def _cached(self, cache: Any) -> dict[int, FilteredLayer]:
        """The filtered layers of a cache; of an empty one they are put in. Raises CacheMismatch."""
        if not isinstance(cache, DynamicCache):
            raise CacheMismatch(f"a TokenFilter needs a DynamicCache, not {type(cache).__name__}")
        assert self._model is not None
        if not cache.layers:
            cache.layers = DynamicCache(config=self._model.config).layers
            cache.layer_class_to_replicate = None
            while len(cache.layers) <= self._layers[-1].index:  # older transformers make them on the way
                cache.layers.append(DynamicLayer())
        found = {}
        for attention in self._layers:
            layer: Any = cache.layers[attention.index]
            if not isinstance(layer, FilteredLayer):
                if layer.get_seq_length():
                    raise CacheMismatch("this cache was made without the TokenFilter; start with an empty one")
                layer = cache.layers[attention.index] = FilteredLayer(attention.window)
            found[attention.index] = layer
        others = [i for i, layer in enumerate(cache.layers) if isinstance(layer, FilteredLayer) and i not in found]
        if others:
            raise CacheMismatch("this cache was made with another TokenFilter; start with an empty one")
        return found


def _owner(module: nn.Module) -> object:
    """Whose method an instance's own `forward` is."""
    return getattr(vars(module)["forward"], "__self__", None)


def _replace(thing: Any, name: str, value: Any) -> Callable[[], None]:
    """Give `thing` an attribute of its own; returns what takes it back."""
    had = name in vars(thing)
    old = vars(thing).get(name)
    thing.__dict__[name] = value

    def restore() -> None:
        if had:
            thing.__dict__[name] = old
        else:
            del thing.__dict__[name]

    return restore
