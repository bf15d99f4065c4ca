"""Weights laid out for a CPU's bfloat16 instructions once, instead of by every product.

Where a CPU multiplies bfloat16 in tiles, oneDNN wants weights in an order of its own. PyTorch's `nn.Linear` puts them
there for every product, which for the few rows of a step of decoding takes as long as the product. Source: what
torch.compile does when it freezes weights; it needs a C++ compiler, this does not.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

ROWS = 8  # that the order is chosen for; any number is right


class PackedLinear(nn.Module):
    """What an `nn.Linear` computes, for inference only: its weight cannot be read back or trained."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return found


def pack_weights(model: PreTrainedModel) -> None:
    """Replace the linear layers of a bfloat16 model on a CPU, where PyTorch and the CPU can do this; a model of another
    kind stays as it is. The layers' own weights are freed, but for an embedding that the output shares."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not _can_pack():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features:  # some read nothing, and are but a constant
                setattr(module, name, PackedLinear(child))


def _can_pack() -> bool:
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return known and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
