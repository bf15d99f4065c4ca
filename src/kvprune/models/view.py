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


def attention_of(lm: PreTrainedModel, family: Family) -> dict[int, nn.Module]:
    """The attention modules of a dense or a pruned model, by the number of their block."""
    found = {number: family.attention_of(block) for number, block in enumerate(family.blocks(lm))}
    return {number: module for number, module in found.items() if module is not None}


def _sources(config: Any, modules: dict[int, nn.Module]) -> tuple[int, ...]:
    """See AttentionShape: a layer without keys and values of its own attends to those of the last one before it that
    has some and is of its type. modules: see `attention_of`."""
    found: list[int] = []
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    numbers = list(modules)
    for layer, (number, module) in enumerate(modules.items()):
        shares = getattr(module, "is_kv_shared_layer", False)
        alike = [n for n, source in enumerate(found) if source == n and types[numbers[n]] == types[number]]
        if shares and not alike:
            raise UnsupportedArchitecture(f"layer {number} attends to keys and values that no layer has")
        found.append(alike[-1] if shares else layer)
    return () if found == list(range(len(found))) else tuple(found)


class ModelView:
    """A dense model of a supported family. Raises UnsupportedArchitecture for any other.

    attention: the view of each layer that has one, and a KV cache; attention_layers: its number among the blocks. In a
    hybrid the other blocks have a mixer of another kind, whose state does not grow: they are run, and stay as they are.
    """

    def __init__(self, lm: PreTrainedModel):
        self.lm = lm
        if lm.config.model_type.startswith(PREFIX):
            raise BadOption("the model is pruned already; start from the dense model it came from")
        self.family = family_of(lm.config.model_type)
        check_config(lm.config)
        config = lm.config
        self.blocks = self.family.blocks(lm)
        found = attention_of(lm, self.family)
        if not found:
            raise UnsupportedArchitecture(f"this {config.model_type} has no layer with attention, so no KV cache")
        self.attention_layers = list(found)
        every = dense_shapes(config)
        shapes = [every[number] for number in found]
        kv_heads, head_dim = shapes[0]
        self.shape = AttentionShape(
            layers=len(found),
            hidden=config.hidden_size,
            kv_heads=kv_heads,
            groups=config.num_attention_heads // kv_heads,
            head_dim=head_dim,
            per_layer=tuple(shapes) if len(set(shapes)) > 1 else (),
            sources=_sources(config, found),
            attention_layers=None if len(found) == len(self.blocks) else tuple(found),
        )
        self.norm = lm.base_model.get_submodule(self.family.norm)
        self.attention: list[Attention] = []
        for layer, module in enumerate(found.values()):
            self.attention.append(self._attention(layer, module))
        if self.shape.per_layer and not all(attention.has_own_columns for attention in self.attention):
            raise UnsupportedArchitecture("partial rotary embeddings of layers that differ are not supported")

    def layer_at(self, block: int) -> int | None:
        """Which one of `attention` is in block number `block`; None for none."""
        return self.attention_layers.index(block) if block in self.attention_layers else None

    def _attention(self, layer: int, module: nn.Module) -> Attention:
        config: Any = self.lm.config
        inv_freq, stretch = self._rope(self.attention_layers[layer])
        context = config.max_position_embeddings
        window = window_of(module, config) or context
        source = self.shape.source(layer)
        of_source = None if source == layer else self.attention[source]
        return Attention(module, self.family, self.shape.of(layer), inv_freq, stretch, min(window, context), of_source)

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
            "attention_layers": self.shape.attention_layers,
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
