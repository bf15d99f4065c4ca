"""Next-token loss in pieces: the logits of a whole batch are never in memory at once."""

from collections.abc import Sequence
from typing import cast

import torch
from torch.nn import functional as F

from kvprune.models.logits import Head

# Logits that exist at a time: 24 MiB in float32. Larger pieces leave a CPU's cache and make malloc ask the
# operating system for fresh pages every time.
PIECE = 6 * 2**20


def scored_tokens(batches: Sequence[torch.Tensor]) -> int:
    """How many tokens of batches (B, T) are scored: all but the first of each window."""
    return sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)


def next_token_loss(
    head: Head, hidden: torch.Tensor, input_ids: torch.Tensor, *, gradient: bool = False
) -> tuple[float, int, torch.Tensor | None]:
    """Summed negative log-likelihood (nats) of every next token, and how many tokens were scored.

    head: (n, hidden) -> (n, vocabulary); hidden (B, T, hidden) behind the final
    norm; input_ids (B, T). Every token but a window's first is scored. With `gradient`, the third value is
    d(loss sum) / d(hidden), (B, T, hidden).
    """
    states = hidden[:, :-1].flatten(0, 1)
    labels = input_ids[:, 1:].flatten().to(states.device)
    vocabulary, width = head.weight.shape
    total = torch.zeros((), dtype=torch.float64)
    grads = []
    tokens = max(PIECE // vocabulary, 16)
    for piece, label in zip(states.split(tokens), labels.split(tokens), strict=True):
        loss, grad = cross_entropy(head, piece, label, gradient)
        total += loss
        grads.append(cast(torch.Tensor, grad))
    if not gradient:
        return total.item(), len(labels), None
    flat = torch.cat(grads).view(hidden.shape[0], hidden.shape[1] - 1, width)
    return total.item(), len(labels), F.pad(flat, (0, 0, 0, 1))  # a window's last token predicts nothing


@torch.no_grad()
def cross_entropy(
    head: Head, states: torch.Tensor, labels: torch.Tensor, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed cross-entropy of one piece (float64), and its gradient in the states if asked for.

    states (n, hidden), labels (n,). All n rows of logits exist at once: the caller cuts the pieces.

    Everything happens in the one float32 copy of the logits: on a CPU a third less time than torch's own, which
    keeps two more copies.
    """
    logits = head(states).float()
    slope = head.slope(logits) if gradient else 1.0
    chosen = logits.gather(1, labels.unsqueeze(1))
    largest = logits.amax(1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
    loss = (sums.log() + largest - chosen).sum().cpu().double()
    if not gradient:
        return loss, None
    probabilities = logits.div_(sums)
    probabilities.scatter_add_(1, labels.unsqueeze(1), torch.full_like(chosen, -1.0))
    return loss, head.back(probabilities, slope)
