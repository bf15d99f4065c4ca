"""`prune`: a source in, a smaller model and an honest record of it out."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune import processes
from kvprune.channels.cut import portable
from kvprune.channels.cut.surgery import cut
from kvprune.channels.evidence.texts import Texts, prepare
from kvprune.channels.journal import Journal
from kvprune.channels.plan import PruningPlan
from kvprune.channels.planning import Planner, choose_merge, grid_of, reachable
from kvprune.channels.record import memory_of, record_of
from kvprune.channels.repair.refit import Refitted, refit, split
from kvprune.channels.room import find_room
from kvprune.channels.settings import Settings, with_preset
from kvprune.engines.targets import refusals, with_target
from kvprune.errors import BadOption, NotFinite, PlanMismatch, UnreachableRatio
from kvprune.measure import memory
from kvprune.measure.fit import fit
from kvprune.measure.perplexity import perplexity
from kvprune.models.aside import load_left_on_disk, tidy
from kvprune.models.held import each_parameter, quietly
from kvprune.models.in_memory import InMemory, copied, from_memory
from kvprune.models.origin import origin
from kvprune.models.places import find_devices
from kvprune.models.source import Source, load_config, load_model, resolve, skeleton
from kvprune.models.tokenizer import load_tokenizer
from kvprune.models.view import ModelView
from kvprune.options import given_of
from kvprune.progress import Progress
from kvprune.runtime.checkpoint import save
from kvprune.runtime.dtype import round_as_stored
from kvprune.runtime.files import DENSE, alone
from kvprune.runtime.hub import remember
from kvprune.text.given import GivenText, Text, find_text
from kvprune.text.judged import GivenTexts, find_texts
from kvprune.text.windows import digest
from kvprune.versions import versions


@dataclass
class Pruned:
    """What `prune` returns: the model in memory (None where it was pruned block by block: load it from the folder), its
    plan, and the record that kvprune.json holds."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    plan: PruningPlan
    record: dict[str, Any] = field(repr=False)


def prune(
    source: str | Path | PreTrainedModel,
    out: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ratio: float | None = None,
    fit: str | int | None = None,
    context: int | None = None,
    batch: int | None = None,
    reserve: float | None = None,
    preset: str | None = None,
    target: str | None = None,
    plan: str | Path | None = None,
    importance: str | None = None,
    channels: str | None = None,
    merge: int | str | None = None,
    tensor_parallel: int = 1,
    depth: int | str | None = None,
    drop_blocks: int | None = None,
    allocation: str | None = None,
    layout: str | None = None,
    repair: str | None = None,
    repair_tokens: int | None = None,
    probes: str | None = None,
    probe: float | None = None,
    probe_tokens: int | None = None,
    tau: float | None = None,
    align: int | None = None,
    min_width: int | None = None,
    calibration: GivenText = "wikitext2",
    calibration_tokens: int = 16384,
    calibration_window: int = 512,
    eval: GivenTexts = (),
    eval_tokens: int = 16384,
    windows: Sequence[int] = (128, 2048),
    memory: str | int | None = None,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Prune the KV channels of `source` and, if `out` is given, save the result there.

    What is None is left to the preset, the target or the plan, else to the default in brackets.

    source: a hub id, checkpoint folder or .gguf file; revision of a hub id; trust_remote_code: run code that comes with
    it. Or a dense model in memory: a copy of it is pruned, on its device, and it stays as it is. tokenizer: for such a
    model, or in place of the source's. out: a folder, missing or empty; resume: continue the unfinished run in it.
    ratio: fraction of the KV bytes to remove (0.5). Or fit: a memory ("24GiB") in which sequences of `context` tokens
    are to fit, `batch` (1) at once, with `reserve` (0.1) of it left over (see `fit`; with tensor_parallel it is the
    memory of each rank); the record has it as "fit".
    preset: "kvpruner", the paper's choices. target: "vllm" or another engine (engines/targets.py), which sets layout,
    align and min_width. plan: a plan.json to apply. The other choices of method are described in Settings: importance
    ("variance", "energy", "taylor", "l1", "l2"), channels ("split", "joint"), merge ("auto", or a number), depth (0, or
    "auto"), drop_blocks (0), allocation ("uniform", "budget", "sensitivity", "rank"), layout ("per-layer", "uniform",
    "portable", "stock"), repair ("rotate+refit", "rotate", "refit", "none"), repair_tokens (32768), probes
    ("estimated", "measured"), probe, probe_tokens, tau, align (8), min_width (16), tensor_parallel.
    calibration: a text's name, a file, or "self"; strings, as a list or a column of a data set; token ids, as a tensor
    (n,) or windows (n, tokens); conversations, as lists of {"role", "content"}; "chat:FILE" of these; or "hub:NAME
    [[:CONFIG]:SPLIT]:COLUMN" (see docs/channels.md). calibration_tokens: how much of it is read, in windows of
    calibration_window tokens. eval: one text of these kinds to judge on, or a list of them (strings that are a text are
    a list in it), eval_tokens of each in windows of every length of `windows`; without, the test split of a named text,
    or the end of what else was given.
    memory: what may be used of each device ("20GiB"; None: most of what is free). A model that does not fit stays on
    disk and is pruned block by block, to the same plan and weights: see docs/large-models.md.
    device: "auto", "cpu", "cuda", ..., or several ("cuda:0,cuda:1"), over which the blocks of a model are spread that
    does not fit on the first; dtype: to compute in, "auto", "float32", "bfloat16" or "float16"; seed: of text
    that is sampled.

    Raises a KVPruneError for what the user can mend; nothing is written then but the journal of an unfinished run,
    which `resume` continues.
    """
    parameters = locals()
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise BadOption(f"tokenizer is a {type(tokenizer).__name__}; give one of transformers, loaded")
    text, judged = find_text(calibration), find_texts(eval)
    found = None if isinstance(source, (str, os.PathLike)) else from_memory(source, revision, trust_remote_code)
    spread = device if "," in device else None
    for name, value in (("memory", memory), ("fit", fit), ("device", spread)):
        if found is not None and value is not None:
            raise BadOption(f"--{name} {value} is for a model on disk; this one is in memory already: leave it out")
    parameters |= {"calibration": text.name, "eval": tuple(one.known_as for one in judged)}
    parameters |= {} if found is None else {"source": found.name}
    options = with_target(target, given_of(Settings, parameters))
    wish = {name: parameters[name] for name in ("fit", "context", "batch", "reserve")}
    options, asked = _to_fit(preset, options, wish)
    settings = Settings(**with_preset(preset, options))
    if found is not None and tokenizer is None and any(one.needs_tokenizer for one in (text, *judged)):
        raise BadOption(
            "a model in memory comes without its tokenizer: add tokenizer=..., or calibrate on token ids alone"
        )
    place = None if out is None else Path(out)
    run = _Run(settings, text, judged, place, memory, resume, progress or Progress(), asked, target)
    return run.run(found or resolve(settings.source, revision, trust_remote_code), tokenizer)


def _to_fit(
    preset: str | None, options: dict[str, Any], parameters: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The options with the ratio that is needed, where a memory to fit in is asked for, and what was asked."""
    asked = {name: value for name, value in parameters.items() if value is not None}
    if "fit" not in asked:
        if asked:
            raise BadOption(f"--{next(iter(asked))} needs --fit: the memory to fit in")
        return options, None
    if "ratio" in options or "plan" in options:
        raise BadOption("--fit finds the ratio itself; leave out --ratio and --plan")
    if "context" not in asked:
        raise BadOption("--fit needs --context: how many tokens a sequence has")
    chosen = Settings(**with_preset(preset, options))
    shared = ("dtype", "layout", "min_width", "align", "drop_blocks", "revision", "trust_remote_code")
    known = {name: getattr(chosen, name) for name in (*shared, "tensor_parallel")}
    known["merge"] = chosen.merge if chosen.can_merge else 1
    asked["memory"] = asked.pop("fit")
    report = fit(chosen.source, **asked, **known)
    if report["ratio"] is None:
        raise UnreachableRatio(
            f"not even --ratio {report['largest_ratio']:.3g} makes this fit: at that, the memory takes a --batch of "
            f"{report['largest_batch']['pruned']}, or a --context of {report['largest_context']['pruned']}"
        )
    if report["ratio"] == 0:
        raise BadOption("--fit: the dense model fits as it is; there is nothing to remove")
    told = {name: report[name] for name in ("memory_bytes", "reserve_bytes", "context", "batch")}
    return {**options, "ratio": report["ratio"]}, told


class _Run:
    """One run of `prune`, phase by phase."""

    def __init__(
        self,
        settings: Settings,
        text: Text,
        judged: Sequence[Text],
        out: Path | None,
        memory: str | int | None,
        resume: bool,
        progress: Progress,
        fit: dict[str, Any] | None,
        target: str | None,
    ):
        self.settings, self.text, self.judged, self.out = settings, text, judged, out
        self.memory, self.resume, self.progress, self.fit, self.target = memory, resume, progress, fit, target

    def run(self, source: Source, tokenizer: PreTrainedTokenizerBase | None) -> Pruned:
        s = self.settings
        if source.is_pruned:
            raise BadOption(f"{source.name} is pruned already; prune the dense model it came from")
        given = None if s.plan is None else PruningPlan.read(s.plan)
        if given is not None:
            s = self.settings = replace(s, repair_tokens=given.method.get("repair_tokens", s.repair_tokens))
        with ExitStack() as stack:
            if self.out is not None:
                processes.after_main(partial(self._claim, self.out, stack))
                stack.callback(tidy, self.out)
            torch.manual_seed(s.seed)
            self.devices = find_devices(s.device)
            self.device = s.device.split(",")[0].strip()  # of several the first
            peak = memory.PeakMemory(*self.devices)
            return self._pruned(source, tokenizer, given, peak)

    def _claim(self, out: Path, stack: ExitStack) -> None:
        """Nobody else writes there from now on, and nothing there is overwritten."""
        if processes.is_main():
            stack.enter_context(alone(out))
        Journal.check(out, self.resume)

    def _pruned(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase | None,
        given: PruningPlan | None,
        peak: memory.PeakMemory,
    ) -> Pruned:
        s = self.settings
        with self.phase("load"):
            load_config(source)  # refuses what is not supported, before anything is said of the tokenizer
            if tokenizer is None and not isinstance(source, InMemory):
                tokenizer = load_tokenizer(source)
            view = ModelView(skeleton(source, self.device, s.dtype))
            self._check_target(view)
        if source.is_wrapper:
            wrapper = source.settings["model_type"]
            self.progress.say(f"the text model of {wrapper} alone; what it has for images is left out")
        merge = given.merge if given is not None else choose_merge(s, view.shape, self.progress.say)
        grid = grid_of(s, view, merge, self.target)
        if given is None:
            reachable(s, grid)
        else:
            given.check(view.family.model_type, view.shape)
        portable.check(view, s.layout if given is None else given.layout)
        room = find_room(s, view, merge, self.devices, self.memory, self.out, source)
        if room.streamed:
            self.progress.say(room.line(view))
            aside = cast(Path, self.out) / DENSE
            lm = load_left_on_disk(source, view.lm, room.places, aside, self.device, s.dtype, self.phase)
        else:
            if len(self.devices) > 1:
                self.progress.say(f"the model fits on {self.device} whole: the other devices are not used")
            with self.phase("load"):
                loaded: Callable[..., PreTrainedModel] = copied if isinstance(source, InMemory) else load_model
                lm = loaded(source, self.device, s.dtype)
        view = ModelView(lm)
        calibrate = s.ratio > 0 if given is None else given.is_rotated or _refits(given)
        texts = prepare(s, self.text, self.judged, lm, tokenizer, calibrate, room.batch_tokens, self.progress)
        identity = self._identity(view, texts) | {"batch_tokens": room.batch_tokens}
        processes.check_same(identity)
        for batches in (texts.scored, split(texts.repaired)[0] if texts.repaired else []):
            if batches:
                processes.check_enough(sum(map(len, batches)))
        journal = Journal()
        if self.out is not None:
            journal = processes.after_main(partial(Journal.open, self.out, identity, self.resume))
        try:
            planner = Planner(s, view, merge, grid, texts.scored, journal, self.phase, self.progress.say)
            plan, bases = planner.plan(source) if given is None else (given, planner.bases(given))
            dense = self._perplexities(lm, texts.evaluated, "evaluate dense")
            with self.phase("surgery", view.shape.layers) as advance:
                pruned = cut(view, plan, bases, journal, advance)
                round_as_stored(pruned)
            refitted = self._repair(view, pruned, texts.repaired if _refits(plan) else [], journal)
            after = self._perplexities(pruned, texts.evaluated, "evaluate pruned")
        except (NotFinite, PlanMismatch):
            journal.discard()  # the same would come out again
            raise
        perplexities = [
            {"text": name, "window": d.window, "tokens": d.tokens, "dense": d.value, "pruned": p.value}
            for (name, d), (_, p) in zip(dense, after, strict=True)
        ]

        def record() -> dict[str, Any]:
            found = record_of(s, view, pruned, plan, perplexities, refitted, self.progress.seconds)
            memories = memory_of(s, view, plan, peak, texts.scored, texts.repaired if refitted else [])
            if room.streamed:
                memories["memory_formula_bytes"] = room.needs
            told = {"fit": self.fit, "streamed": room.streamed, "from_memory": isinstance(source, InMemory)}
            return found | told | memories | origin(source)

        if self.out is None:
            found = record()
            remember(pruned, tokenizer, plan.to_json(), found)
            return Pruned(pruned, tokenizer, plan, found)
        with self.phase("save"), quietly():
            is_main = processes.is_main()
            saved = save(pruned, tokenizer, plan.to_json(), record, self.out) if is_main else record()
            processes.wait()
        journal.close()
        remember(pruned, tokenizer, plan.to_json(), saved)
        return Pruned(None if room.streamed else pruned, tokenizer, plan, saved)

    def _check_target(self, view: ModelView) -> None:
        """Raise BadOption for an engine that would refuse what comes of this model."""
        if self.target is not None:
            for why in refusals(self.target, is_hybrid=view.shape.attention_layers is not None):
                raise BadOption(f"--target {why}")

    def _identity(self, view: ModelView, texts: Texts) -> dict[str, Any]:
        """What must be the same for an unfinished run to go on: the settings, and what they led to."""
        weights = hashlib.sha256()
        for _, parameter in each_parameter(view.lm):  # some numbers of each
            some = parameter.detach().flatten()[:: max(parameter.numel() // 1024, 1)]
            weights.update(some.float().cpu().numpy().tobytes())
        return self.settings.as_json() | {
            "calibration_text": digest([*texts.scored, *texts.repaired]),
            "weights": weights.hexdigest(),
            "computed_on": f"{view.device} in {view.lm.dtype} on {torch.get_num_threads()} threads",
            "versions": versions(),
        }

    @contextmanager
    def phase(self, name: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        with self.progress.phase(name, total) as advance:
            yield advance
        memory.release()

    def _repair(
        self, view: ModelView, pruned: PreTrainedModel, batches: list[torch.Tensor], journal: Journal
    ) -> list[Refitted]:
        if not batches:
            return []
        with self.phase("refit", view.shape.layers) as advance:
            return refit(view, pruned, batches, advance, journal)

    def _perplexities(self, model: PreTrainedModel, texts: list[tuple[str, torch.Tensor]], phase: str):
        with self.phase(phase, sum(len(ids) for _, ids in texts)) as advance:
            return [(name, perplexity(model, ids, advance, shared=True)) for name, ids in texts]


def _refits(plan: PruningPlan) -> bool:
    return plan.ratio > 0 and str(plan.method.get("repair")).endswith("refit")
