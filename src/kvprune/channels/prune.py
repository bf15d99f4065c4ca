"""`prune`: a source in, a smaller model and an honest record of it out."""

import hashlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.channels import allocation, portable
from kvprune.channels.importance import IMPORTANCE, Scores
from kvprune.channels.journal import Journal
from kvprune.channels.plan import LayerPlan, Model, PruningPlan
from kvprune.channels.selection import Kept, everything, select, shared_pairs
from kvprune.channels.sensitivity import measure_sensitivity, probe_width
from kvprune.channels.settings import PRESETS, Settings
from kvprune.channels.statistics import score_layers
from kvprune.channels.surgery import cut
from kvprune.errors import BadOption, NotFinite, PlanMismatch
from kvprune.measure import memory
from kvprune.measure.perplexity import perplexity
from kvprune.models.source import Source, find_device, load_model, load_tokenizer, resolve
from kvprune.models.view import ModelView
from kvprune.progress import Progress
from kvprune.runtime.checkpoint import save
from kvprune.text.corpus import is_file, read_text
from kvprune.text.windows import token_ids, windows

DECIDED_BY_A_PLAN = {"ratio", "importance", "channels", "allocation", "layout", "probe", "tau", "align", "min_width"}
BATCH_TOKENS = 4096  # of a calibration batch: its hidden states of all layers are held at a time


@dataclass
class Pruned:
    """What `prune` returns: the model in memory, its plan, and the record that kvprune.json holds."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan
    record: dict[str, Any] = field(repr=False)


def prune(
    source: str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **options,
) -> Pruned:
    """Prune the KV channels of `source` and, if `out` is given, save the result there.

    options: the fields of Settings, and preset="kvpruner". Raises a KVPruneError for what the user can mend; nothing is
    written then but the journal of an unfinished run, which `resume` continues.
    """
    preset = options.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise BadOption(f"unknown preset {preset!r}; choose {', '.join(PRESETS)}")
    decided = DECIDED_BY_A_PLAN & {*options, *PRESETS.get(preset, ())}
    if options.get("plan") is not None and decided:
        names = ", ".join("--" + name for name in sorted(decided))
        raise BadOption(f"--plan has decided {names} already; leave one of them out")
    settings = Settings(source=str(source), **({} if preset is None else PRESETS[preset]), **options)
    return _Run(settings, None if out is None else Path(out), resume, progress or Progress()).run()


class _Run:
    """One run of `prune`, phase by phase."""

    def __init__(self, settings: Settings, out: Path | None, resume: bool, progress: Progress):
        self.settings, self.out, self.resume, self.progress = settings, out, resume, progress

    def run(self) -> Pruned:
        s = self.settings
        source = resolve(s.source, s.revision, s.trust_remote_code)
        if source.is_pruned:
            raise BadOption(f"{source.name} is pruned already; prune the dense model it came from")
        given = None if s.plan is None else PruningPlan.read(s.plan)
        torch.manual_seed(s.seed)
        peak = memory.PeakMemory(find_device(s.device))
        with self._phase("load"):
            lm = load_model(source, s.device, s.dtype)
            tokenizer = load_tokenizer(source)
        view = ModelView(lm)
        grid = allocation.Grid(view.shape.layers, view.shape.head_dim, s.align, s.min_width, view.units.shape[1])
        if given is None:
            self._reachable(grid)
        else:
            given.check(view.family.model_type, view.shape, view.units.tolist())
        if (s.layout if given is None else given.layout) == "portable":
            portable.check(view)
        texts = self._texts(tokenizer, lm.config.max_position_embeddings)
        needs_text = given is None and s.ratio > 0
        batches = self._calibration(tokenizer, lm.config.max_position_embeddings) if needs_text else []
        journal = Journal.open(self.out, self._identity(view, batches), self.resume) if self.out else Journal()
        try:
            plan = given if given is not None else self._plan(view, source, grid, batches, journal)
            dense = self._perplexities(lm, texts, "evaluate dense")
            with self._phase("surgery"):
                pruned = cut(view, plan)
            after = self._perplexities(pruned, texts, "evaluate pruned")
        except (NotFinite, PlanMismatch):
            journal.discard()  # the same would come out again
            raise

        def record() -> dict[str, Any]:
            return self._record(view, pruned, plan, dense, after) | _memory_record(view, peak, batches)

        if self.out is None:
            return Pruned(pruned, tokenizer, plan, record())
        with self._phase("save"):
            saved = save(pruned, tokenizer, plan.to_json(), record, self.out)
        journal.close()
        return Pruned(pruned, tokenizer, plan, saved)

    def _identity(self, view: ModelView, batches: list[torch.Tensor]) -> dict[str, Any]:
        """What must be the same for an unfinished run to go on: the settings, and what they led to."""
        text, weights = hashlib.sha256(), hashlib.sha256()
        for batch in batches:
            text.update(batch.numpy().tobytes())
        for attention in view.attention:
            weights.update(attention.weights().k.detach().float().cpu().numpy().tobytes())
        return self.settings.as_json() | {
            "calibration_text": text.hexdigest(),
            "weights": weights.hexdigest(),
            "computed_on": f"{view.device} in {view.lm.dtype} on {torch.get_num_threads()} threads",
            "versions": versions(),
        }

    @contextmanager
    def _phase(self, name: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        with self.progress.phase(name, total) as advance:
            yield advance
        memory.release()

    def _reachable(self, grid: allocation.Grid) -> None:
        """Refuse a ratio that the layout cannot reach before any work is done."""
        s = self.settings
        if s.layout != "per-layer":
            allocation.one_width(s.ratio, grid)
        else:
            allocation.round_widths(allocation.uniform(grid.layers, s.ratio), s.ratio, grid)

    def _calibration(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[torch.Tensor]:
        """Batches of token ids (B, T) from the valid split, or from the beginning of a file."""
        s = self.settings
        text = read_text(s.calibration, "valid")
        length = min(s.calibration_window, limit, s.calibration_tokens)
        ids = windows(text, tokenizer, length, s.calibration_tokens, f"the calibration text {s.calibration}")
        return list(ids.split(max(BATCH_TOKENS // length, 1)))

    def _texts(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[str, torch.Tensor]]:
        """(name, windows) of every evaluation; windows longer than the model's context become that long.

        Without --eval: the test split of the calibration text, or the end of a calibration file, which must be
        long enough to keep the two apart.
        """
        s = self.settings
        if is_file(s.calibration) and s.calibration in s.eval:
            raise BadOption(f"--eval {s.calibration} is the calibration text; leave --eval out to be judged on its end")
        lengths = sorted({min(window, limit, s.eval_tokens) for window in s.windows})
        if not s.eval and is_file(s.calibration):
            ids = token_ids(read_text(s.calibration, "valid"), tokenizer)
            if len(ids) < s.calibration_tokens + s.eval_tokens:
                raise BadOption(
                    f"{s.calibration} has {len(ids)} tokens, too few to calibrate on {s.calibration_tokens} and to "
                    f"evaluate on {s.eval_tokens} others; name another text with --eval"
                )
            rest = ids[-s.eval_tokens :]
            name = f"{s.calibration} (its end)"
            return [(name, rest[: len(rest) // n * n].view(-1, n)) for n in lengths]
        return [
            (name, windows(read_text(name, "test"), tokenizer, n, s.eval_tokens, f"the evaluation text {name}"))
            for name in s.eval or (s.calibration,)
            for n in lengths
        ]

    def _plan(
        self, view: ModelView, source: Source, grid: allocation.Grid, batches: list[torch.Tensor], journal: Journal
    ) -> PruningPlan:
        """Scores, sensitivities, widths, and the channels that stay."""
        s = self.settings
        sensitivity = None
        if s.ratio == 0:
            kept = [everything(view.shape.kv_heads, grid.head_dim)] * grid.layers
        else:
            scores = self._scores(view, batches, journal)
            if s.layout == "per-layer" and s.allocation != "uniform":
                sensitivity = self._sensitivity(view, scores, batches, journal)
            widths = self._widths(grid, sensitivity)
            if s.layout == "portable":
                scores = shared_pairs(scores)
            kept = [
                select(score, width, view.units, s.channels == "joint")
                for score, width in zip(scores, widths, strict=True)
            ]
        return PruningPlan(
            model=_model(view, source),
            ratio=s.ratio,
            layout=s.layout,
            method=_method(s),
            calibration={"text": s.calibration, "tokens": sum(b.numel() for b in batches)} if batches else None,
            sensitivity=None if sensitivity is None else tuple(sensitivity),
            seed=s.seed,
            versions=versions(),
            layers=tuple(LayerPlan.model_validate({"qk": k.qk.tolist(), "vo": k.vo.tolist()}) for k in kept),
        )

    def _scores(self, view: ModelView, batches: list[torch.Tensor], journal: Journal) -> list[Scores]:
        scores = journal.load_scores()
        if scores is None:
            with self._phase("importance", sum(len(b) for b in batches)) as advance:
                scores = score_layers(view, IMPORTANCE[self.settings.importance], batches, advance)
            journal.save_scores(scores)
        return scores

    def _sensitivity(
        self, view: ModelView, scores: list[Scores], batches: list[torch.Tensor], journal: Journal
    ) -> list[float]:
        s, unit = self.settings, view.units.shape[1]
        probe = s.ratio if s.probe is None else s.probe
        width = probe_width(view.shape.head_dim, probe, unit)
        probes: list[Kept] = [select(score, width, view.units, s.channels == "joint") for score in scores]
        with self._phase("sensitivity", view.shape.layers * len(batches)) as advance:
            return measure_sensitivity(view, batches, probes, journal, advance)

    def _widths(self, grid: allocation.Grid, sensitivity: list[float] | None) -> list[int]:
        s = self.settings
        if s.layout != "per-layer":
            widths = allocation.one_width(s.ratio, grid)
            achieved = 1 - widths[0] / grid.head_dim
            if abs(achieved - s.ratio) > 1e-9:
                self.progress.say(
                    f"layout {s.layout} has one width for all layers: {widths[0]} is the nearest, ratio {achieved:.4g}"
                )
            return widths
        if sensitivity is None:
            ratios = allocation.uniform(grid.layers, s.ratio)
        elif s.allocation == "rank":
            ratios = allocation.by_rank(sensitivity, s.ratio, grid.max_ratio)
        else:
            if max(sensitivity) <= 0:
                self.progress.say("no layer's probe raised the loss: widths are uniform; calibrate on more text")
            ratios = allocation.by_sensitivity(sensitivity, s.ratio, grid.max_ratio, s.tau)
        return allocation.round_widths(ratios, s.ratio, grid)

    def _perplexities(self, model: PreTrainedModel, texts: list[tuple[str, torch.Tensor]], phase: str):
        with self._phase(phase, sum(len(ids) for _, ids in texts)) as advance:
            return [(name, perplexity(model, ids, advance)) for name, ids in texts]

    def _record(self, view: ModelView, pruned: PreTrainedModel, plan: PruningPlan, dense, after) -> dict[str, Any]:
        """The fields of kvprune.json; docs/runtime.md has their list."""
        s, shape = self.settings, view.shape
        full = [shape.head_dim] * shape.layers
        dtype = view.lm.dtype
        return {
            "source": s.source,
            "revision": s.revision,
            "ratio": plan.ratio,
            "ratio_achieved": plan.ratio_achieved,
            "kv_bytes_per_token": {
                "dense": memory.kv_bytes_per_token(full, shape.kv_heads, dtype),
                "pruned": memory.kv_bytes_per_token(plan.widths, shape.kv_heads, dtype),
            },
            "parameters": {"dense": memory.parameters(view.lm), "pruned": memory.parameters(pruned)},
            "widths": plan.widths,
            "head_dim": shape.head_dim,
            "layout": plan.layout,
            "method": plan.method,
            "calibration": plan.calibration,
            "sensitivity": plan.sensitivity,
            "perplexity": [
                {"text": name, "window": d.window, "tokens": d.tokens, "dense": d.value, "pruned": p.value}
                for (name, d), (_, p) in zip(dense, after, strict=True)
            ],
            "seconds": {name: round(seconds, 3) for name, seconds in self.progress.seconds.items()},
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(view.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "seed": s.seed,
        }


def _memory_record(view: ModelView, peak: memory.PeakMemory, batches: list[torch.Tensor]) -> dict[str, Any]:
    """The measured peak beside what the method may need: see docs/channels.md for the formula."""
    tokens = max((b.numel() for b in batches), default=0)
    size = view.lm.dtype.itemsize
    return {
        "peak_memory_bytes": peak.bytes(),
        "memory_formula_bytes": {
            "2.5 x weights": int(2.5 * memory.weight_bytes(view.lm)),
            "hidden states of one batch, all layers": tokens * view.shape.hidden * view.shape.layers * size,
            "logits of one batch": tokens * view.lm.config.vocab_size * size,
        },
    }


def _model(view: ModelView, source: Source) -> Model:
    return Model(
        source=source.name, revision=source.revision, architecture=view.family.model_type, **asdict(view.shape)
    )


def _method(s: Settings) -> dict[str, Any]:
    names = ("importance", "channels", "allocation", "repair", "probe", "tau", "align", "min_width")
    return {name: getattr(s, name) for name in (*names, "calibration_window")}


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {name: version(name) for name in ("kvprune", "torch", "transformers", "safetensors")}
    return {**found, "python": platform.python_version()}
