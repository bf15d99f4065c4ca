"""The families: where each architecture keeps what kvprune reads and cuts.

A family is a descriptor of a few lines. Everything else in the library sees the same attention,
whatever the family (see attention.py), and has no branch on model_type. Adding one: docs/adding-an-architecture.md.
"""

from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvprune.errors import UnsupportedArchitecture
from kvprune.runtime import PREFIX


@dataclass(frozen=True)
class Family:
    """Paths below the base model, and the shape of the projections.

    layers, norm: the decoder blocks and the norm behind them, from the base model.
    attention: the attention module, from a block; q, k, v, o: its projections (`nn.Linear`, apart).
    mlp, down: the MLP, from a block, and its last matrix, whose output joins the residual stream.
    rope: how RoPE pairs the channels: "half" is (c, c + head_dim / 2), as in Llama.
    portable_as: the stock model_type of this family in the layouts portable and stock (a bias on V wants one on O).
    """

    model_type: str
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    mlp: str = "mlp"
    down: str = "down_proj"
    rope: str = "half"
    portable_as: str = "llama"

    def blocks(self, lm: PreTrainedModel) -> nn.ModuleList:
        """The decoder blocks of a model, dense or pruned."""
        return cast(nn.ModuleList, lm.base_model.get_submodule(self.layers))


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral", portable_as="mistral"),
        Family("qwen2"),  # biases on Q, K and V
    )
}


def family_of(model_type: str) -> Family:
    """The descriptor for a dense or pruned `model_type`; UnsupportedArchitecture names the supported ones."""
    dense = model_type.removeprefix(PREFIX)
    if dense not in FAMILIES:
        raise UnsupportedArchitecture(f"architecture {dense!r} is not supported; {supported()}")
    return FAMILIES[dense]


def dense_head_dim(config: PreTrainedConfig) -> int:
    """Channels of a head in the dense model, from its own config or that of its pruned twin."""
    for name in ("dense_head_dim", "head_dim"):
        if getattr(config, name, None):
            return getattr(config, name)
    return config.hidden_size // config.num_attention_heads


def dense_kv_heads(config: PreTrainedConfig) -> int:
    """KV heads of the dense model, from its own config or that of its pruned twin, whose heads may be merged."""
    return getattr(config, "dense_kv_heads", None) or config.num_key_value_heads


def check_rope(config: PreTrainedConfig) -> None:
    """Raise UnsupportedArchitecture unless RoPE turns all channels of a head."""
    if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture("partial rotary embeddings are not supported for this family")


def supported() -> str:
    """For messages."""
    return f"supported are: {', '.join(sorted(FAMILIES))}"
