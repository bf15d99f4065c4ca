"""Phase A and B: scores, sensitivities, widths, and the channels that stay."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from kvprune.channels import allocation
from kvprune.channels.estimate import estimate_sensitivity
from kvprune.channels.importance import IMPORTANCE, Scores
from kvprune.channels.journal import Journal
from kvprune.channels.plan import LayerPlan, Model, PruningPlan
from kvprune.channels.repair.rotate import Rotation
from kvprune.channels.selection import Kept, everything, select, shared_pairs
from kvprune.channels.sensitivity import Probe, measure_sensitivity, probe_width
from kvprune.channels.settings import Settings
from kvprune.channels.statistics import measure_attention, score_layers
from kvprune.errors import PlanMismatch
from kvprune.models.source import Source
from kvprune.models.view import ModelView
from kvprune.text.windows import digest
from kvprune.versions import versions

BUDGET_PROBES = (0.25, 0.5, 0.75)  # shares of a block's channels that `budget` probes


def reachable(s: Settings, grid: allocation.Grid) -> None:
    """Raise UnreachableRatio, before any work is done, for a ratio that the layout cannot reach."""
    if s.layout != "per-layer":
        allocation.one_width(s.ratio, grid)
    else:
        allocation.round_widths(allocation.uniform(grid.layers, s.ratio), s.ratio, grid)


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
    grid: allocation.Grid
    batches: list[torch.Tensor]
    journal: Journal
    phase: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
    say: Callable[[str], None]

    def plan(self, source: Source) -> tuple[PruningPlan, list[Rotation] | None]:
        """The plan, and the rotations it goes with."""
        s = self.settings
        sensitivity, rotations = None, None
        if s.ratio == 0:
            kept = [everything(self.view.shape.kv_heads, self.grid.head_dim)] * self.grid.layers
        else:
            scores, rotations = self._scores()
            if s.layout == "portable":
                scores = shared_pairs(scores)
            widths, sensitivity = self._widths(scores, rotations)
            kept = [self._kept(score, width) for score, width in zip(scores, widths, strict=True)]
        plan = PruningPlan(
            model=_model(self.view, source),
            ratio=s.ratio,
            layout=s.layout,
            method=_method(s),
            calibration=self.calibration,
            sensitivity=None if sensitivity is None else tuple(sensitivity),
            seed=s.seed,
            versions=versions(),
            layers=tuple(
                LayerPlan(qk=k.qk.tolist(), vo=None if k.vo is None else k.vo.tolist())  # type: ignore[arg-type]
                for k in kept
            ),
        )
        return plan, rotations

    def rotations(self, given: PruningPlan) -> list[Rotation] | None:
        """Those that a given plan was made with, if the calibration text is the same."""
        if not given.is_rotated:
            return None
        importance = given.method.get("importance")
        if importance not in IMPORTANCE:
            raise PlanMismatch("the plan rotates V and O, but its method names no importance; make it again")
        if self.calibration != given.calibration:
            self.say("the plan was made on another calibration text: its rotation, and so the weights, will differ")
        return self._attention(importance, rotate=True)[1]

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The text that scores and rotations come from: its name, its length, and what was in it."""
        if not self.batches:
            return None
        tokens = sum(batch.numel() for batch in self.batches)
        return {"text": self.settings.calibration, "tokens": tokens, "sha256": digest(self.batches)}

    def _scores(self) -> tuple[list[Scores], list[Rotation] | None]:
        """Measured, or read from the journal of an interrupted run."""
        found = self.journal.load_scores()
        if found is None:
            found = self._measured_scores()
            self.journal.save_scores(*found)
        return found

    def _measured_scores(self) -> tuple[list[Scores], list[Rotation] | None]:
        s = self.settings
        importance = IMPORTANCE[s.importance]
        scores: list[Scores] = []
        rotations = None
        if s.rotates or importance.needs == "attention":
            scores, rotations = self._attention(s.importance, s.rotates)
        if not scores:
            with self.phase("importance", sum(len(b) for b in self.batches)) as advance:
                scores = score_layers(self.view, importance, self.batches, advance)
        return scores, rotations

    def _attention(self, importance: str, rotate: bool) -> tuple[list[Scores], list[Rotation] | None]:
        score = IMPORTANCE[importance]
        with self.phase("importance" if score.needs == "attention" else "rotate", self.view.shape.layers) as advance:
            return measure_attention(self.view, self.batches, score, rotate, advance)

    def _kept(self, score: Scores, width: int) -> Kept:
        """The channels of one layer; a layer that keeps all of them is left as it is."""
        s = self.settings
        if width == self.grid.head_dim:
            return everything(self.view.shape.kv_heads, width)
        kept = select(score, width, self.view.units, s.channels == "joint")
        return Kept(kept.qk, None) if s.rotates else kept

    def _probes(self, scores: list[Scores], rotations: list[Rotation] | None, width: int) -> list[Probe]:
        return [
            Probe(block, self._kept(score, width), None if rotations is None else rotations[block])
            for block, score in enumerate(scores)
        ]

    def _sensitivity(self, scores: list[Scores], rotations: list[Rotation] | None, widths: list[int]) -> list[float]:
        """Changes of the mean loss, block by block, for one width after another."""
        s = self.settings
        batches = first_windows(self.batches, s.probe_tokens)
        probes = [probe for width in widths for probe in self._probes(scores, rotations, width)]
        if s.probes == "estimated":
            found = self.journal.load_estimates()
            if found is None:
                with self.phase("sensitivity", len(batches)) as advance:
                    found = estimate_sensitivity(self.view, batches, probes, advance)
                self.journal.save_estimates(found)
            return found
        with self.phase("sensitivity", len(probes) * len(batches)) as advance:
            return measure_sensitivity(self.view, batches, probes, self.journal, advance)

    def _widths(self, scores: list[Scores], rotations: list[Rotation] | None) -> tuple[list[int], list[float] | None]:
        """Kept channels per layer, and the sensitivities that decided them."""
        s, grid = self.settings, self.grid
        if s.layout != "per-layer":
            return self._one_width(), None
        if s.allocation == "uniform":
            return allocation.round_widths(allocation.uniform(grid.layers, s.ratio), s.ratio, grid), None
        unit = self.view.units.shape[1]
        shares = BUDGET_PROBES if s.allocation == "budget" else (s.ratio if s.probe is None else s.probe,)
        widths = [probe_width(grid.head_dim, share, unit) for share in shares]
        changes = self._sensitivity(scores, rotations, widths)
        if max(changes) <= 0:
            self.say("no layer's probe raised the loss: widths are uniform; calibrate on more text")
            return allocation.round_widths(allocation.uniform(grid.layers, s.ratio), s.ratio, grid), changes
        if s.allocation == "budget":
            costs = [dict(zip(widths, changes[block :: grid.layers], strict=True)) for block in range(grid.layers)]
            return allocation.by_budget(costs, s.ratio, grid), changes
        if s.allocation == "rank":
            ratios = allocation.by_rank(changes, s.ratio, grid.max_ratio)
        else:
            ratios = allocation.by_sensitivity(changes, s.ratio, grid.max_ratio, cast(float, s.tau))
        return allocation.round_widths(ratios, s.ratio, grid), changes

    def _one_width(self) -> list[int]:
        s, grid = self.settings, self.grid
        widths = allocation.one_width(s.ratio, grid)
        achieved = 1 - widths[0] / grid.head_dim
        if abs(achieved - s.ratio) > 1e-9:
            self.say(
                f"layout {s.layout} has one width for all layers: {widths[0]} is the nearest, ratio {achieved:.4g}"
            )
        return widths


def _model(view: ModelView, source: Source) -> Model:
    return Model(
        source=source.name, revision=source.revision, architecture=view.family.model_type, **asdict(view.shape)
    )


def _method(s: Settings) -> dict[str, Any]:
    names = (
        "importance",
        "channels",
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
