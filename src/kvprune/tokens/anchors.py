"""Anchors: moving averages of what a layer has seen, and how near a token is to them.

Source: Token Filtering (arXiv 2512.07090): A <- gamma * A + (1 - gamma) * x. Ours: an anchor starts at the first
token, every token is compared with the anchor *before* it, and every token, skipped or not, then updates it.
"""

from functools import lru_cache

import torch

BLOCK = 64  # tokens whose powers of gamma are taken at once: gamma^-t over a whole prompt would overflow


def moving_average(x: torch.Tensor, anchor: torch.Tensor | None, gamma: float) -> torch.Tensor:
    """The anchor before every token, and behind the last one.

    x (..., T, D); anchor (..., D) from earlier tokens, or None at the first. Returns (..., T + 1, D): entry t is the
    anchor that token t meets, so the entry of a number of tokens is the anchor behind them. A loop over blocks carries
    the anchor; within a block it is one product with the powers of gamma.
    """
    tokens = x.shape[-2]
    if anchor is None:
        anchor = x[..., 0, :]
    if tokens == 1:
        return torch.stack((anchor, torch.lerp(x[..., 0, :], anchor, gamma)), dim=-2)
    found = x.new_empty(*x.shape[:-2], tokens + 1, x.shape[-1])
    weights, decay = _powers(gamma, x.dtype, x.device)
    for start in range(0, tokens, BLOCK):
        piece = x[..., start : start + BLOCK, :]
        n = piece.shape[-2]
        before = weights[: n + 1, :n] @ piece + decay[: n + 1] * anchor.unsqueeze(-2)
        found[..., start : start + n + 1, :] = before
        anchor = before[..., n, :]
    return found


@lru_cache(maxsize=64)
def _powers(gamma: float, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(n + 1, n) with (1 - gamma) * gamma^(t - 1 - s) where s < t, and (n + 1, 1) with gamma^t, for a BLOCK of n. Made
    once, and where they are used: to bring something to a GPU makes the host wait."""
    with torch.inference_mode(False):
        t, s = torch.arange(BLOCK + 1, device=device).unsqueeze(1), torch.arange(BLOCK, device=device)
        age = t - 1 - s
        weights = torch.where(age >= 0, (1 - gamma) * gamma ** age.clamp_min(0).double(), 0.0)
        return weights.to(dtype), (gamma ** t.double()).to(dtype)


def cosine(x: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between tokens and the anchors they meet, both (..., T, D) -> (..., T)."""
    return torch.nn.functional.cosine_similarity(x, anchors, dim=-1)
