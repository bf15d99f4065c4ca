"""Phase A of KVPruner: how much the loss rises when one block alone loses KV channels."""

import math
from collections.abc import Callable, Sequence

import torch

from kvprune.channels.journal import Journal
from kvprune.channels.masking import masked
from kvprune.channels.selection import Kept
from kvprune.errors import NotFinite
from kvprune.measure.loss import next_token_loss
from kvprune.models.view import BlockRunner, ModelView

DENSE = -1  # the journal's block number of a batch's dense loss


def probe_width(head_dim: int, share: float, unit: int) -> int:
    """Channels a probe keeps when it removes `share` of them, in whole units (RoPE pairs), at least one."""
    return head_dim - max(1, round(head_dim * share / unit)) * unit


@torch.no_grad()
def measure_sensitivity(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    probes: Sequence[Kept],
    journal: Journal,
    advance: Callable[[int], None],
) -> list[float]:
    """Change of the mean loss (nats) per block, when that block alone keeps only `probes[l]`.

    batches: token ids (B, T). For each, one dense forward keeps every block's input, so that the probe of block l
    runs blocks l to L - 1 only: L (L + 1) / 2 + L block forwards a batch. One batch's hidden states are held at a
    time. Every finished probe goes to the journal at once and is not measured again. Raises NotFinite.
    """
    layers = view.shape.layers
    for number, batch in enumerate(batches):
        missing = [block for block in range(layers) if (number, block) not in journal.losses]
        advance(layers - len(missing))
        if missing:
            _probe_batch(view, number, batch, missing, probes, journal, advance)
    scored = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)

    def mean(block: int) -> float:
        return math.fsum(journal.losses[number, block] for number in range(len(batches))) / scored

    dense = mean(DENSE)
    return [mean(block) - dense for block in range(layers)]


def _probe_batch(
    view: ModelView,
    number: int,
    batch: torch.Tensor,
    missing: Sequence[int],
    probes: Sequence[Kept],
    journal: Journal,
    advance: Callable[[int], None],
) -> None:
    """Measure the missing blocks on one batch, whose hidden states are gone when this returns."""
    runner = BlockRunner(view, batch)

    def loss(hidden: torch.Tensor) -> float:
        return next_token_loss(view.head, hidden, batch)[0]

    if (number, DENSE) not in journal.losses:
        dense = loss(runner.output)
        broken = None if math.isfinite(dense) else runner.first_broken_block()
        what = "the dense model" if broken is None else f"layer {broken} of the dense model"
        journal.add(number, DENSE, _finite(dense, what))
    for block in missing:
        with masked(view.attention[block], probes[block]):
            changed = loss(runner.rerun(block))
        journal.add(number, block, _finite(changed, f"layer {block}, probed"))
        advance(1)


def _finite(loss: float, what: str) -> float:
    if not math.isfinite(loss):
        raise NotFinite(f"{what}: the loss on the calibration text is not finite; try --dtype float32")
    return loss
