"""What the loss gains when one block alone is cut, estimated from one backward pass instead of measured by probes.

To second order in what the cut changes: with g the gradient of the summed loss at a block's attention output, and delta
what the cut changes there on the same input, the loss of a token's part changes by g . delta + (g . delta)^2 / 2. The
square stands for the curvature, as the Fisher information does [ours]. It costs a forward, a backward, and the probed
attentions alone, where probes run every block behind the one that they cut.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from kvprune.channels.widths.masking import masked
from kvprune.channels.widths.sensitivity import Probe
from kvprune.measure.loss import next_token_loss
from kvprune.models.finite import not_finite
from kvprune.models.stream import frozen
from kvprune.models.tap import tapped
from kvprune.models.view import ModelView


@dataclass(frozen=True)
class Call:
    """One call of an attention module: its arguments, and the gradient of the loss at its output (1, T, hidden)."""

    args: tuple
    kwargs: dict[str, Any]
    gradient: torch.Tensor


def estimate_sensitivity(
    view: ModelView, batches: Sequence[torch.Tensor], probes: Sequence[Probe], advance: Callable[[int], None]
) -> list[float]:
    """Estimated change of the mean loss (nats) for each probe, which touches one block alone.

    batches: token ids (B, T). Memory: a window's activations, and a batch's inputs and gradients of all attentions.
    `advance` counts batches. Raises NotFinite.
    """
    totals = torch.zeros(len(probes), dtype=torch.float64)
    numbered = sorted(enumerate(probes), key=lambda item: item[1].block)
    with tapped(view):
        for batch in batches:
            calls = [_backward(view, window) for window in batch.split(1)]
            for block, group in groupby(numbered, key=lambda item: item[1].block):
                found = [of_window[block] for of_window in calls]
                for number, change in _changes(view, block, list(group), found):
                    totals[number] += change
            advance(1)
    scored = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    if not torch.isfinite(totals).all():
        raise not_finite("the gradients on the calibration text", view.lm)
    return (totals / scored).tolist()


@torch.no_grad()
def _changes(
    view: ModelView, block: int, probes: list[tuple[int, Probe]], calls: list[Call]
) -> Iterator[tuple[int, float]]:
    """(number of the probe, estimated change of the summed loss) of one block's probes."""
    attention = view.attention[block]
    dense = [_output(attention.module, call) for call in calls]
    for number, probe in probes:
        total = 0.0
        with masked(attention, probe.kept, probe.basis):
            for call, before in zip(calls, dense, strict=True):
                delta = _output(attention.module, call).float() - before.float()
                along = (call.gradient.float() * delta).sum(-1).double()
                total += float(along.sum() + along.square().sum() / 2)
        yield number, total


def _output(module: Any, call: Call) -> torch.Tensor:
    return module(*call.args, **call.kwargs)[0]


def _backward(view: ModelView, window: torch.Tensor) -> list[Call]:
    """Every block's attention in one forward and backward of a window (1, T)."""
    seen: list[tuple[tuple, dict[str, Any], torch.Tensor]] = []

    def keep(_module: Any, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple:
        here = output[0] if output[0].requires_grad else output[0].detach().requires_grad_()
        here.retain_grad()
        detached = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
        seen.append((tuple(v.detach() for v in args), detached, here))
        return (here, *output[1:])

    ids = window.to(view.device)
    hooks = [a.module.register_forward_hook(keep, with_kwargs=True) for a in view.attention]
    try:
        with frozen(view.lm), torch.enable_grad():
            hidden = view.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
            _, _, gradient = next_token_loss(view.head, hidden.detach(), ids, gradient=True)
            hidden.backward(gradient)
    finally:
        for hook in hooks:
            hook.remove()
    return [Call(args, kwargs, here.grad) for args, kwargs, here in seen]  # type: ignore[arg-type]
