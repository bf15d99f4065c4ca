"""What an unfinished run has already done, on disk, so that kill -9 costs no more than one probe or one layer."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kvprune import processes
from kvprune.channels.choice.basis import Basis
from kvprune.channels.evidence.importance.base import Scores
from kvprune.errors import BrokenCheckpoint, OutputExists
from kvprune.runtime.files import DENSE, RESUME, read_json, write_whole, writing_to

_SETTINGS, _LOSSES, _ESTIMATES = "settings.json", "losses{}.jsonl", "estimates{}.jsonl"
_LAYER, _SCORES = "layer-{:04}.safetensors", "scores-{:04}.safetensors"
_CUT, _REFIT = "cut-{:04}.safetensors", "refit-{:04}.safetensors"
_LOSS, _ESTIMATE = TypeAdapter(tuple[int, int, float]), TypeAdapter(tuple[int, list[float]])  # a line of each file


class Journal:
    """Losses by (batch, probe), and layer by layer scores and bases, estimates, what was cut, and what was refitted.
    Without a folder nothing is written."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.losses: dict[tuple[int, int], float] = {
            (batch, probe): loss for batch, probe, loss in self._lines(_LOSSES, _LOSS)
        }

    def _lines(self, name: str, kind: TypeAdapter) -> list[Any]:
        """Of files that grow by lines of JSON, one a process; a last one that was cut short would spoil the next, and
        goes. Raises BrokenCheckpoint."""
        found = []
        for path in () if self.folder is None else sorted(self.folder.glob(name.format("*"))):
            written = path.read_bytes()
            whole = written[: written.rfind(b"\n") + 1]
            if whole != written:
                with writing_to(path.parent.parent):
                    os.truncate(path, len(whole))
            with _reading(path):
                found += [kind.validate_json(line, strict=True) for line in whole.splitlines()]
        return found

    def _add_line(self, name: str, line: Any) -> None:
        """On the disk before this returns."""
        if self.folder is not None:
            own = name.format(processes.number() or "")
            with writing_to(self.folder.parent), (self.folder / own).open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    @staticmethod
    def check(out: Path, resume: bool) -> dict[str, Any] | None:
        """The settings of the unfinished run in `out`, if there is one. Raises OutputExists as `open` does, but for
        settings that differ: what can be known before any work is done."""
        try:
            found = read_json(out / RESUME / _SETTINGS)
        except (OSError, ValueError):
            found = None
        if found is None:
            if out.exists() and (not out.is_dir() or any(p.name not in (RESUME, DENSE) for p in out.iterdir())):
                raise OutputExists(f"{out} exists and is not empty; choose another --out or remove it")
            return None
        if (out / "config.json").exists():
            raise OutputExists(f"{out} holds a finished model; choose another --out or remove it")
        if not resume:
            raise OutputExists(f"{out} holds an unfinished run; add --resume to continue it, or remove it")
        return found

    @classmethod
    def open(cls, out: Path, settings: dict[str, Any], resume: bool) -> "Journal":
        """The journal of the run that writes to `out`, new or continued.

        Raises OutputExists unless `out` is missing, empty, or a run of the same settings and `resume` is set.
        """
        if not processes.is_main():  # it is open in the main one
            return cls(out / RESUME)
        folder = out / RESUME
        found = cls.check(out, resume)
        if found is not None:
            check_same(found, settings, f"{out} holds an unfinished run")
            return cls(folder)
        with writing_to(out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / _SETTINGS, json.dumps(settings, indent=2).encode())
        return cls(folder)

    def add(self, batch: int, probe: int, loss: float) -> None:
        """Record one finished probe, on the disk before this returns."""
        self.losses[batch, probe] = loss
        self._add_line(_LOSSES, [batch, probe, loss])

    def keep_layer(self, layer: int, scores: Scores, basis: Basis | None) -> tuple[Scores, Basis | None]:
        """Keep the importance scores of a layer, and the basis they go with; returns them as they lie on the disk, if
        there is one: a basis is large."""
        if self.folder is None:
            return scores, basis
        tensors = {"qk": scores.qk, "vo": scores.vo} | ({} if basis is None else basis.tensors())
        self._save(_LAYER.format(layer), tensors)
        found = self.load_layer(layer)
        assert found is not None
        return found

    def load_layer(self, layer: int) -> tuple[Scores, Basis | None] | None:
        """What keep_layer kept of a layer, or None; the basis is mapped, and takes no memory."""
        path = self._there(_LAYER.format(layer))
        if path is None:
            return None
        with _reading(path):
            tensors = load_file(path)
            scores = Scores(tensors.pop("qk").clone(), tensors.pop("vo").clone())
            return scores, Basis.of(tensors) if tensors else None

    def save_scores(self, layer: int, scores: Scores) -> None:
        """Keep the importance scores of a layer that go with no basis."""
        if self.folder is not None:
            self._save(_SCORES.format(layer), {"qk": scores.qk, "vo": scores.vo})

    def load_scores(self, layer: int) -> Scores | None:
        """What save_scores kept of a layer, or None."""
        path = self._there(_SCORES.format(layer))
        if path is None:
            return None
        with _reading(path):
            return Scores(**load_file(path))

    def save_estimates(self, block: int, changes: Sequence[float]) -> None:
        """Keep the estimated sensitivities of a block's probes, which all processes know."""
        if processes.is_main():
            self._add_line(_ESTIMATES, [block, list(changes)])

    def load_estimates(self) -> dict[int, list[float]]:
        """What save_estimates kept, by block."""
        return {block: changes for block, changes in self._lines(_ESTIMATES, _ESTIMATE)}

    def cut_file(self, layer: int) -> Path:
        """Where save_cut writes."""
        assert self.folder is not None
        return self.folder / _CUT.format(layer)

    def save_cut(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keep what the cut made of a layer's attention."""
        self._save(_CUT.format(layer), tensors)

    def load_cut(self, layer: int) -> dict[str, torch.Tensor] | None:
        """What save_cut kept of a layer, mapped, or None."""
        path = self._there(_CUT.format(layer))
        if path is None:
            return None
        with _reading(path):
            return load_file(path)

    def refit_file(self, layer: int) -> Path:
        """Where save_refit writes."""
        assert self.folder is not None
        return self.folder / _REFIT.format(layer)

    def save_refit(self, layer: int, tensors: dict[str, torch.Tensor], report: list[dict[str, Any]]) -> None:
        """Keep what refit made of a layer, and what it reports of it."""
        if self.folder is not None:
            self._save(_REFIT.format(layer), tensors, {"report": json.dumps(report)})

    def load_refit(self, layer: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]] | None:
        """What save_refit kept of a layer, or None."""
        path = self._there(_REFIT.format(layer))
        if path is None:
            return None
        with _reading(path), safe_open(path, framework="pt") as file:
            report = json.loads(file.metadata()["report"])
            return {name: file.get_tensor(name) for name in file.keys()}, report  # noqa: SIM118  # no dict

    def _there(self, name: str) -> Path | None:
        """A file of the journal, if it has been written."""
        path = None if self.folder is None else self.folder / name
        return path if path is not None and path.exists() else None

    def _save(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write a file of the journal, whole or not at all. Raises NoSpace."""
        assert self.folder is not None
        partial = self.folder / (name + ".partial")
        if processes.is_main():
            with writing_to(self.folder.parent):
                save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, partial, metadata)
                os.replace(partial, self.folder / name)
        processes.wait()

    def close(self) -> None:
        """The run is finished: forget it."""
        if self.folder is not None and processes.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """The run is of no use: forget it, and remove the output folder if nothing else is in it."""
        self.close()
        processes.wait()
        if self.folder is not None:
            with suppress(OSError):  # something is in it, or another process was faster
                self.folder.parent.rmdir()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise BrokenCheckpoint for a file of the journal that is not as it was written."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise BrokenCheckpoint(f"{path} is damaged; remove {path.parent.parent} and start again") from None


def check_same(found: Any, settings: dict[str, Any], what: str) -> None:
    """Raise OutputExists, which begins with `what`, if `found` has other values than `settings`."""
    if not isinstance(found, dict):
        raise OutputExists(f"{what} whose settings are damaged; remove it, or choose another --out")
    for name, value in settings.items():
        if name not in found:
            raise OutputExists(f"{what} that an older kvprune began; remove it, or choose another --out")
        if value != found[name]:
            raise OutputExists(
                f"{what} with {name}={found[name]!r}, not {value!r}; repeat its settings, or choose another --out"
            )
