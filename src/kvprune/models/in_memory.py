"""A model that is in memory already, as a source.

What is pruned is a copy, made of the model's weights and config alone, as if they had been saved and loaded: the
caller's model stays as it is, and whatever hangs on it (hooks, a training mode, another attention) is not in the copy.
"""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvprune.errors import BadOption, UnknownSource
from kvprune.models.check import check_quantised
from kvprune.models.family import family_of
from kvprune.models.places import find_device
from kvprune.models.source import Source
from kvprune.runtime import PREFIX
from kvprune.runtime.attention import wants_eager
from kvprune.runtime.dtype import compute_in_auto, find_dtype, stored_dtype
from kvprune.runtime.linear import PackedLinear

NAME = "a model in memory"


@dataclass(frozen=True)
class InMemory(Source):
    """name: what the model's config says that it was loaded from, or NAME."""

    model: PreTrainedModel = field(repr=False, compare=False)

    @property
    def is_pruned(self) -> bool:
        return False

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.model.config.to_dict()

    @property
    def is_wrapper(self) -> bool:
        return False

    @cached_property
    def config(self) -> PreTrainedConfig:
        config = copy.deepcopy(self.model.config)
        config._attn_implementation = None  # transformers' choice, as for one that is loaded
        config.dtype = _stored(self.model)  # type: ignore[assignment]
        return config


def from_memory(model: Any, revision: str | None = None, trust_remote_code: bool = False) -> InMemory:
    """A dense model as a source. Raises UnknownSource, BadOption or UnsupportedArchitecture for what cannot be one."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise BadOption("the model has adapters (peft); merge them first: model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise UnknownSource(
            f"{type(model).__name__} is no source: give a hub id, a folder, or a model of transformers; of one that is "
            "wrapped (torch.compile, DDP, a pipeline), the model inside"
        )
    if revision is not None:
        raise BadOption("--revision is of a hub id; a model in memory has none")
    name = model.config.name_or_path or NAME
    if model.config.model_type.startswith(PREFIX):
        raise BadOption(f"{name} is pruned already; give the dense model it came from")
    source = InMemory(name, "", None, None, trust_remote_code, model)
    _check(source)
    return source


def _check(source: InMemory) -> None:
    model = source.model
    family_of(model.config.model_type)
    check_quantised("the model in memory", source.settings)
    if getattr(model, "is_quantized", False):
        raise BadOption("the model in memory has quantised weights, which kvprune does not read")
    if model.get_output_embeddings() is None:
        raise UnknownSource(f"{type(model).__name__} has no head for a vocabulary; give the ...ForCausalLM of it")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise BadOption("the model's weights are packed (pack_weights) and cannot be read back; load it again")
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(place.type == "meta" for place in places):
        raise BadOption("some weights of the model are not in memory (device_map, meta); give the folder it came from")
    if len(places) > 1:
        told = ", ".join(sorted(map(str, places)))
        raise BadOption(f"the model is spread over {told}; move it to one device, or give the folder it came from")


def _stored(model: PreTrainedModel) -> torch.dtype:
    """In which dtype the result is written: the config's where the weights lose nothing in it (they were stored so, and
    compute in another), else their own."""
    stored = stored_dtype(model)
    if stored == model.dtype or all(torch.equal(p, p.to(stored).to(p.dtype)) for p in model.parameters()):
        return stored
    return model.dtype


@torch.no_grad()
def copied(source: InMemory, device: str, dtype: str) -> PreTrainedModel:
    """What `load_model` would load if the model had been saved: in eval mode, in the dtype that is asked for; "auto"
    leaves it on its device. Raises BadOption."""
    model = source.model
    target = model.device if device == "auto" else find_device(device)
    config = copy.deepcopy(source.config)
    if wants_eager(config):
        config._attn_implementation = "eager"
    stored = _stored(model) if dtype == "auto" else find_dtype(dtype)
    with torch.device("meta"):
        found: PreTrainedModel = type(model)(config)
    clones: dict[int, Any] = {}  # a tied weight is one

    def clone(tensor: torch.Tensor) -> Any:
        if id(tensor) not in clones:
            kind = stored if tensor.dtype == model.dtype else tensor.dtype  # a few may be kept in float32
            new = tensor.detach().to(target, kind, copy=True)
            clones[id(tensor)] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
        return clones[id(tensor)]

    state = {name: clone(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    missing, unknown = found.load_state_dict(state, strict=False, assign=True)
    if missing or unknown:
        raise UnknownSource(
            f"the model in memory {'lacks' if missing else 'has'} {(missing or unknown)[0]}, "
            f"unlike a {type(model).__name__} of its config; give one whose modules were not changed"
        )
    for name, buffer in list(found.named_buffers(remove_duplicate=False)):  # those that no checkpoint holds
        if buffer.is_meta:
            module, _, leaf = name.rpartition(".")
            own = model.get_buffer(name).detach().to(target, copy=True)
            found.get_submodule(module).register_buffer(leaf, own, persistent=False)
    rotary: Any = getattr(found.base_model, "rotary_emb", None)
    if rotary is not None:  # a model that was cast has rounded its table
        found.base_model.rotary_emb = type(rotary)(config).to(target)
    found.generation_config = copy.deepcopy(model.generation_config)
    found.config.dtype = stored
    if dtype == "auto":
        compute_in_auto(found, target)
    return found.eval()
