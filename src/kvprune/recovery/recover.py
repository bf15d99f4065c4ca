"""`recover`: a pruned folder in, the same kind of folder with better weights out."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.errors import BadOption, KVPruneError
from kvprune.measure import memory
from kvprune.models.aside import tidy
from kvprune.models.in_memory import InMemory, from_memory
from kvprune.models.places import find_device
from kvprune.models.source import Source, load_model, resolve
from kvprune.models.tokenizer import check_ids, load_tokenizer
from kvprune.options import given_of, size_in_bytes
from kvprune.progress import Progress
from kvprune.recovery import evaluation
from kvprune.recovery.checkpoints import Checkpoints
from kvprune.recovery.data import Data, read_data
from kvprune.recovery.losses import LOSSES
from kvprune.recovery.settings import SAMPLED, Settings, from_options
from kvprune.recovery.teacher import Room, activations, fingerprint, load_teacher
from kvprune.recovery.train import Training
from kvprune.recovery.trainee import ADAPTER, Trainee, add_adapters, checkpoint_activations
from kvprune.runtime.checkpoint import save
from kvprune.runtime.dtype import name_of, round_as_stored, stored_dtype
from kvprune.runtime.files import DENSE, PLAN, alone, read_shown, weight_checksums
from kvprune.runtime.hub import remember
from kvprune.text.corpus import SELF
from kvprune.text.given import GivenText, Text, find_text
from kvprune.text.judged import GivenTexts, find_texts
from kvprune.text.sampled import sample_ids
from kvprune.text.windows import digest
from kvprune.versions import versions


@dataclass
class Recovered:
    """What `recover` returns: the merged model in memory and the record that kvprune.json holds.

    On processes other than the main one (accelerate launch) model and record are None.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    record: dict[str, Any] | None = field(repr=False)


def recover(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    text: GivenText = "wikitext2",
    tokens: int = 0,
    window: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    lr: float | None = None,
    warmup: int = 10,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    targets: Sequence[str] | None = None,
    loss: str | None = None,
    temperature: float = 1.0,
    attention_weight: float = 1.0,
    teacher: str | Path | PreTrainedModel | None = None,
    checkpoint_every: int = 25,
    patience: int = 3,
    held_out: int = 4096,
    gradient_checkpointing: bool = False,
    preset: str | None = None,
    eval: GivenTexts = (),
    eval_tokens: int = 16384,
    eval_windows: Sequence[int] = (128, 2048),
    memory: str | int | None = None,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Recovered:
    """Train LoRA adapters on the pruned model in `folder`, merge the best of them, and, if `out` is given, save there.

    What is None is left to the preset, else to the default in brackets.

    text: a named text (its valid split), a text file, "self": sampled from the dense model, or what else `prune`
    calibrates on; or an Alpaca file (.json, .jsonl), of which the answers alone are learnt. tokens: how much of it, 0
    for all.
    window: tokens trained on at a time (512); windows that were given stay as they are. batch: windows a step, of all
    processes together (4); steps (100), or epochs: passes over the text. rank (16), alpha (twice the rank) and dropout
    (0) of the adapters, on `targets` (last parts of module names, or "all-linear"). lr: the highest learning rate (by
    the loss, and by how much is cut: see docs/recovery.md), reached in `warmup` steps; weight_decay of AdamW; clip:
    largest norm of the gradient.
    loss: "logits", which distils from `teacher`, "logits+attention" or "next-token"; temperature of distillation;
    attention_weight of the second. teacher: a source, or a dense model in memory, which is copied; None is the
    dense model that the folder's record names.
    held_out: tokens at the text's end that are evaluated every `checkpoint_every` steps; after `patience` evaluations
    without a new best the run stops (0: never). gradient_checkpointing: less memory, a third more time.
    preset: "kvpruner", what its neighbours train with. eval: a text to judge on, or a list of them, as in `prune`,
    eval_tokens of each in windows of every length of eval_windows; without, the test split of a named text, else the
    texts of the folder's record, else the text's end.
    memory: what may be used of the device ("20GiB"; None: what is free). Where it does not hold the teacher beside the
    pruned model, the teacher's blocks stay on disk and come one at a time, in every step.
    device: "auto", "cpu", "cuda", ...; dtype: to compute in; seed: of adapters, order and sampled text.

    Started by `accelerate launch`, the work is spread over its processes. Raises a KVPruneError for what the user can
    mend; nothing is written then but the checkpoints of an unfinished run, which `resume` continues.
    """
    options = given_of(Settings, locals())
    trained, judged = find_text(text, "recovery"), find_texts(eval)
    options |= {"text": trained.known_as, "eval": tuple(one.known_as for one in judged)}
    given = None if teacher is None or isinstance(teacher, (str, os.PathLike)) else from_memory(teacher)
    if given is not None:
        options["teacher"] = given.name
    settings = from_options(preset, options)
    place = None if out is None else Path(out)
    return _Run(settings, trained, judged, place, memory, resume, progress or Progress(), given).run()


class _Run:
    """One run of `recover`, phase by phase."""

    def __init__(
        self,
        settings: Settings,
        text: Text,
        judged: Sequence[Text],
        out: Path | None,
        memory: str | int | None,
        resume: bool,
        progress: Progress,
        teacher: InMemory | None,
    ):
        self.settings, self.out, self.resume, self.teacher = settings, out, resume, teacher
        self.text, self.judged = text, judged
        self.limit = None if memory is None else size_in_bytes(memory)
        self.source = _pruned_source(settings.folder, out)
        import peft  # noqa: F401  # so that the memory it takes is no part of the measured peak
        from accelerate import Accelerator

        self.accelerator = Accelerator(device_placement=False)
        self.main = self.accelerator.is_main_process
        many = self.accelerator.num_processes > 1
        self.device = self.accelerator.device if many else find_device(settings.device)
        self.progress = progress if self.main else Progress()

    def run(self) -> Recovered:
        with ExitStack() as stack:
            stack.enter_context(self._alone())
            if self.out is None:
                self.aside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvprune-")))
            else:
                self.aside = self.out / DENSE
                stack.callback(tidy, self.out)
            return self._recovered()

    def _alone(self) -> AbstractContextManager[None]:
        return alone(self.out) if self.out is not None and self.main else nullcontext()

    def _recovered(self) -> Recovered:
        self.peak = memory.PeakMemory(self.device)
        old = read_shown(Path(self.source.folder), ("source", "ratio_achieved"))
        s = self.settings = self.settings.for_cut(old["ratio_achieved"])
        with self._phase("load"):
            tokenizer = load_tokenizer(self.source)
            lm = load_model(self.source, str(self.device), s.dtype)
            self.computes = name_of(lm.dtype)
            self.weight_bytes = memory.weight_bytes(lm)
            limit = lm.config.max_position_embeddings
        dense = self._dense(lm, old) if s.needs_dense else None
        data = self._data(tokenizer, limit, dense)
        if data[0].empty:
            self.progress.say(f"{data[0].empty} examples are left out: they have no instruction or no output")
        if data[0].left_out:
            self.progress.say(f"{data[0].left_out} examples are left out: their answers do not fit into a window")
        texts = evaluation.texts(s, self.text, self.judged, old, tokenizer, limit, data[1])
        for name, ids in [(s.text, data[0].ids), (s.text, data[1].ids), *texts]:
            check_ids(ids, lm.config.vocab_size, f"the text {name}")
        sharded = "FSDP" in str(self.accelerator.distributed_type)
        peft_model = add_adapters(lm, s, same_dtype=sharded)
        teacher = dense if LOSSES[s.loss].needs_teacher else None
        dense = None
        checkpoints = Checkpoints(self.out if self.main else None)
        checkpoints.open(self._identity(data, texts, teacher), self.resume)
        self.accelerator.wait_for_everyone()
        try:
            before = self._before(checkpoints, lm, teacher, texts, old)
            training = self._train(lm, teacher, data, checkpoints)
        except KVPruneError:
            self._forget_if_empty(checkpoints)
            raise
        teacher = None
        if not self.main:
            self.accelerator.wait_for_everyone()
            return Recovered(None, tokenizer, None)
        with self._phase("merge"):
            if sharded:
                lm = load_model(self.source, str(self.device), s.dtype)
                peft_model = add_adapters(lm, s, same_dtype=True)
            merged = merge(peft_model, lm, training.best)
            round_as_stored(merged)
        after = self._perplexities(merged, texts, "evaluate recovered")
        rows = [{**row, "pruned": value.value} for row, value in zip(before, after, strict=True)]

        def record() -> dict[str, Any]:
            return self._record(old, rows, training, merged)

        saved, plan = record(), (Path(self.source.folder) / PLAN).read_text(encoding="utf-8")
        if self.out is not None:
            with self._phase("save"):
                saved = save(merged, tokenizer, plan, record, self.out)
            checkpoints.close()
        remember(merged, tokenizer, plan, saved)
        self.accelerator.wait_for_everyone()
        return Recovered(merged, tokenizer, saved)

    @contextmanager
    def _phase(self, name: str, total: int = 1) -> Iterator[Callable[..., None]]:
        with self.progress.phase(name, total) as advance:
            yield advance
        memory.release()

    def _data(self, tokenizer: PreTrainedTokenizerBase, limit: int, dense: PreTrainedModel | None) -> tuple[Data, Data]:
        s = self.settings
        self.text.check_fits(limit)
        window, sampled = min(s.window, limit), None
        if s.text == SELF:
            assert dense is not None
            tokens = s.tokens or SAMPLED
            with self._phase("sample", tokens) as advance:
                sampled = sample_ids(dense, tokenizer, tokens, window, s.seed, advance)
        return read_data(
            self.text,
            tokenizer,
            window=window,
            tokens=s.tokens,
            held_out=s.held_out,
            batch=s.batch,
            sampled=sampled,
        )

    def _dense(self, lm: PreTrainedModel, old: dict[str, Any]) -> PreTrainedModel:
        """The dense model, frozen."""
        s = self.settings
        piece = activations(lm, s, self.text.row or s.window, self.accelerator.num_processes)
        room = Room(self.device, self.limit, self.weight_bytes, piece, self.aside)
        return load_teacher(s, self.teacher, old, lm, room, self._phase, self.progress.say)

    def _identity(
        self, data: tuple[Data, Data], texts: evaluation.Texts, teacher: PreTrainedModel | None
    ) -> dict[str, Any]:
        """What must be the same for an unfinished run to go on: the settings, and what they led to."""
        return self.settings.as_json() | {
            "recovery_text": digest(tensor for part in data for tensor in (part.ids, part.labels)),
            "weights": hashlib.sha256(repr(weight_checksums(Path(self.source.folder))).encode()).hexdigest(),
            "evaluation_texts": digest(ids for _, ids in texts),
            "teacher_weights": None if teacher is None else fingerprint(teacher),
            "computed_on": f"{self.accelerator.num_processes} x {self.device.type} in {self.computes} "
            f"on {torch.get_num_threads()} threads",
            "versions": _versions(),
        }

    def _before(self, checkpoints: Checkpoints, lm, teacher, texts, old: dict[str, Any]) -> list[dict[str, Any]]:
        """The evaluation's rows with "dense" and "before"; the adapters add nothing yet."""
        rows = checkpoints.before()
        if rows is not None or not self.main:
            return rows or []
        mine = self._perplexities(lm, texts, "evaluate pruned")
        dense = None if teacher is None else self._perplexities(teacher, texts, "evaluate dense")
        rows = evaluation.rows(texts, mine, dense, old)
        checkpoints.keep_before(rows)
        return rows

    def _train(self, lm, teacher, data: tuple[Data, Data], checkpoints: Checkpoints) -> Training:
        reader = checkpoints if self.main else Checkpoints(self.out)
        training = Training(
            self.accelerator, Trainee(lm, teacher, self.settings), self.device, data, self.settings, reader
        )
        with self._phase("train", training.total) as advance:
            training.run(advance)
        return training

    def _forget_if_empty(self, checkpoints: Checkpoints) -> None:
        """A run that ended before its first checkpoint leaves nothing."""
        if self.main and not checkpoints.has_steps():
            checkpoints.discard()

    def _perplexities(self, lm: PreTrainedModel, texts, phase: str):
        lm.eval()
        with self._phase(phase, sum(len(ids) for _, ids in texts)) as advance:
            return evaluation.perplexities(lm, texts, advance)

    def _record(
        self, old: dict[str, Any], rows: list[dict[str, Any]], training: Training, lm: PreTrainedModel
    ) -> dict[str, Any]:
        """DIR's record with what this run measured; docs/recovery.md has the list."""
        s, state = self.settings, training.state
        recovered = {
            "text": s.text,
            "tokens": state.tokens,
            "steps": state.step,
            "loss": s.loss,
            "settings": s.as_json(),
            "curve": [list(point) for point in state.curve],
            "held_out_curve": [list(point) for point in state.held_out],
            "best_step": state.best_step,
            "stopped_early": state.stopped_early,
            "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
            "seconds": round(state.seconds, 3),
            "processes": self.accelerator.num_processes,
        }
        if "recovered" in old:
            recovered["earlier"] = old["recovered"]
        return {
            **{name: value for name, value in old.items() if name != "files"},
            "recovered": recovered,
            "perplexity": rows,
            "seconds": {name: round(seconds, 3) for name, seconds in self.progress.seconds.items()},
            "dtype": name_of(stored_dtype(lm)),
            "compute_dtype": name_of(lm.dtype),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
            "peak_memory_bytes": self.peak.bytes(),
            "memory_formula_bytes": self._formula(training, lm),
        }

    def _formula(self, training: Training, lm: PreTrainedModel) -> dict[str, int]:
        """What a process may need at its peak, in bytes; docs/recovery.md says where it comes from."""
        adapter = sum(t.numel() * t.element_size() for t in training.best.values())
        window, processes = training.train.ids.shape[1], self.accelerator.num_processes
        return {
            "weights": self.weight_bytes * (2 if self.settings.needs_dense else 1),
            "adapters, gradients, moments, best": 6 * adapter,
            "activations of one piece": activations(lm, self.settings, window, processes),
            "one copy of the weights to save": self.weight_bytes,
        }


def merge(peft_model: Any, lm: PreTrainedModel, adapter: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model with `adapter` (names as in Trainee) added to its weights, in the dtype it was loaded in."""
    dtypes = {name: p.dtype for name, p in lm.named_parameters() if ADAPTER not in name}
    parameters = dict(lm.named_parameters())
    with torch.no_grad():
        for name, value in adapter.items():
            parameters[name.removeprefix("lm.")].copy_(value)
    merged: PreTrainedModel = peft_model.merge_and_unload().eval()
    checkpoint_activations(merged, False)
    for name, parameter in merged.named_parameters():
        if parameter.dtype != dtypes.get(name.replace(".weight", ".base_layer.weight"), parameter.dtype):
            raise TypeError(f"merging changed {name} to {parameter.dtype}")
    return merged.requires_grad_(True)


def _pruned_source(folder: str, out: Path | None) -> Source:
    source = resolve(folder)
    if not source.is_pruned:
        raise BadOption(f"{folder} is not a pruned folder; make one with: kvprune prune {folder} --out DIR")
    if out is not None and out.resolve() == Path(folder).resolve():
        raise BadOption(f"--out {out} is the folder to recover; choose another --out")
    return source


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {**versions(), **{name: version(name) for name in ("peft", "accelerate")}}
