"""What a recovery minimises: next tokens, or the dense teacher's logits and attention outputs.

One class a loss, and a line in LOSSES. Vocabulary-sized tensors exist in pieces only: the output embedding is frozen,
so d(loss) / d(hidden) is all that a backward pass needs, and it is computed piece by piece in the forward pass. Because
that happens inside an autograd function, gradient scaling, DDP and gradient checkpointing see an ordinary scalar loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch.autograd.function import once_differentiable

from kvprune.measure.loss import PIECE, cross_entropy
from kvprune.models.logits import Head
from kvprune.recovery.data import Data


@dataclass
class Outputs:
    """What a model made of a batch: final hidden states (B, T, hidden) behind the norm, the head that turns them
    into logits, and (B, T, hidden) per layer behind O if attention outputs were asked for."""

    head: Head
    hidden: torch.Tensor
    attention: list[torch.Tensor]


class Loss(Protocol):
    """Scalar mean loss of a batch. needs_teacher, needs_attention: what `teacher` and Outputs.attention must hold."""

    needs_teacher: bool
    needs_attention: bool

    def __init__(self, temperature: float, attention_weight: float): ...

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Data) -> torch.Tensor: ...


@dataclass
class NextToken:
    """Cross-entropy of the next token, nats per scored token."""

    needs_teacher = False
    needs_attention = False
    temperature: float = 1.0
    attention_weight: float = 1.0

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Data) -> torch.Tensor:
        return next_token_sum(student, batch) / max(batch.scored, 1)


@dataclass
class Logits:
    """T^2 * KL(teacher || student) of the next-token distributions at temperature T, nats per scored token.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531). Tokens whose label is masked
    are left out, as in NextToken.
    """

    needs_teacher = True
    needs_attention = False
    temperature: float = 1.0
    attention_weight: float = 1.0

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Data) -> torch.Tensor:
        assert teacher is not None
        scores = batch.labels[:, 1:] != -100
        targets = teacher.hidden[:, :-1][scores]

        def piece(states: torch.Tensor, place: slice, gradient: bool):
            return distil(student.head, states, teacher.head, targets[place], self.temperature, gradient)

        return _pieced(student.hidden[:, :-1][scores], student.head, piece) / max(batch.scored, 1)


@dataclass
class LogitsAndAttention(Logits):
    """Logits, plus attention_weight * the mean over layers and windows of |student - teacher|^2 / |teacher|^2 of the
    attention outputs (behind O), at every position of a window that is no padding. Windows count by the tokens that
    are scored in them, so that the pieces of a batch add up to it."""

    needs_attention = True

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Data) -> torch.Tensor:
        assert teacher is not None
        real = (torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.lengths.unsqueeze(1)).unsqueeze(2)
        distances = []
        for mine, theirs in zip(student.attention, teacher.attention, strict=True):
            away, whole = (mine.float() - theirs.float()) * real, theirs.float() * real
            distances.append(away.square().sum((1, 2)) / whole.square().sum((1, 2)))
        scored = (batch.labels[:, 1:] != -100).sum(1)
        mean = (torch.stack(distances).mean(0) * scored).sum() / max(batch.scored, 1)
        return super().__call__(student, teacher, batch) + self.attention_weight * mean


LOSSES: dict[str, type[Loss]] = {"next-token": NextToken, "logits": Logits, "logits+attention": LogitsAndAttention}


def next_token_sum(student: Outputs, batch: Data) -> torch.Tensor:
    """Summed cross-entropy (nats) of the tokens whose label is not masked."""
    scores = batch.labels[:, 1:] != -100
    labels = batch.labels[:, 1:][scores]

    def piece(states: torch.Tensor, place: slice, gradient: bool):
        return cross_entropy(student.head, states, labels[place], gradient)

    return _pieced(student.hidden[:, :-1][scores], student.head, piece)


@torch.no_grad()
def distil(
    head: Head,
    states: torch.Tensor,
    teacher_head: Head,
    teacher_states: torch.Tensor,
    temperature: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """T^2 * summed KL(teacher || student) (float64), states (n, hidden) each, and its gradient in the student's.

    With q = softmax(student logits / T) and p the teacher's, d(loss) / d(student logits) = T * (q - p).
    """
    logits = _wide(head(states))
    slope = head.slope(logits) if gradient else 1.0
    log_q = (logits / temperature).log_softmax(1)
    log_p = (_wide(teacher_head(teacher_states)) / temperature).log_softmax(1)
    p = log_p.exp()
    loss = temperature**2 * (p * log_p.sub_(log_q)).sum().cpu().double()
    if not gradient:
        return loss, None
    difference = log_q.exp_().sub_(p).mul_(temperature)
    return loss, head.back(difference, slope)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


Piece = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, torch.Tensor | None]]


def _pieced(states: torch.Tensor, head: Head, piece: Piece) -> torch.Tensor:
    """The sum of `piece` over pieces of states (n, hidden), with a gradient where the states want one."""
    size = max(PIECE // head.weight.shape[0], 16)
    places = [slice(start, start + size) for start in range(0, len(states), size)]
    if states.requires_grad and torch.is_grad_enabled():
        return cast(torch.Tensor, _Pieces.apply(states, piece, places))
    total = torch.zeros((), dtype=torch.float64)
    for place in places:
        total += piece(states[place], place, False)[0]
    return _scalar(total, states)


def _scalar(total: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return total.to(torch.promote_types(states.dtype, torch.float32)).to(states.device)


class _Pieces(torch.autograd.Function):
    """A sum whose gradient is computed on the way."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, piece: Piece, places: list[slice]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        gradient = torch.empty_like(states)
        for place in places:
            loss, gradient[place] = cast(tuple[torch.Tensor, torch.Tensor], piece(states[place], place, True))
            total += loss
        ctx.save_for_backward(gradient)
        return _scalar(total, states)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None
