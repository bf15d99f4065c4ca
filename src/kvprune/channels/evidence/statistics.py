"""One pass over the calibration text, for what an importance score needs of it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch

from kvprune.channels.choice.basis import Basis, basis_of, slow_channels
from kvprune.channels.evidence.importance.base import Importance, Scores, Statistics
from kvprune.channels.evidence.moments import AttentionMoments, attention_moments, together_of
from kvprune.channels.journal import Journal
from kvprune.measure.loss import scored_tokens
from kvprune.models.backward import backward
from kvprune.models.finite import not_finite
from kvprune.models.held import held
from kvprune.models.stream import enter
from kvprune.models.tap import Seen, tapped, watched
from kvprune.models.view import ModelView
from kvprune.processes import mine, summed, wait

Advance = Callable[[int], None]


def score_layers(
    view: ModelView,
    importance: Importance,
    batches: Sequence[torch.Tensor],
    advance: Advance,
    journal: Journal | None = None,
) -> list[Scores]:
    """Scores of every layer, on the CPU; one pass over the batches (B, T) if the score needs any.

    `advance` counts layers; those that the journal has are not scored again. Raises NotFinite, naming the layer, when
    statistics or scores hold NaN or infinity.
    """
    if importance.needs == "attention":
        return measure_attention(view, batches, importance, None, advance, journal)[0]
    journal, layers = journal or Journal(), range(view.shape.layers)
    found = {i: kept for i in layers if (kept := journal.load_scores(i)) is not None}
    wait()
    advance(len(found))
    if len(found) == len(layers):
        return [found[i] for i in layers]
    for index, statistics in _statistics(view, importance, batches, set(found)):
        with torch.no_grad():
            attention = view.attention[index]
            score = importance.scores(attention.weights(), statistics, attention.units.to(view.device))
        if not all(torch.isfinite(s).all() for s in (score.qk, score.vo)):
            raise not_finite(f"layer {view.attention_layers[index]}: the importance scores", view.lm)
        found[index] = Scores(score.qk.float().cpu(), score.vo.float().cpu())
        journal.save_scores(index, found[index])
        advance(1)
    return [found[i] for i in layers]


def _statistics(
    view: ModelView, importance: Importance, batches: Sequence[torch.Tensor], known: Collection[int]
) -> Iterator[tuple[int, Statistics]]:
    """What a score needs of every layer that is not `known`, whose weights are there while it is looked at."""
    if importance.needs == "energy":
        yield from _energies(view, batches, known)
    elif importance.needs == "gradients":
        yield from _gradients(view, batches, known)
    else:
        for layer, index in enumerate(view.attention_layers):
            with held(view.blocks[index]):
                if layer not in known:
                    yield layer, Statistics()


@torch.no_grad()
def measure_attention(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    importance: Importance,
    merge: int | None,
    advance: Advance,
    journal: Journal | None = None,
) -> tuple[list[Scores], list[Basis] | None]:
    """Scores of an importance that needs attention, and the layers' bases over `merge` KV heads, in one pass.

    The scores are those of the bases' coordinates (vo empty: the leading ones stay); merge None: no bases, and scores
    of channels. With any other importance there are no scores here (score_layers has them, of channels), and so only V
    and O are rotated: merge is then 1. A layer that the journal has is taken from there.
    """
    journal, shape = journal or Journal(), view.shape
    own = importance.needs == "attention"
    none = torch.empty(0, dtype=torch.int64)
    slow = [slow_channels(a) if merge is not None and own else none for a in view.attention]
    layers = {i: kept for i in range(shape.layers) if (kept := journal.load_layer(i)) is not None}
    for index in list(layers):  # those that share keys and values are found together
        if any(i not in layers for i in shape.sharing(shape.source(index))):
            del layers[index]
    wait()
    advance(len(layers))
    found = attention_moments(view, batches, slow, merge or 1, advance, set(layers))
    waiting: dict[int, list[tuple[AttentionMoments, torch.Tensor]]] = {}  # of each layer with keys and values
    for index, moments in zip([i for i in range(shape.layers) if i not in layers], found, strict=True):
        weights, source = view.attention[index].weights(), shape.source(index)
        sharing, seen = shape.sharing(source), waiting.setdefault(source, [])
        seen.append((moments, weights.o))
        if len(seen) < len(sharing):
            seen[-1] = moments.on_cpu(), weights.o.cpu()
            continue
        together, o = together_of(waiting.pop(source))
        weights = replace(weights, o=o)
        empty = torch.empty(len(moments.heads), 0)
        score, basis = Scores(empty, empty), None
        if merge is not None:
            basis, worth = basis_of(together, weights, slow[index])
            score, basis = (Scores(worth, torch.empty(len(worth), 0)), basis) if own else (score, basis.of_values())
        elif own:
            score = importance.scores(weights, Statistics(attention=together), view.attention[index].units)
            score = Scores(score.qk.float().cpu(), score.vo.float().cpu())
        for layer, (of_layer, _) in zip(sharing, seen, strict=True):
            of_own = None if basis is None else replace(basis, moments=of_layer.on_cpu())
            layers[layer] = journal.keep_layer(layer, score, of_own)
    scores = [layers[i][0] for i in range(view.shape.layers)] if own else []
    return scores, None if merge is None else [cast(Basis, layers[i][1]) for i in range(view.shape.layers)]


def _energies(
    view: ModelView, batches: Sequence[torch.Tensor], known: Collection[int]
) -> Iterator[tuple[int, Statistics]]:
    """Mean squares of what Q, K and V put out, summed in float32 within a batch and in float64 over batches."""
    tokens = sum(batch.numel() for batch in batches)
    with torch.no_grad(), tapped(view):
        states, calls = enter(view, mine(batches))
        for index, block in enumerate(view.blocks):
            layer, sums = view.layer_at(index), cast(dict[str, torch.Tensor], {})

            def add(seen: Seen, sums: dict[str, torch.Tensor] = sums) -> None:
                q, k = (seen.before_rope(x.float()) for x in (seen.query, seen.key))
                for name, x in {"q": q, "k": k, "v": seen.value.float()}.items():
                    sums[name] = sums.get(name, 0) + x.square().sum((0, 2)).cpu().double()  # (heads, D)

            with held(block):
                with nullcontext() if layer is None else watched(view.attention[layer], add):
                    calls.take(block, index, states)
                if layer is not None and layer not in known:
                    s = view.attention[layer].shape
                    keys = (s.kv_heads, s.head_dim)
                    shapes = {"q": (s.kv_heads, s.groups, s.head_dim), "k": keys, "v": keys}
                    means = {name: (summed(sums[name]) / tokens).float().view(shape) for name, shape in shapes.items()}
                    yield layer, Statistics(energy=means)


def _gradients(
    view: ModelView, batches: Sequence[torch.Tensor], known: Collection[int]
) -> Iterator[tuple[int, Statistics]]:
    """Gradients of the mean loss in the attention projections alone, summed in float32, block by block from the last
    one on. A gradient is added to its sum and dropped as soon as it exists."""
    scored = scored_tokens(batches)
    for step in backward(view, batches):
        layer = view.layer_at(step.block)
        if layer is None or layer in known:
            step.run()
            continue
        attention = view.attention[layer]
        parameters = attention.parameters()
        sums: dict[Any, torch.Tensor] = {p: torch.zeros_like(p, dtype=torch.float32) for p in parameters}

        def collect(parameter: Any, sums: dict[Any, torch.Tensor] = sums) -> None:
            assert parameter.grad is not None
            sums[parameter] += parameter.grad
            parameter.grad = None

        hooks = [p.requires_grad_(True).register_post_accumulate_grad_hook(collect) for p in parameters]
        try:
            step.run()
        finally:
            for hook, parameter in zip(hooks, parameters, strict=True):
                hook.remove()
                parameter.requires_grad_(False)
        means = {parameter: summed(total) / scored for parameter, total in sums.items()}
        yield layer, Statistics(gradients=attention.weights(of=means.__getitem__))
