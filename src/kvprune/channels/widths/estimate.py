"""What the loss gains when one block alone is cut, estimated from one backward pass instead of measured by probes.

To second order in what the cut changes: with g the gradient of the summed loss at a block's attention output, and delta
what the cut changes there on the same input, the loss of a token's part changes by g . delta + (g . delta)^2 / 2. The
square stands for the curvature, as the Fisher information does [ours]. It costs two forwards, a backward, and the
probed attentions alone, where probes run every block behind the one that they cut.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvprune.channels.journal import Journal
from kvprune.channels.widths.masking import masked
from kvprune.channels.widths.sensitivity import Probe
from kvprune.measure.loss import scored_tokens
from kvprune.models.attention import Attention
from kvprune.models.backward import Step, backward
from kvprune.models.finite import not_finite
from kvprune.models.tap import tapped
from kvprune.models.view import ModelView
from kvprune.processes import summed, wait


@dataclass(frozen=True)
class Call:
    """One call of an attention module: its arguments, what it put out (1, T, hidden), and the loss's gradient there."""

    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor
    gradient: torch.Tensor


def estimate_sensitivity(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    probes: Sequence[Probe],
    advance: Callable[[int], None],
    journal: Journal | None = None,
) -> list[float]:
    """Estimated change of the mean loss (nats) for each probe, which touches one layer alone.

    batches: token ids (B, T). Memory: the text's hidden states before every block, one block's activations of a
    window, and the inputs and gradients of one attention. `advance` counts layers; those that the journal has are not
    estimated again. Raises NotFinite.
    """
    journal = journal or Journal()
    scored = scored_tokens(batches)
    of_layer: dict[int, list[int]] = {layer: [] for layer in range(view.shape.layers)}
    for number, probe in enumerate(probes):
        of_layer[probe.layer].append(number)
    known = journal.load_estimates()
    wait()
    if len(known) < view.shape.layers:
        with tapped(view):
            for step in backward(view, batches):
                layer = view.layer_at(step.block)
                if layer is None or layer in known:
                    step.run()
                else:
                    mine = [probes[number] for number in of_layer[layer]]
                    changes = torch.tensor(list(_changes(view.attention[layer], step, mine)), dtype=torch.float64)
                    known[layer] = (summed(changes) / scored).tolist()
                    journal.save_estimates(layer, known[layer])
                advance(layer is not None)
    found = {n: change for layer, numbers in of_layer.items() for n, change in zip(numbers, known[layer], strict=True)}
    if not all(map(math.isfinite, found.values())):
        raise not_finite("the gradients on the calibration text", view.lm)
    return [found[number] for number in range(len(probes))]


def _changes(attention: Attention, step: Step, probes: list[Probe]) -> Iterator[float]:
    """The estimated change of the summed loss for each probe of one layer."""
    calls = _seen(attention, step)
    with torch.no_grad():
        for probe in probes:
            total = 0.0
            with masked(attention, probe.kept, probe.basis):
                for call in calls:
                    delta = attention.module(*call.args, **call.kwargs)[0].float() - call.output.float()
                    along = (call.gradient.float() * delta).sum(-1).double()
                    total += float(along.sum() + along.square().sum() / 2)
            yield total


def _seen(attention: Attention, step: Step) -> list[Call]:
    """The attention's calls, window by window, while the gradient goes through its block."""
    seen: list[tuple[tuple, dict[str, Any], torch.Tensor]] = []

    def keep(_module: Any, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        output[0].retain_grad()
        detached = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
        seen.append((tuple(v.detach() for v in args), detached, output[0]))

    hook = attention.module.register_forward_hook(keep, with_kwargs=True)
    try:
        step.run()
    finally:
        hook.remove()
    return [Call(args, kwargs, here.detach(), here.grad) for args, kwargs, here in seen]  # type: ignore[arg-type]
