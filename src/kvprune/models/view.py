"""A causal LM as kvprune sees it: blocks, attention views, and the head behind them."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kvprune.errors import BadOption, UnsupportedArchitecture
from kvprune.models.attention import Attention, AttentionShape
from kvprune.models.family import Family, check_config, dense_shapes, family_of
from kvprune.models.logits import Head
from kvprune.runtime import PREFIX
from kvprune.runtime.modeling import window_of


def sources_of(lm: PreTrainedModel, family: Family) -> tuple[int, ...]:
    """See AttentionShape: a layer without keys and values of its own attends to those of the last one before it that
    has some and is of its type. Of a dense or a pruned model."""
    found: list[int] = []
    types = getattr(lm.config, "layer_types", None) or [""] * lm.config.num_hidden_layers
    for number, block in enumerate(family.blocks(lm)):
        shares = getattr(getattr(block, family.attention), "is_kv_shared_layer", False)
        alike = [n for n, source in enumerate(found) if source == n and types[n] == types[number]]
        if shares and not alike:
            raise UnsupportedArchitecture(f"layer {number} attends to keys and values that no layer has")
        found.append(alike[-1] if shares else number)
    return () if found == list(range(len(found))) else tuple(found)


class ModelView:
    """A dense model of a supported family. Raises UnsupportedArchitecture for any other."""

    def __init__(self, lm: PreTrainedModel):
        self.lm = lm
        if lm.config.model_type.startswith(PREFIX):
            raise BadOption("the model is pruned already; start from the dense model it came from")
        self.family = family_of(lm.config.model_type)
        check_config(lm.config)
        config = lm.config
        shapes = dense_shapes(config)
        kv_heads, head_dim = shapes[0]
        self.shape = AttentionShape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            kv_heads=kv_heads,
            groups=config.num_attention_heads // kv_heads,
            head_dim=head_dim,
            per_layer=tuple(shapes) if len(set(shapes)) > 1 else (),
            sources=sources_of(lm, self.family),
        )
        self.blocks = self.family.blocks(lm)
        self.norm = lm.base_model.get_submodule(self.family.norm)
        self.attention: list[Attention] = []
        for number, block in enumerate(self.blocks):
            self.attention.append(self._attention(number, block))
        if self.shape.per_layer and not all(attention.has_own_columns for attention in self.attention):
            raise UnsupportedArchitecture("partial rotary embeddings of layers that differ are not supported")

    def _attention(self, number: int, block: nn.Module) -> Attention:
        config: Any = self.lm.config
        module = cast(nn.Module, getattr(block, self.family.attention))
        inv_freq, stretch = self._rope(number)
        context = config.max_position_embeddings
        window = window_of(module, config) or context
        source = self.shape.source(number)
        of_source = None if source == number else self.attention[source]
        return Attention(module, self.family, self.shape.of(number), inv_freq, stretch, min(window, context), of_source)

    def _rope(self, number: int) -> tuple[torch.Tensor | None, float]:
        """The frequencies of block `number`, (pairs,), and what RoPE multiplies by; some models have one table for each
        type of layer."""
        rotary = self.rotary
        if rotary is None:
            return None, 1.0
        types = getattr(self.lm.config, "layer_types", None)
        own = f"{types[number]}_" if types and hasattr(rotary, f"{types[number]}_inv_freq") else ""
        return getattr(rotary, f"{own}inv_freq"), float(getattr(rotary, f"{own}attention_scaling", 1.0))

    @property
    def rotary(self) -> nn.Module | None:
        """What makes the table of cos and sin."""
        return cast(nn.Module | None, getattr(self.lm.base_model, "rotary_emb", None))

    @property
    def twin(self) -> dict[str, Any]:
        """What the config of a pruned twin says beside its widths: arguments of `twin_config`."""
        return {
            "kv_heads": self.shape.kv_heads,
            "columns": int(self.attention[0].columns[-1]),
            "per_layer": self.shape.per_layer,
            "words": self.family.words(),
            "rebuilds": all(attention.has_own_columns for attention in self.attention),
        }

    @property
    def device(self) -> torch.device:
        """Where the input ids go."""
        return cast(torch.Tensor, self.lm.get_input_embeddings().weight).device

    @property
    def units(self) -> torch.Tensor:
        """The channels that must leave Q and K together in the first layer, (units, channels per unit)."""
        return self.attention[0].units

    @property
    def frequencies(self) -> torch.Tensor:
        """By how much RoPE turns each pair from one token to the next in the first layer, radians, (pairs,)."""
        return self.attention[0].frequencies

    @property
    def is_tied(self) -> bool:
        """Whether the output embedding is the input embedding. Not what the config says: a checkpoint with a head of
        its own keeps it, whatever its config promises."""
        return self.head.weight is cast(nn.Module, self.lm.get_input_embeddings()).weight

    @property
    def head(self) -> Head:
        """(..., hidden) behind the final norm -> logits (..., vocabulary)."""
        return Head.of(self.lm)


def has_sinks(lm: PreTrainedModel) -> bool:
    """Whether a model's attention, dense or pruned, has sinks: numbers beside the scores of each softmax."""
    return any(getattr(module, "sinks", None) is not None for module in lm.modules())
