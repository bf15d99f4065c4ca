"""Late admission in a model: each attention without a window attends over an `AdmittedLayer`.

The model's own modules run as they are. What is put in between is the attention function, a cache layer, and a look at
what K's projection gives, which is the keys before RoPE.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from kvprune.errors import BadOption, CacheMismatch, FilterMisuse
from kvprune.models.family import Family, check_config, dense_head_dim, dense_kv_heads, family_of
from kvprune.runtime.attention import packed_attention
from kvprune.runtime.modeling import CACHE, window_of
from kvprune.runtime.quantized import is_quantized
from kvprune.tokens.admission import Admission
from kvprune.tokens.admitted import AdmittedLayer
from kvprune.tokens.admitted_quantized import QuantizedAdmittedLayer
from kvprune.tokens.admitted_static import StaticAdmittedLayer
from kvprune.tokens.apart import Shared
from kvprune.tokens.binding import (
    ADMISSION,
    attention_to_filter,
    begun_call,
    check_attention,
    check_even,
    check_generate,
    check_model,
    has_attention,
    is_capped,
    own_layers,
    replaced,
)
from kvprune.tokens.report import bytes_of
from kvprune.tokens.signals import SIGNALS, Before

HELD = "kvprune_held"  # of an attention module, while a call lasts


class Held:
    """What one attention module has to work with: its layer of the cache, keys and queries before RoPE, and what is
    real. keys, queries: the modules that give them; queries: None where no one asks; part: what of the former's output
    are keys."""

    def __init__(
        self, keys: nn.Module, queries: nn.Module | None, part: Callable[[torch.Tensor], torch.Tensor] | None = None
    ):
        self.part = part
        self.modules = {"keys": keys} if queries is None else {"keys": keys, "queries": queries}
        self.layer: AdmittedLayer | None = None
        self.seen: dict[str, torch.Tensor] = {}  # (B, T, heads * width)
        self.real: torch.Tensor | None = None
        self.shared: Shared | None = None

    def watch(self) -> Iterator[Callable[[], None]]:
        """Look at what the modules give; yields what ends it."""
        for name, module in self.modules.items():
            yield module.register_forward_hook(partial(self._see, name)).remove

    def _see(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen[name] = output

    def take(self, kv_heads: int, heads: int, scaling: float) -> tuple[Before, torch.Tensor | None, "Shared | None"]:
        """What has been seen in this call, what is real, and what other layers have found out for all."""
        keys, queries = self.seen["keys"], self.seen.get("queries")
        keys = keys if self.part is None else self.part(keys)
        real, shared = self.real, self.shared
        self.forget()
        of_heads = None if queries is None else queries.unflatten(-1, (heads, -1)).transpose(1, 2)
        return Before(keys.unflatten(-1, (kv_heads, -1)).transpose(1, 2), of_heads, scaling), real, shared

    def forget(self) -> None:
        self.seen, self.real, self.shared = {}, None, None


def admitting_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions. A layer that is left alone goes to "sdpa"."""
    held: Held | None = getattr(module, HELD, None)
    if held is None:
        return packed_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    assert held.layer is not None
    before, real, shared = held.take(
        key.shape[1], query.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    return held.layer.attend(query, key, value, before, real, scaling, shared), None


class LateAdmission:
    """A context in which a model keeps a share of its tokens; see admission.py."""

    def __init__(self, settings: Admission):
        self.settings = settings
        self._model: PreTrainedModel | None = None
        self._held: dict[int, Held] = {}
        self._modules: dict[int, nn.Module] = {}
        self._turns: dict[int, torch.Tensor] = {}
        self._cache: Any = None
        self._found: dict[str, Any] = {}
        self._active = False
        self._undo = ExitStack()

    def rates(self, layers: int) -> dict[int, float]:
        """No token skips a layer."""
        return {}

    def __call__(self, model: PreTrainedModel) -> "LateAdmission":
        if self._active:
            raise FilterMisuse("this TokenFilter is in use already; leave its context, or make another one")
        check_model(model)
        config: Any = model.config
        family, rule = family_of(config.model_type), self.settings
        check_config(config)
        check_attention(config)
        modules = attention_to_filter(model, family)
        if any(map(is_capped, modules.values())):
            raise FilterMisuse(f"keep cannot work on {config.model_type}, whose attention has a cap or sinks")
        self._modules = {i: m for i, m in modules.items() if has_attention(m) and window_of(m, config) is None}
        if not self._modules:
            raise FilterMisuse("every layer of this model has a sliding window, which is short already; leave keep out")
        longest = config.max_position_embeddings
        if rule.block + rule.window >= longest:
            raise BadOption(
                f"block ({rule.block}) and window ({rule.window}) leave nothing to decide in a context of {longest} "
                "tokens; take smaller ones"
            )
        wanted = SIGNALS[rule.signal].wants_queries
        if wanted and not family.is_plain:
            raise FilterMisuse(f"signal {rule.signal} is built for Llama's attention, not for {config.model_type}'s")
        self._held = {i: _held_of(m, family, config, wanted) for i, m in self._modules.items()}
        self._turns = {i: _turns_of(model, m) for i, m in self._modules.items()} if wanted else {}
        self._model, self._cache = model, None
        self._found = self._measured()
        return self

    def __enter__(self) -> "LateAdmission":
        if self._model is None:
            raise FilterMisuse("a TokenFilter needs a model: with TokenFilter(...)(model)")
        self(self._model)  # counts from the beginning, and the checks once more
        model = self._model
        AttentionInterface.register(ADMISSION, admitting_attention)
        AttentionMaskInterface.register(ADMISSION, sdpa_mask)
        with ExitStack() as stack:
            for i, module in self._modules.items():
                stack.callback(replaced(module, HELD, self._held[i]))
                for undo in self._held[i].watch():
                    stack.callback(undo)
                if getattr(module, "dense_heads", None) is not None:  # the cache is read at its own width
                    stack.callback(replaced(module, "dense_heads", None))
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(ADMISSION)
            self._own_generate = cast(Callable[..., Any], model.generate)
            stack.callback(replaced(model, "generate", self._generate))
            stack.callback(
                family_of(model.config.model_type)
                .stack(model)
                .register_forward_pre_hook(self._begin, with_kwargs=True)
                .remove
            )
            self._undo = stack.pop_all()
        self._active = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._active = False
        self._undo.close()
        self._found, self._cache = self._measured(), None
        for held in self._held.values():
            held.layer = None
            held.forget()

    @property
    def report(self) -> dict[str, Any]:
        """Of the last call's cache: keep_asked; keep_achieved, the share of the tokens that layers without a window
        hold (those not decided yet with them); and the bytes that report.py names."""
        if self._model is None:
            raise FilterMisuse("this TokenFilter has no model yet, and nothing to report")
        return self._measured() if self._active else self._found

    def _measured(self) -> dict[str, Any]:
        layers = [] if self._cache is None else [i for i in self._cache.layers if isinstance(i, AdmittedLayer)]
        begun = [layer for layer in layers if layer.is_initialized]
        tokens = sum(int(layer.real_tokens().sum()) for layer in begun)
        kept = sum(int(layer.kept_tokens().sum()) for layer in begun)
        achieved = {"keep_asked": self.settings.keep, "keep_achieved": kept / tokens if tokens else 1.0}
        return achieved | bytes_of(self._model, self._cache)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, unless it cannot work."""
        check_generate(self._model, kwargs, args[1] if len(args) > 1 else kwargs.get("generation_config"))
        return self._own_generate(*args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before every forward of the base model: checks, the cache, and which tokens are real."""
        assert self._model is not None
        if torch.compiler.is_compiling():
            return self._begin_compiled(args, kwargs)
        kwargs = begun_call(self._model, module, args, kwargs, (ADMISSION,))
        ids = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        mask, cache = kwargs.get("attention_mask"), kwargs[CACHE]
        layers = {i: self._admitted(i) for i in self._held} if cache is None else self._cached(cache)
        real = self._real(mask, ids.shape[1], next(iter(layers.values())))
        if real is not None and any(isinstance(layer, QuantizedAdmittedLayer) for layer in layers.values()):
            raise CacheMismatch(
                "keep on a quantised cache takes no padding; give texts of one length, or one at a time"
            )
        if real is None or len(layers) == self._model.config.num_hidden_layers:
            kwargs["attention_mask"] = None  # nobody needs it, and models look into it, which makes the host wait
        shared = Shared()
        for i, held in self._held.items():
            held.layer, held.real, held.shared = layers[i], real, shared
        self._cache = cache
        return (), kwargs

    def _begin_compiled(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The same of a step that is compiled, of a cache that has had its prompt. All of its tokens are real."""
        cache: Any = kwargs.get(CACHE)
        shared = Shared()
        for i, held in self._held.items():
            layer = None if cache is None else cache.layers[i]
            if not isinstance(layer, StaticAdmittedLayer):
                raise FilterMisuse("a compiled step needs a cache with length=, which has had its prompt uncompiled")
            held.layer, held.real, held.shared = layer, None, shared
        if len(self._held) == len(cache.layers):
            kwargs = {**kwargs, "attention_mask": None}
        return args, kwargs

    def _real(self, mask: torch.Tensor | None, tokens: int, layer: AdmittedLayer) -> torch.Tensor | None:
        """(B, T) bool: which of the new tokens are no padding, or None where all are and have been.

        A step of decoding does not look, since that would make the host wait: where there was no padding before, its
        tokens are real.
        """
        if mask is None:
            return None
        new = mask[:, -tokens:].bool()
        if layer.counts is not None:
            return new
        if tokens == 1 and layer.seen:
            return None
        return None if bool(new.all()) else new

    def _cached(self, cache: Any) -> dict[int, AdmittedLayer]:
        """The layers of a cache that this filter works on; of an empty one they are put in. Raises CacheMismatch."""
        assert self._model is not None
        found = own_layers(self._model, cache, self._held, AdmittedLayer, self._admitted)
        if any(layer.rule != self.settings for layer in found.values()):
            raise CacheMismatch("this cache was made with another TokenFilter; start with an empty one")
        check_even(cache)
        return found

    def _admitted(self, index: int, layer: Any = None) -> AdmittedLayer:
        """What stands for an empty layer of a cache, or for none."""
        if layer is not None and not isinstance(layer, DynamicLayer):
            raise CacheMismatch(f"keep cannot work on a {type(layer).__name__}; leave it out")
        has_length = self.settings.length is not None
        if is_quantized(layer):
            if has_length:
                raise CacheMismatch("length: a quantised cache has no room of its own; leave length out")
            return QuantizedAdmittedLayer(self.settings, index, self._turns.get(index), layer)
        return (StaticAdmittedLayer if has_length else AdmittedLayer)(self.settings, index, self._turns.get(index))


def _held_of(attention: nn.Module, family: Family, config: Any, wants_queries: bool) -> Held:
    """What gives keys and queries before RoPE: the projections, the one that holds them all, or, in a pruned model, the
    matrices behind them. A dense model's norm on keys stands behind what is looked at here."""
    if hasattr(attention, "rope_index"):
        keys, queries = (getattr(attention, f"{n}_mix") or getattr(attention, f"{n}_proj") for n in "kq")
        return Held(cast(nn.Module, keys), cast(nn.Module, queries) if wants_queries else None)
    if not family.qkv:
        return Held(getattr(attention, family.k), getattr(attention, family.q) if wants_queries else None)
    heads, kv_heads, channels = config.num_attention_heads, dense_kv_heads(config), dense_head_dim(config)
    if family.split == "heads":
        return Held(
            getattr(attention, family.qkv), None, lambda x: x.unflatten(-1, (heads, 3, -1))[..., 1, :].flatten(-2)
        )
    before = heads * channels
    return Held(getattr(attention, family.qkv), None, lambda x: x[..., before : before + kv_heads * channels])


def _turns_of(model: PreTrainedModel, attention: nn.Module) -> torch.Tensor:
    """By how much RoPE turns each pair from one token to the next, (KV heads or 1, width / 2)."""
    rotary = cast(nn.Module, model.base_model.get_submodule("rotary_emb"))
    turns = cast(torch.Tensor, rotary.inv_freq).float().cpu().unsqueeze(0)
    index = getattr(attention, "rope_index", None)
    if index is None:
        return turns
    first = index[:, : index.shape[1] // 2].cpu()
    turns = torch.cat((turns, turns, torch.zeros(1, 1)), 1)  # a dense channel's, or none
    return turns[0, first]
