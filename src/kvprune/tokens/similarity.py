"""How alike a token is to those before it: what thresholds decide by."""

from contextlib import nullcontext

import torch

from kvprune.tokens.anchors import cosine, moving_average
from kvprune.tokens.cache import FilteredLayer
from kvprune.tokens.fusion import Fusion
from kvprune.tokens.step import Step


def similarity(
    layer: FilteredLayer, k: torch.Tensor, v: torch.Tensor, step: Step, gamma: float, fusion: Fusion
) -> torch.Tensor:
    """Of every token of k, v (B, KV heads, T, head_dim) to the anchors before it, (B, T) float64, where the step's
    decisions are made. Moves the anchors on."""
    mixed = torch.is_autocast_enabled(k.device.type)
    with torch.autocast(k.device.type, enabled=False) if mixed else nullcontext():
        x = torch.stack((k, v), dim=1).float()  # (B, 2, KV heads, T, head_dim)
        cosines = _next(layer, x[:, :, :, 0], step, gamma) if step.tokens == 1 else _all(layer, x, step, gamma)
        found = fusion(cosines).to(step.real.device).double()
    if step.order is not None:  # back from real tokens first
        found = found.gather(1, (step.real.cumsum(1) - 1).clamp(min=0))
    return found + step.ties


def _next(layer: FilteredLayer, x: torch.Tensor, step: Step, gamma: float) -> torch.Tensor:
    """Cosines (B, 2, KV heads, 1) of one token of each sequence, x (B, 2, KV heads, head_dim)."""
    start = x if layer.anchor is None else layer.anchor
    if not step.plain:  # padding so far: they start here
        start = torch.where(step.begun.to(x.device).view(-1, 1, 1, 1), start, x)
    moved = torch.lerp(x, start, gamma)
    layer.anchor = moved if step.plain else torch.where(step.real.to(x.device).view(-1, 1, 1, 1), moved, start)
    return cosine(x.unsqueeze(3), start.unsqueeze(3))


def _all(layer: FilteredLayer, x: torch.Tensor, step: Step, gamma: float) -> torch.Tensor:
    """Cosines (B, 2, KV heads, T) of all tokens, real ones first."""
    if step.order is not None:
        index = step.order.to(x.device)[:, None, None, :, None]
        x = x.gather(3, index.expand(-1, *x.shape[1:3], -1, x.shape[4]))
    start = x[:, :, :, 0]
    if layer.anchor is not None:
        start = torch.where(step.begun.to(x.device).view(-1, 1, 1, 1), layer.anchor, start)
    anchors = moving_average(x, start, gamma)
    layer.anchor = anchors[torch.arange(len(x), device=x.device), :, :, step.numbers.to(x.device)]
    return cosine(x, anchors[..., :-1, :])


def uniform(positions: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    """Numbers in [0, 1), float64, that look random and depend on seed, layer and absolute position only (SplitMix64's
    mix, in int64, which wraps around)."""
    x = positions + _signed(seed * 0x632BE59BD9B4E019)
    x = (x * _signed(0x9E3779B97F4A7C15)) ^ _signed((layer + 1) * 0xD1342543DE82EF95)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() / 2.0**53


def _signed(number: int) -> int:
    """The int64 with a number's last 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, as if without a sign."""
    return (x >> by) & (2 ** (64 - by) - 1)
