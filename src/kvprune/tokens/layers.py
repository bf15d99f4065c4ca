"""How much each layer would lose by skipping: the error of its output anchor, from one dense pass [ours]."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvprune.errors import FilterMisuse
from kvprune.models.family import family_of
from kvprune.tokens.anchors import moving_average
from kvprune.tokens.settings import Settings


@torch.no_grad()
def anchor_errors(model: PreTrainedModel, ids: torch.Tensor, settings: Settings | None = None) -> list[float]:
    """What the output anchor misses, layer by layer: the mean over tokens of |o - A|^2 / |x + o|^2.

    o: what attention adds to the residual stream x; A: the moving average of the outputs before the token. ids (B, T),
    without padding; the first settings.first tokens of each sequence are left out. A layer with a small error is one
    whose tokens can skip. Nothing is trained or kept. Raises FilterMisuse for a model with blocks of another kind.
    """
    s = settings or Settings()
    family = family_of(model.config.model_type)
    residual: list[torch.Tensor] = []
    errors: list[float] = []

    def before(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        residual[:] = [args[0] if args else kwargs["hidden_states"]]

    def after(attention: nn.Module, args: tuple, output: tuple) -> None:
        found, stream = output[0].float(), residual[0].float()
        missed = found - moving_average(found, None, s.output_gamma)[:, :-1]
        shares = missed.pow(2).sum(-1) / (stream + found).pow(2).sum(-1)
        errors.append(float(shares[:, s.first :].mean()))

    handles = []
    for block in family.blocks(model):
        attention = family.attention_of(block)
        if attention is None:
            raise FilterMisuse("skipping needs attention in every layer, and some have none; use keep")
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(attention.register_forward_hook(after))
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return errors
