"""What every way to filter tokens asks of a model and of a call, and how a model's parts are stood in for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from kvprune.errors import FilterMisuse
from kvprune.runtime.attention import NAME as PACKED

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
