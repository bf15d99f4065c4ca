"""Phase A of KVPruner: how much the loss rises when one block alone loses KV channels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvprune import processes
from kvprune.channels.choice.basis import Basis, Kept
from kvprune.channels.journal import Journal
from kvprune.channels.widths.masking import masked
from kvprune.measure.loss import next_token_loss, scored_tokens
from kvprune.models.finite import not_finite
from kvprune.models.held import held
from kvprune.models.stream import BlockRunner
from kvprune.models.tap import tapped
from kvprune.models.view import ModelView

DENSE = -1  # the journal's probe number of a batch's dense loss


@dataclass(frozen=True)
class Probe:
    """A layer, by its number among those with attention, with only `kept` of the coordinates of its basis."""

    layer: int
    kept: Kept
    basis: Basis


def probe_width(head_dim: int, share: float, unit: int) -> int:
    """Channels a probe keeps when it removes `share` of them, in whole units (RoPE pairs), at least one."""
    return head_dim - max(1, round(head_dim * share / unit)) * unit


@torch.no_grad()
def measure_sensitivity(
    view: ModelView,
    batches: Sequence[torch.Tensor],
    probes: Sequence[Probe],
    journal: Journal,
    advance: Callable[[int], None],
) -> list[float]:
    """Change of the mean loss (nats) for each probe, which touches one block alone.

    batches: token ids (B, T). For each, one dense forward keeps every block's input, so that a probe of block l
    runs blocks l to L - 1 only: L (L + 1) / 2 + L block forwards a batch with one probe a block. One batch's hidden
    states are held at a time. Every finished probe goes to the journal at once and is not measured again. Raises
    NotFinite.
    """
    for number, batch in list(enumerate(batches))[processes.number() :: processes.count()]:
        missing = [probe for probe in range(len(probes)) if (number, probe) not in journal.losses]
        advance(len(probes) - len(missing))
        if missing:
            with tapped(view):
                _probe_batch(view, number, batch, missing, probes, journal, advance)
    for found in processes.gathered(journal.losses):
        journal.losses |= found
    scored = scored_tokens(batches)

    def mean(probe: int) -> float:
        return math.fsum(journal.losses[number, probe] for number in range(len(batches))) / scored

    dense = mean(DENSE)
    return [mean(probe) - dense for probe in range(len(probes))]


def _probe_batch(
    view: ModelView,
    number: int,
    batch: torch.Tensor,
    missing: Sequence[int],
    probes: Sequence[Probe],
    journal: Journal,
    advance: Callable[[int], None],
) -> None:
    """Measure the missing probes on one batch, whose hidden states are gone when this returns."""
    runner = BlockRunner(view, batch)

    def loss(hidden: torch.Tensor) -> float:
        return next_token_loss(view.head, hidden, batch)[0]

    if (number, DENSE) not in journal.losses:
        dense = loss(runner.output)
        broken = None if math.isfinite(dense) else runner.first_broken_block()
        what = "the dense model" if broken is None else f"layer {broken} of the dense model"
        journal.add(number, DENSE, _finite(dense, what, view))
    for index in missing:
        probe = probes[index]
        block = view.attention_layers[probe.layer]
        with held(view.blocks[block]), masked(view.attention[probe.layer], probe.kept, probe.basis):
            changed = loss(runner.rerun(block))
        journal.add(number, index, _finite(changed, f"layer {block}, probed", view))
        advance(1)


def _finite(loss: float, what: str, view: ModelView) -> float:
    if not math.isfinite(loss):
        raise not_finite(f"{what}: the loss on the calibration text", view.lm)
    return loss
