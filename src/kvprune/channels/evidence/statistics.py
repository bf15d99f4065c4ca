"""One pass over the calibration text, for what an importance score needs of it."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from kvprune.channels.choice.basis import Basis, basis_of, slow_channels
from kvprune.channels.evidence.importance.base import Importance, Scores, Statistics
from kvprune.channels.evidence.moments import attention_moments
from kvprune.measure.loss import next_token_loss
from kvprune.models.attention import Attention, AttentionWeights
from kvprune.models.finite import not_finite
from kvprune.models.stream import frozen
from kvprune.models.tap import Seen, tapped, watched
from kvprune.models.view import ModelView

Advance = Callable[[int], None]


def score_layers(
    view: ModelView, importance: Importance, batches: Iterable[torch.Tensor], advance: Advance
) -> list[Scores]:
    """Scores of every layer, on the CPU; one pass over the batches (B, T) if the score needs any.

    `advance` counts windows, or layers for a score that needs attention. Raises NotFinite, naming the layer, when
    statistics or scores hold NaN or infinity.
    """
    if importance.needs == "attention":
        return measure_attention(view, list(batches), importance, None, advance)[0]
    if importance.needs == "energy":
        statistics = _energies(view, batches, advance)
    elif importance.needs == "gradients":
        statistics = _gradients(view, batches, advance)
    else:
        statistics = [Statistics() for _ in view.attention]
    scores = []
    for index, (attention, of_layer) in enumerate(zip(view.attention, statistics, strict=True)):
        with torch.no_grad():
            score = importance.scores(attention.weights(), of_layer, view.units.to(view.device))
        if not all(torch.isfinite(s).all() for s in (score.qk, score.vo)):
            raise not_finite(f"layer {index}: the importance scores", view.lm)
        scores.append(Scores(score.qk.float().cpu(), score.vo.float().cpu()))
    return scores


@torch.no_grad()
def measure_attention(
    view: ModelView, batches: Sequence[torch.Tensor], importance: Importance, merge: int | None, advance: Advance
) -> tuple[list[Scores], list[Basis] | None]:
    """Scores of an importance that needs attention, and the layers' bases over `merge` KV heads, in one pass.

    The scores are those of the bases' coordinates (vo empty: the leading ones stay); merge None: no bases, and scores
    of channels. With any other importance there are no scores here (score_layers has them, of channels), and so only V
    and O are rotated: merge is then 1.
    """
    own = importance.needs == "attention"
    none = torch.empty(0, dtype=torch.int64)
    slow = [slow_channels(a) if merge is not None and own else none for a in view.attention]
    scores, bases = [], []
    found = attention_moments(view, batches, slow, merge or 1, advance)
    for attention, moments, channels in zip(view.attention, found, slow, strict=True):
        weights = attention.weights()
        score = importance.scores(weights, Statistics(attention=moments), view.units) if own and not merge else None
        if merge is not None:
            basis, worth = basis_of(moments, weights, channels)
            if own:
                score = Scores(worth, torch.empty(len(worth), 0))
            else:
                basis = basis.of_values()
            bases.append(basis)
        if score is not None:
            scores.append(Scores(score.qk.float().cpu(), score.vo.float().cpu()))
    return scores, None if merge is None else bases


@torch.no_grad()
def _energies(view: ModelView, batches: Iterable[torch.Tensor], advance: Advance) -> list[Statistics]:
    """Mean squares of what Q, K and V put out, summed in float32 within a batch and in float64 over batches."""
    s = view.shape
    sums: dict[tuple[int, str], torch.Tensor] = {}

    def add(index: int, seen: Seen) -> None:
        named = {"q": seen.before_rope(seen.query.float()), "k": seen.before_rope(seen.key.float()), "v": seen.value}
        for name, x in named.items():
            square = x.float().square().sum((0, 2)).cpu().double()  # (heads, D)
            sums[index, name] = sums.get((index, name), 0) + square

    tokens = 0
    with ExitStack() as stack:
        stack.enter_context(tapped(view))
        for index, attention in enumerate(view.attention):
            stack.enter_context(watched(attention, partial(add, index)))
        for batch in batches:
            view.lm.base_model(input_ids=batch.to(view.device), use_cache=False)
            tokens += batch.numel()
            advance(len(batch))
    shapes = {"q": (s.kv_heads, s.groups, s.head_dim), "k": (s.kv_heads, s.head_dim), "v": (s.kv_heads, s.head_dim)}
    return [
        Statistics(energy={n: (sums[i, n] / tokens).float().view(shape) for n, shape in shapes.items()})
        for i in range(s.layers)
    ]


def _gradients(view: ModelView, batches: Iterable[torch.Tensor], advance: Advance) -> list[Statistics]:
    """Gradients of the mean loss in the attention projections alone, summed in float32.

    One window at a time goes through autograd, so that its activations stay small, and a gradient is added
    to its sum and dropped as soon as it exists.
    """
    parameters = [p for attention in view.attention for p in attention.parameters()]
    sums: dict[Any, torch.Tensor] = {p: torch.zeros_like(p, dtype=torch.float32) for p in parameters}
    hooks = []

    def collect(parameter: Any) -> None:
        assert parameter.grad is not None
        sums[parameter] += parameter.grad
        parameter.grad = None

    scored = 0
    with frozen(view.lm):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
                hooks.append(parameter.register_post_accumulate_grad_hook(collect))
            for batch in batches:
                for window in batch.to(view.device).split(1):
                    with torch.enable_grad():
                        hidden = view.lm.base_model(input_ids=window, use_cache=False).last_hidden_state
                    _, tokens, grad = next_token_loss(view.head, hidden.detach(), window, gradient=True)
                    hidden.backward(grad)
                    scored += tokens
                advance(len(batch))
        finally:
            for hook in hooks:
                hook.remove()
    for total in sums.values():
        total /= scored
    return [Statistics(gradients=_as_gradients(attention, sums)) for attention in view.attention]


def _as_gradients(attention: Attention, sums: dict[Any, torch.Tensor]) -> AttentionWeights:
    return attention.weights(of=lambda parameter: sums[parameter])
