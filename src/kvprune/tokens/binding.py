"""What every way to filter tokens asks of a model and of a call, and how a model's parts are stood in for."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvprune.errors import CacheMismatch, FilterMisuse
from kvprune.models.family import Family
from kvprune.models.view import attention_of
from kvprune.runtime.attention import NAME as PACKED
from kvprune.runtime.modeling import CACHE, take_cache
from kvprune.tokens.attention import FilteredAttention

ADMISSION = "kvprune_admission"  # the attention function of late admission
ATTENTION = ("eager", "sdpa", PACKED)
CACHES = (None, "dynamic", "offloaded", "hybrid")  # the last is an old name that generate takes for none
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def check_model(model: Any) -> None:
    """Raise FilterMisuse for what is no transformers model as it was loaded."""
    name = type(model).__name__
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise FilterMisuse("a TokenFilter does not run compiled; give it the model as it was before torch.compile")
    if not isinstance(model, PreTrainedModel):
        mend = "merge adapters first" if hasattr(model, "peft_config") else "give the one inside, or load one"
        raise FilterMisuse(f"a TokenFilter needs a transformers model, not {name}; {mend}")
    if not isinstance(model, GenerationMixin):
        raise FilterMisuse(f"a TokenFilter needs a model that generates, not the bare {name}")


def check_attention(config: Any, more: tuple[str, ...] = ()) -> None:
    name = config._attn_implementation
    if name == ADMISSION and not more:
        raise FilterMisuse("the model has a TokenFilter already; leave its context first")
    if name not in (*ATTENTION, *more):
        raise FilterMisuse(f"attention implementation {name!r} is not supported; load with eager or sdpa")


def check_call(model: PreTrainedModel, kwargs: dict[str, Any], more: tuple[str, ...] = ()) -> None:
    """Raise FilterMisuse for a call of the base model that a filter cannot serve."""
    check_attention(model.config, more)
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise FilterMisuse("a TokenFilter does not train; run the model under torch.no_grad()")
    wanted = kwargs.get("output_attentions")
    if model.config.output_attentions if wanted is None else wanted:
        raise FilterMisuse("output_attentions: the attention of skipped tokens is never computed; leave it out")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise FilterMisuse("a TokenFilter makes its own masks: give a mask of shape (batch, tokens), or none")
    if mask is None and positions is not None and positions.shape[-1] > 1 and (positions.diff(dim=-1) != 1).any():
        raise FilterMisuse("position_ids that start again pack several texts into one; give a batch instead")


def setting_of(model: Any, name: str, given: dict[str, Any], config: Any) -> Any:
    """What generate takes: its own option, or what its generation_config says, or the model's."""
    if name in given:
        return given[name]
    places = ({} if config is None else vars(config), vars(model.generation_config))
    return next((place[name] for place in places if place.get(name) is not None), None)


def check_generate(model: Any, given: dict[str, Any], config: Any) -> None:
    """Raise CacheMismatch or FilterMisuse for a way to generate that a filter cannot serve."""
    kind = setting_of(model, "cache_implementation", given, config)
    if kind not in CACHES:
        raise CacheMismatch(
            f"generate was asked for a {kind!r} cache, but a TokenFilter keeps its own: leave cache_implementation "
            "out, or set it to None in model.generation_config"
        )
    for name in DRAFTS:
        if setting_of(model, name, given, config):
            raise FilterMisuse(f"{name}: a TokenFilter cannot take back the tokens of a draft; leave it out")


def begun_call(
    model: PreTrainedModel, base: nn.Module, args: tuple, kwargs: dict[str, Any], more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """All arguments of a call of the base model by name, once they are checked, and with the cache that it works on."""
    kwargs = {**dict(zip(inspect.signature(base.forward).parameters, args, strict=False)), **kwargs}
    check_call(model, kwargs, more)
    cache, use_cache = take_cache(kwargs), kwargs.get("use_cache")
    if cache is None and (model.config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=model.config)
    return {**kwargs, CACHE: cache}


def own_layers(
    model: PreTrainedModel, cache: Any, indices: Collection[int], kind: Any, make: Callable[[int, Any], Any]
) -> dict[int, Any]:
    """The layers of a cache that a filter works on, which are of a `kind`; in place of an empty one make(index, layer)
    is put in. Raises CacheMismatch."""
    if not isinstance(cache, DynamicCache):
        raise CacheMismatch(f"a TokenFilter needs a DynamicCache, not {type(cache).__name__}")
    if not cache.layers:
        cache.layers = DynamicCache(config=model.config).layers
        cache.layer_class_to_replicate = None
        while len(cache.layers) <= max(indices):  # older transformers make them on the way
            cache.layers.append(DynamicLayer())
    found = {}
    for i in indices:
        layer: Any = cache.layers[i]
        if not isinstance(layer, kind):
            if layer.get_seq_length():
                raise CacheMismatch("this cache was made without the TokenFilter; start with an empty one")
            layer = cache.layers[i] = make(i, layer)
        found[i] = layer
    return found


def check_even(cache: Any) -> None:
    """Raise CacheMismatch where layers have seen different numbers of tokens."""
    lengths = (layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length"))
    if len({n for n in lengths if isinstance(n, int)}) > 1:  # a tensor would make the host wait
        raise CacheMismatch("this cache has been used without its TokenFilter; start with an empty one")


def has_attention(module: nn.Module) -> bool:
    """Whether a layer has not lost its attention."""
    return getattr(module, "head_dim", None) != 0


def is_capped(module: nn.Module) -> bool:
    """Whether an attention module caps its scores or has sinks, which attention over an own cache knows nothing of."""
    capped = getattr(module, "attn_logit_softcapping", None) or getattr(module, "softcap", None)
    return capped is not None or getattr(module, "sinks", None) is not None


def attention_to_filter(model: PreTrainedModel, family: Family) -> dict[int, nn.Module]:
    """The attention modules of a model, by the number of their block. Raises FilterMisuse where tokens are filtered
    already, and where layers attend to the keys and values of others, whose tokens are not theirs to keep."""
    found = attention_of(model, family)
    modules = found.values()
    if any(isinstance(getattr(vars(m).get(forward_of(m)), "__self__", None), FilteredAttention) for m in modules):
        raise FilterMisuse("the model has a TokenFilter already; leave its context first")
    if any(getattr(module, "is_kv_shared_layer", False) for module in modules):
        name = model.config.model_type
        raise FilterMisuse(f"layers of this {name} share keys and values, which filters take one by one")
    return found


def forward_of(module: nn.Module) -> str:
    """The attribute to stand in for: accelerate's hooks, which move weights, call `_old_forward`."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def replaced(thing: Any, name: str, value: Any) -> Callable[[], None]:
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
