"""Attention of one new token, with the query heads of a group side by side.

Where several query heads share a KV head, PyTorch's attention on a CPU repeats keys and values for each of them, which
for a step of decoding costs more than all the rest. Packed, (B, heads, 1, width) becomes (B, KV heads, group, width):
the same numbers, and each key is read once.

On a GPU cuDNN's attention makes a plan for every new shape, and a cache that grows has one at each step: 4.6 ms a layer
on an H100 (PyTorch 2.11), fifty times the attention. So it is left out where shapes change.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvprune_sdpa"
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def for_any_shape(device: torch.device) -> AbstractContextManager:
    """Where attention is computed by kernels that take a new shape as fast as an old one."""
    is_eager = device.type == "cuda" and not torch.compiler.is_compiling()
    return sdpa_kernel(WITHOUT_PLANS) if is_eager else nullcontext()


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: query (B, heads, T, width), key and value (B, KV heads, tokens, width),
    attention_mask (B, 1, T, tokens) or None -> (B, T, heads, width). More than one query token is left to "sdpa"."""
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    if tokens > 1 or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packed = query.reshape(batch, kv_heads, heads // kv_heads, -1)
    with for_any_shape(query.device):
        found = torch.nn.functional.scaled_dot_product_attention(
            packed, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    return found.reshape(batch, 1, heads, -1), None


def wants_eager(config: PreTrainedConfig) -> bool:
    """Whether attention's scores have a cap. "sdpa" leaves it out, and transformers 5.16 to 5.19 take that for Gemma 2
    all the same."""
    return bool(getattr(config, "attn_logit_softcapping", None))


def pack_groups(model: PreTrainedModel) -> None:
    """Let a model that uses "sdpa" decode with packed groups."""
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
