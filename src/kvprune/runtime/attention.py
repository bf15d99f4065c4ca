"""Attention of one new token, with the query heads of a group side by side.

Where several query heads share a KV head, PyTorch's attention on a CPU repeats keys and values for each of them, which
for a step of decoding costs more than all the rest. Packed, (B, heads, 1, width) becomes (B, KV heads, group, width):
the same numbers, and each key is read once. On a GPU the kernels know groups themselves.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvprune_sdpa"


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
    if tokens > 1 or heads == kv_heads or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packed = query.reshape(batch, kv_heads, heads // kv_heads, -1)
    found = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return found.reshape(batch, 1, heads, -1), None


def pack_groups(model: PreTrainedModel) -> None:
    """Let a model on a CPU that uses "sdpa" decode with packed groups."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
