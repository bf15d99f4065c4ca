"""The gradient of the loss at every attention's output, from one forward and one backward of each window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvprune.measure.loss import next_token_loss
from kvprune.models.stream import frozen
from kvprune.models.view import ModelView


@dataclass(frozen=True)
class Call:
    """One call of an attention module: its arguments, and the gradient of the loss at its output (1, T, hidden)."""

    args: tuple
    kwargs: dict[str, Any]
    gradient: torch.Tensor


def output_gradients(
    view: ModelView, batches: Sequence[torch.Tensor], advance: Callable[[int], None]
) -> list[list[torch.Tensor]]:
    """Per layer and window of the batches (B, T): the gradient of the window's summed loss at the attention's output,
    (T, hidden), in the model's dtype. Memory: these, and one window's activations. `advance` counts windows."""
    found: list[list[torch.Tensor]] = [[] for _ in view.attention]
    for batch in batches:
        for window in batch.split(1):
            for layer, call in zip(found, backward(view, window), strict=True):
                layer.append(call.gradient[0])
            advance(1)
    return found


def backward(view: ModelView, window: torch.Tensor) -> list[Call]:
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
