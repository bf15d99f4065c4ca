"""A causal LM as kvprune sees it: blocks, attention views, and the head behind them."""

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kvprune.errors import BadOption
from kvprune.models.attention import Attention, AttentionShape, rope_pairs
from kvprune.models.family import check_rope, dense_head_dim, family_of
from kvprune.runtime import PREFIX


class ModelView:
    """A dense model of a supported family. Raises UnsupportedArchitecture for any other."""

    def __init__(self, lm: PreTrainedModel):
        self.lm = lm
        if lm.config.model_type.startswith(PREFIX):
            raise BadOption("the model is pruned already; start from the dense model it came from")
        self.family = family_of(lm.config.model_type)
        config = lm.config
        kv_heads = config.num_key_value_heads
        self.shape = AttentionShape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            kv_heads=kv_heads,
            groups=config.num_attention_heads // kv_heads,
            head_dim=dense_head_dim(config),
        )
        check_rope(config)
        base = lm.base_model
        self.blocks = self.family.blocks(lm)
        self.norm = base.get_submodule(self.family.norm)
        self.attention = [Attention(getattr(b, self.family.attention), self.family, self.shape) for b in self.blocks]

    @property
    def device(self) -> torch.device:
        """Where the input ids go."""
        return cast(torch.Tensor, self.lm.get_input_embeddings().weight).device

    @property
    def units(self) -> torch.Tensor:
        """The channels that must leave Q and K together, (units, channels per unit)."""
        return rope_pairs(self.shape.head_dim, self.family.rope)

    @property
    def frequencies(self) -> torch.Tensor:
        """By how much RoPE turns each pair from one token to the next, radians, (pairs,)."""
        rotary = cast(nn.Module, self.lm.base_model.get_submodule("rotary_emb"))
        return cast(torch.Tensor, rotary.inv_freq).double().cpu()

    @property
    def is_tied(self) -> bool:
        """Whether the output embedding is the input embedding. Not what the config says: a checkpoint with a head of
        its own keeps it, whatever its config promises."""
        return self.head.weight is cast(nn.Module, self.lm.get_input_embeddings()).weight

    @property
    def head(self) -> nn.Module:
        """(..., hidden) behind the final norm -> logits (..., vocabulary)."""
        return self.lm.get_output_embeddings()
