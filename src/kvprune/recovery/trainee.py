"""The student with its adapters, and the frozen teacher beside it, as one module whose forward is the loss.

Because the loss is computed inside `forward`, whatever accelerate wraps around the module (DDP, FSDP, mixed precision)
sees one call that returns one scalar.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvprune.errors import BadOption
from kvprune.models.family import family_of
from kvprune.models.logits import Head
from kvprune.recovery.data import Data
from kvprune.recovery.losses import LOSSES, Outputs, next_token_sum
from kvprune.recovery.settings import ALL_LINEAR, Settings

ADAPTER = "lora_"  # in the names of all that is trained


def blocks(lm: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path of the decoder blocks from the causal LM, and the blocks."""
    path = family_of(lm.config.model_type).layers
    return f"{lm.base_model_prefix}.{path}", cast(nn.ModuleList, lm.base_model.get_submodule(path))


def targets(lm: PreTrainedModel, settings: Settings) -> list[str]:
    """Full names of the linear layers that get an adapter, all below the blocks: those of attention and MLP, whatever
    the family calls them. Experts have none, which are no layers but one tensor; routers only by name.

    Raises BadOption for a name that none has, and for a rank above the narrowest one's smaller side.
    """
    path, layers = blocks(lm)
    linear: dict[str, Any] = {
        f"{path}.{name}": module
        for name, module in layers.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.numel()  # O of a layer without attention has none
    }
    known = sorted({name.rpartition(".")[2] for name in linear})
    routers = family_of(lm.config.model_type).routers
    every = [name for name in known if name not in routers]
    wanted = every if settings.targets == (ALL_LINEAR,) else settings.targets
    for name in wanted:
        if name not in known:
            raise BadOption(f"unknown target {name!r}; choose {ALL_LINEAR} or among {', '.join(known)}")
    chosen = [name for name in linear if name.rpartition(".")[2] in wanted]
    narrowest = min(chosen, key=lambda name: min(linear[name].weight.shape))
    width = min(linear[narrowest].weight.shape)
    if settings.rank > width:
        raise BadOption(f"--rank {settings.rank} is above the {width} channels of {narrowest}; give at most {width}")
    return chosen


def add_adapters(lm: PreTrainedModel, settings: Settings, *, same_dtype: bool = False) -> Any:
    """A peft model around `lm`, which is changed in place: adapters in float32, everything else frozen.

    same_dtype: adapters in the model's own dtype, as FSDP wants them.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=targets(lm, settings),
    )
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # which it finds out of each layer
        return get_peft_model(lm, config, autocast_adapter_dtype=not same_dtype)


def checkpoint_activations(lm: PreTrainedModel, on: bool = True) -> None:
    """Switch gradient checkpointing on or off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older transformers know these names only
        if on:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            lm.gradient_checkpointing_disable()
            lm.disable_input_require_grads()


class Trainee(nn.Module):
    """lm has adapters already. The teacher is no submodule: it is neither trained, sharded nor saved."""

    def __init__(self, lm: PreTrainedModel, teacher: PreTrainedModel | None, settings: Settings):
        super().__init__()
        self.lm = lm
        self.loss = LOSSES[settings.loss](settings.temperature, settings.attention_weight)
        self._teacher = (teacher,)
        self._no_split_modules = lm._no_split_modules  # where FSDP cuts

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, held_out: bool = False):
        """The mean loss of a batch; with `held_out` the summed cross-entropy of its next tokens."""
        batch = Data(ids, labels, lengths)
        if held_out:
            return next_token_sum(self._run(self.lm, ids, False), batch)
        teacher = self._teacher[0]
        targets = None
        if self.loss.needs_teacher and teacher is not None:
            with torch.no_grad():
                targets = self._run(teacher, ids, self.loss.needs_attention)
        return self.loss(self._run(self.lm, ids, self.loss.needs_attention), targets, batch)

    def _run(self, lm: PreTrainedModel, ids: torch.Tensor, attention: bool) -> Outputs:
        with attention_outputs(lm, attention) as collected:
            hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return Outputs(Head.of(lm), hidden, collected)


@contextmanager
def attention_outputs(lm: PreTrainedModel, wanted: bool = True) -> Iterator[list[torch.Tensor]]:
    """Collects what each block's attention returns (B, T, hidden), in order, while the context lasts.

    Gradient checkpointing runs the blocks again later, outside the context: that is not collected.
    """
    collected: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: tuple, output: Any) -> None:
        collected.append(output[0] if isinstance(output, tuple) else output)

    family = family_of(lm.config.model_type)
    modules = [family.attention_of(block) for block in blocks(lm)[1]] if wanted else []
    hooks = [module.register_forward_hook(keep) for module in modules if module is not None]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
