"""The state of an unfinished recovery, in OUT/.resume: kill -9 costs at most the steps since the last checkpoint.

A checkpoint is written to a folder of its own, flushed to the disk, renamed, and only then is the one before it
removed: at every moment there is a whole one. Tensors are safetensors, the rest is JSON; nothing is pickled. No random
state is kept, since all that is random in a step follows from the seed and the step's number.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvprune.channels.journal import Journal
from kvprune.errors import BrokenCheckpoint
from kvprune.runtime.files import RESUME, flush, read_json, write_whole, writing_to

_SETTINGS, _BEFORE, _STOPPED, _STATE, _PARTIAL = (
    "settings.json",
    "before.json",
    "not-finite.json",
    "state.json",
    "partial",
)
_STEP = "step-"
Tensors = dict[str, torch.Tensor]


@dataclass
class State:
    """How far a run is. Curves are [[step, nats per token], ...]: the loss trained on, and next tokens held out.
    worse: evaluations in a row without a new best."""

    step: Annotated[int, Field(ge=0)] = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    worse: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped_early: bool = False


_STATES = TypeAdapter(State)


@dataclass
class Checkpoint:
    """State, adapter weights now and at the best evaluation, and the optimizer's moments."""

    state: State
    adapter: Tensors
    best: Tensors
    optimizer: Tensors


class Checkpoints:
    """The checkpoints of the run that writes to `out`; without a folder nothing is written."""

    def __init__(self, out: Path | None):
        self.out = out
        self.journal = Journal()

    @property
    def folder(self) -> Path | None:
        return None if self.out is None else self.out / RESUME

    def open(self, identity: dict[str, Any], resume: bool) -> None:
        """Start or continue. Raises OutputExists unless `out` is missing, empty, or an unfinished run of the same
        identity and `resume` is set; a run whose loss was not finite may be continued with another lr, once."""
        if self.out is None or self.folder is None:
            return
        found, stopped = _read(self.folder / _SETTINGS), _read(self.folder / _STOPPED)
        known = {**identity, "lr": found.get("lr")} if found and stopped else identity
        self.journal = Journal.open(self.out, known, resume)
        if known != identity:  # from here on the new one
            self._write(_SETTINGS, identity)
            (self.folder / _STOPPED).unlink()

    def save(self, checkpoint: Checkpoint) -> None:
        """Raises NoSpace, after which the checkpoint before is still there and whole."""
        if self.out is None or self.folder is None:
            return
        partial, target = self.folder / _PARTIAL, self.folder / f"{_STEP}{checkpoint.state.step:08d}"
        older = [path for path in self._steps() if path != target]
        if target.exists():  # a run without steps that is resumed
            return
        try:
            with writing_to(self.out):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                for name in ("adapter", "best", "optimizer"):
                    save_file(getattr(checkpoint, name), partial / f"{name}.safetensors")
                (partial / _STATE).write_text(json.dumps(asdict(checkpoint.state)))
                for path in (*partial.iterdir(), partial):
                    flush(path)
                os.replace(partial, target)
                flush(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint, or None before the first. Raises BrokenCheckpoint."""
        steps = self._steps()
        if not steps:
            return None
        try:
            state = _STATES.validate_json((steps[-1] / _STATE).read_bytes(), strict=True)
            tensors = [load_file(steps[-1] / f"{name}.safetensors") for name in ("adapter", "best", "optimizer")]
        except (OSError, ValueError, SafetensorError):
            raise BrokenCheckpoint(f"{steps[-1]} is damaged; remove {self.out} and start again") from None
        return Checkpoint(state, *tensors)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_STEP}*")) if self.folder is not None else []

    def has_steps(self) -> bool:
        """Whether a checkpoint has been written."""
        return bool(self._steps())

    def before(self) -> list[dict[str, Any]] | None:
        """The figures of the unrecovered model, if an earlier part of this run took them."""
        return None if self.folder is None else _read(self.folder / _BEFORE)

    def keep_before(self, rows: list[dict[str, Any]]) -> None:
        self._write(_BEFORE, rows)

    def stopped(self, step: int) -> str:
        """Note that the loss of `step` was not finite; says what is left to the user."""
        steps = self._steps()
        if self.out is None or not steps:
            self.discard()
            return "there was no checkpoint yet; start again with a smaller --lr"
        self._write(_STOPPED, {"step": step})
        kept = int(steps[-1].name.removeprefix(_STEP))
        return f"the checkpoint of step {kept} is kept in {self.folder}; go on from it with --resume and a smaller --lr"

    def _write(self, name: str, value: Any) -> None:
        if self.out is None or self.folder is None:
            return
        with writing_to(self.out):
            write_whole(self.folder / name, json.dumps(value))

    def close(self) -> None:
        """The run is finished: forget it."""
        self.journal.close()

    def discard(self) -> None:
        """The run is of no use: forget it, and remove the output folder if nothing else is in it."""
        self.journal.discard()


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
