"""NaN and infinity: where they come from, and what mends it."""

import torch
from transformers import PreTrainedModel

from kvprune.errors import NotFinite
from kvprune.models.held import each_parameter
from kvprune.runtime.dtype import name_of


def not_finite(what: str, lm: PreTrainedModel) -> NotFinite:
    """The error for NaN or infinity in `what`, which `lm` has computed, with the cause and the remedy.

    A weight that holds some is named. In float16 an infinite one may be whole in the checkpoint.
    """
    for name, weight in each_parameter(lm):
        if weight.layout is not torch.strided or torch.isfinite(weight).all():  # packed weights cannot be read
            continue
        if lm.dtype == torch.float16 and not torch.isnan(weight).any():
            return NotFinite(f"{what}: not finite, since {name} is too large for float16; try --dtype float32")
        return NotFinite(f"{what}: not finite, since {name} holds NaN or infinity; fetch or make the checkpoint again")
    if lm.dtype != torch.float32:
        return NotFinite(f"{what}: not finite in {name_of(lm.dtype)}; try --dtype float32")
    return NotFinite(
        f"{what}: not finite in float32, though all weights are: activations overflow; the checkpoint is damaged, or "
        "its config.json is another model's"
    )
