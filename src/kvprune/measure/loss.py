"""Next-token loss in pieces: the logits of a whole batch are never in memory at once."""

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

# Logits that exist at a time: 24 MiB in float32. Larger pieces leave a CPU's cache and make malloc ask the
# operating system for fresh pages every time.
PIECE = 6 * 2**20


def next_token_loss(
    head: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor, *, gradient: bool = False
) -> tuple[float, int, torch.Tensor | None]:
    """Summed negative log-likelihood (nats) of every next token, and how many tokens were scored.

    head: the output embedding, (n, hidden) -> (n, vocabulary); hidden (B, T, hidden) behind the final
    norm; input_ids (B, T). Every token but a window's first is scored. With `gradient`, the third value is
    d(loss sum) / d(hidden), float32 inside a piece, in hidden's dtype outside.
    """
    states = hidden[:, :-1].flatten(0, 1)
    vocabulary = cast(torch.Tensor, head.weight).shape[0]
    labels = input_ids[:, 1:].flatten().to(states.device)
    total = torch.zeros((), dtype=torch.float64)
    grads = []
    tokens = max(PIECE // vocabulary, 16)
    for piece, label in zip(states.split(tokens), labels.split(tokens), strict=True):
        if not gradient:
            total += F.cross_entropy(head(piece).float(), label, reduction="sum").double().cpu()
            continue
        with torch.enable_grad():
            piece = piece.detach().requires_grad_()
            loss = F.cross_entropy(head(piece).float(), label, reduction="sum")
            (grad,) = torch.autograd.grad(loss, piece)
        total += loss.detach().double().cpu()
        grads.append(grad)
    if not gradient:
        return total.item(), len(labels), None
    flat = torch.cat(grads).view(hidden.shape[0], hidden.shape[1] - 1, hidden.shape[2])
    return total.item(), len(labels), F.pad(flat, (0, 0, 0, 1))  # a window's last token predicts nothing
