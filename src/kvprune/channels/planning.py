"""Phase A and B: scores, sensitivities, widths, and the channels that stay."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from kvprune.channels.choice.basis import Basis, Kept, identity
from kvprune.channels.choice.merging import AUTO, WIDEST, check_alike, for_ranks, merge_of, stock_merge
from kvprune.channels.choice.selection import leading, one_of_each, select, shared_pairs
from kvprune.channels.evidence.importance import IMPORTANCE, Scores
from kvprune.channels.evidence.statistics import measure_attention, score_layers
from kvprune.channels.journal import Journal
from kvprune.channels.plan import LayerPlan, Model, PruningPlan
from kvprune.channels.settings import ESTIMATED_ON, Settings
from kvprune.channels.widths import allocation
from kvprune.channels.widths.asked import layers_gone, ratio_left
from kvprune.channels.widths.blocks import Dropped, choose_blocks, skipping
from kvprune.channels.widths.depth import choose_depth, masked_loss, widths_without
from kvprune.channels.widths.estimate import estimate_sensitivity
from kvprune.channels.widths.sensitivity import Probe, measure_sensitivity, probe_width
from kvprune.engines.targets import find_target
from kvprune.errors import BadOption, PlanMismatch
from kvprune.models.attention import AttentionShape, rope_pairs
from kvprune.models.source import Source
from kvprune.models.view import ModelView
from kvprune.text.windows import digest
from kvprune.versions import versions

BUDGET_PROBES = (0.25, 0.5, 0.75)  # shares of a block's channels that `budget` probes


def grid_of(s: Settings, view: ModelView, merge: int, target: str | None = None) -> allocation.Grid:
    """The widths that a layer can have, for an engine, if one is named. Raises BadOption."""
    shape, unit = view.shape, view.units.shape[1]

    def widest(head_dim: int) -> int | None:
        return max(WIDEST, head_dim) if merge > 1 else None

    stores = [shape.of(layer) for layer in shape.stores]  # others have no bytes of their own
    each = (
        allocation.LayerGrid(own.kv_heads // merge, own.head_dim * merge, widest(own.head_dim))
        for own in stores
        if shape.per_layer
    )
    channels = shape.head_dim * merge
    grid = allocation.Grid(len(stores), channels, s.align, s.min_width, unit, widest(shape.head_dim), tuple(each))
    return grid if target is None else replace(grid, refused=find_target(target).refused)


def reachable(s: Settings, grid: allocation.Grid) -> None:
    """Raise UnreachableRatio, before any work is done, for a ratio that the layout cannot reach."""
    if s.layout == "stock":
        return  # choose_merge has looked at it
    if s.layout != "per-layer":
        allocation.one_width(s.ratio, grid)
    else:
        ratio_left(s.ratio, grid.layers, s.drop_blocks, s.depth)  # refuses what is too many, by its option
        widths_without(range(layers_gone(s.drop_blocks, s.depth)), s.ratio, grid)


def choose_merge(s: Settings, shape: AttentionShape, say: Callable[[str], None]) -> int:
    """How many KV heads become one. Raises BadOption or UnreachableRatio for what cannot be.

    auto: see merging.merge_of; heads stay apart where channels are cut as they are, without a change of basis across
    heads, and where nothing is cut; ranks of tensor parallelism are left a whole number of heads each, if there are as
    many. Layout stock: see merging.stock_merge.
    """
    check_alike(shape, s.layout, s.drop_blocks, s.depth, str(s.allocation), s.importance)
    merge = _merge(s, shape, say)
    return for_ranks(merge, s.merge == AUTO and s.layout != "stock", shape.shared_heads, s.tensor_parallel, say)


def _merge(s: Settings, shape: AttentionShape, say: Callable[[str], None]) -> int:
    ratio = ratio_left(s.ratio, shape.layers, s.drop_blocks, s.depth)  # of the layers that keep their attention
    if s.layout == "stock":
        return stock_merge(s.merge, shape.kv_heads, s.ratio)
    if s.ratio == 0 and s.merge not in (AUTO, 1):
        raise BadOption(f"--ratio 0 removes nothing, so no KV heads are merged; leave out --merge {s.merge}")
    if s.merge == AUTO:
        if not s.can_merge or abs(ratio) < 1e-9:
            return 1
        if shape.shared_heads == 1:
            alike = "one KV head" if shape.kv_heads == 1 else "layers whose KV heads nothing divides"
            say(f"the model has {alike}, so there are none to merge")
    return merge_of(s.merge, shape.shared_heads, shape.head_dims[-1], ratio)


def first_windows(batches: list[torch.Tensor], tokens: int | None) -> list[torch.Tensor]:
    """As many whole windows of batches (B, T) as hold so many tokens, at least one; None: all."""
    if tokens is None:
        return batches
    found, left = [], tokens
    for batch in batches:
        if left > 0:
            found.append(batch[: math.ceil(left / batch.shape[1])])
            left -= found[-1].numel()
    return found


@dataclass
class Planner:
    """Makes the plan of one run. batches: the calibration text, token ids (B, T) each."""

    settings: Settings
    view: ModelView
    merge: int
    grid: allocation.Grid
    batches: list[torch.Tensor]
    journal: Journal
    phase: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
    say: Callable[[str], None]

    def plan(self, source: Source) -> tuple[PruningPlan, list[Basis] | None]:
        """The plan, and the bases it goes with."""
        s = self.settings
        sensitivity, bases, dropped = None, None, Dropped()
        if s.ratio == 0:
            every = [leading(shape.kv_heads, shape.head_dim) for shape in self.view.shape.each]
            kept = [Kept(channels, channels) for channels in every]
        else:
            scores, bases = self._scores()
            if s.layout == "portable":
                scores = shared_pairs(scores)
            dropped = self._blocks()
            of_stores, sensitivity = self._widths(scores, bases, dropped)
            shape = self.view.shape
            widths = [of_stores[shape.stores.index(shape.source(layer))] for layer in range(shape.layers)]
            if s.layout == "stock":
                kept = [one_of_each(basis) for basis in cast(list[Basis], bases)]
            else:
                kept = [self._kept(score, width) for score, width in zip(scores, widths, strict=True)]
        plan = PruningPlan(
            model=_model(self.view, source),
            ratio=s.ratio,
            layout=s.layout,
            merge=self.merge,
            method=_method(s),
            calibration=self.calibration,
            sensitivity=None if sensitivity is None else tuple(sensitivity),
            seed=s.seed,
            versions=versions(),
            layers=tuple(_layer(k, bases[i] if bases else None, i not in dropped.layers) for i, k in enumerate(kept)),
        )
        return plan, bases

    def bases(self, given: PruningPlan) -> list[Basis] | None:
        """Those that a given plan was made with, if the calibration text is the same."""
        if not given.is_rotated:
            return None
        importance = given.method.get("importance")
        if importance not in IMPORTANCE:
            raise PlanMismatch("the plan changes the basis, but its method names no importance; make it again")
        if self.calibration != given.calibration:
            self.say("the plan was made on another calibration text: its basis, and so the weights, will differ")
        return self._attention(importance, given.merge)[1]

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The text that scores and bases come from: its name, its length, and what was in it."""
        if not self.batches:
            return None
        tokens = sum(batch.numel() for batch in self.batches)
        return {"text": self.settings.calibration, "tokens": tokens, "sha256": digest(self.batches)}

    def _scores(self) -> tuple[list[Scores], list[Basis] | None]:
        """Measured, or read from the journal of an interrupted run."""
        s = self.settings
        importance = IMPORTANCE[s.importance]
        scores: list[Scores] = []
        bases = None
        if s.rotates or importance.needs == "attention":
            scores, bases = self._attention(s.importance, self.merge if s.rotates else None)
        if not scores:
            with self.phase("importance", self.view.shape.layers) as advance:
                scores = score_layers(self.view, importance, self.batches, advance, self.journal)
            if bases is not None:  # V is rotated, whatever scores the channels of Q and K
                scores = [Scores(score.qk, score.vo[:, :0]) for score in scores]
        return scores, bases

    def _attention(self, importance: str, merge: int | None) -> tuple[list[Scores], list[Basis] | None]:
        score = IMPORTANCE[importance]
        with self.phase("importance" if score.needs == "attention" else "rotate", self.view.shape.layers) as advance:
            return measure_attention(self.view, self.batches, score, merge, advance, self.journal)

    def _kept(self, score: Scores, width: int) -> Kept:
        """The coordinates of one layer that stay."""
        units = rope_pairs(score.qk.shape[1])
        return select(score, width, units, self.settings.channels == "joint")

    def _probes(self, scores: list[Scores], bases: list[Basis] | None, widths: list[int]) -> list[Probe]:
        """Of every block, with so many channels kept."""
        plain = [identity(shape.kv_heads, shape.head_dim) for shape in self.view.shape.each]
        return [
            Probe(block, self._kept(score, widths[block]), (bases or plain)[block])
            for block, score in enumerate(scores)
        ]

    def _sensitivity(self, scores: list[Scores], bases: list[Basis] | None, widths: list[list[int]]) -> list[float]:
        """Changes of the mean loss, block by block, for the blocks' widths one time after another."""
        s = self.settings
        batches = first_windows(self.batches, s.probe_tokens)
        probes = [probe for each in widths for probe in self._probes(scores, bases, each)]
        if s.probes == "estimated":
            return self._estimated("sensitivity", batches, probes)
        with self.phase("sensitivity", len(probes) * len(batches)) as advance:
            return measure_sensitivity(self.view, batches, probes, self.journal, advance)

    def _estimated(self, phase: str, batches: list[torch.Tensor], probes: list[Probe]) -> list[float]:
        """What probes would change, by one backward pass."""
        with self.phase(phase, self.view.shape.layers) as advance:
            return estimate_sensitivity(self.view, batches, probes, advance, self.journal)

    def _widths(
        self, scores: list[Scores], bases: list[Basis] | None, dropped: Dropped
    ) -> tuple[list[int], list[float] | None]:
        """Kept channels per layer, and the sensitivities that decided them."""
        s, grid = self.settings, self.grid
        if s.layout != "per-layer":
            return self._one_width(), None
        if s.depth:
            return self._depth(scores, bases, dropped)
        if dropped.layers:
            return widths_without(dropped.layers, s.ratio, grid), list(dropped.alone)
        if s.allocation == "uniform":
            return allocation.round_widths(allocation.uniform(grid.layers, s.ratio), s.ratio, grid), None
        unit = self.view.units.shape[1]
        shares = BUDGET_PROBES if s.allocation == "budget" else (s.ratio if s.probe is None else s.probe,)
        widths = [[probe_width(own.channels, share, unit) for own in grid.all] for share in shares]
        changes = self._sensitivity(scores, bases, widths)
        if max(changes) <= 0:
            self.say("no layer's probe raised the loss: widths are uniform; calibrate on more text")
            return allocation.round_widths(allocation.uniform(grid.layers, s.ratio), s.ratio, grid), changes
        if s.allocation == "budget":
            of_block = [(each, changes[block :: grid.layers]) for block, each in enumerate(zip(*widths, strict=True))]
            costs = [dict(zip(*found, strict=True)) for found in of_block]
            return allocation.by_budget(costs, s.ratio, grid), changes
        if s.allocation == "rank":
            ratios = allocation.by_rank(changes, s.ratio, grid.max_ratio)
        else:
            ratios = allocation.by_sensitivity(changes, s.ratio, grid.max_ratio, cast(float, s.tau))
        return allocation.round_widths(ratios, s.ratio, grid), changes

    def _blocks(self) -> Dropped:
        """The whole blocks that go."""
        number = self.settings.drop_blocks
        if not number:
            return Dropped()
        batches = first_windows(self.batches, ESTIMATED_ON)
        with self.phase("blocks", number * self.view.shape.layers) as advance:
            found = choose_blocks(self.view, batches, number, self.settings.refits, self.journal, advance)
        blocks = [self.view.attention_layers[layer] for layer in found.layers]
        told = (f"{block} (+{loss:.3f})" for block, loss in zip(blocks, found.losses, strict=True))
        self.say(f"blocks dropped, and the loss without them, nats: {', '.join(told)}")
        return found

    def _depth(
        self, scores: list[Scores], bases: list[Basis] | None, dropped: Dropped
    ) -> tuple[list[int], list[float]]:
        """Widths, some of them 0, and what each layer's attention is estimated to be worth in the dense model."""
        batches, probes = first_windows(self.batches, ESTIMATED_ON), self._probes(scores, bases, [0] * self.grid.layers)
        gone, numbers = dropped.layers, self.view.attention_layers
        changes = self._estimated("depth", batches, probes)

        def loss_of(widths: list[int]) -> float:
            kept = [self._kept(score, width) for score, width in zip(scores, widths, strict=True)]
            with skipping(self.view, dropped):
                return masked_loss(self.view, batches, kept, [probe.basis for probe in probes])

        widths = choose_depth(self.settings.depth, changes, self.settings.ratio, self.grid, loss_of, gone)
        without = [numbers[layer] for layer, width in enumerate(widths) if not width and layer not in gone]
        self.say(f"layers without attention: {', '.join(map(str, without)) or 'none'}")
        return widths, changes

    def _one_width(self) -> list[int]:
        s, grid = self.settings, self.grid
        stock = s.layout == "stock"
        widths = [self.view.shape.head_dim] * grid.layers if stock else allocation.one_width(s.ratio, grid)
        achieved = 1 - widths[0] / grid.head_dim
        if abs(achieved - s.ratio) > 1e-9 and stock:
            self.say(f"layout stock merges whole KV heads: {self.merge} into one is the nearest, ratio {achieved:.4g}")
        elif abs(achieved - s.ratio) > 1e-9:
            self.say(
                f"layout {s.layout} has one width for all layers: {widths[0]} is the nearest, ratio {achieved:.4g}"
            )
        return widths


def _layer(kept: Kept, basis: Basis | None, block: bool) -> LayerPlan:
    qk, vo = (tuple(map(tuple, x.tolist())) for x in (kept.qk, kept.vo))
    if basis is None:
        return LayerPlan(qk=qk, vo=vo, block=block)
    heads = tuple(map(tuple, basis.heads.tolist()))
    return LayerPlan(qk=qk, vo=None, heads=None if len(heads[0]) == 1 else heads, block=block)


def _model(view: ModelView, source: Source) -> Model:
    return Model(
        source=source.name, revision=source.revision, architecture=view.family.model_type, **asdict(view.shape)
    )


def _method(s: Settings) -> dict[str, Any]:
    names = (
        "importance",
        "channels",
        "depth",
        "drop_blocks",
        "allocation",
        "repair",
        "probes",
        "probe",
        "tau",
        "align",
        "min_width",
        "probe_tokens",
        "repair_tokens",
    )
    return {name: getattr(s, name) for name in (*names, "calibration_window")}
