"""What an unfinished run has already done, on disk, so that kill -9 costs no more than one probe or one layer."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kvprune.channels.choice.basis import Basis
from kvprune.channels.evidence.importance.base import Scores
from kvprune.errors import OutputExists
from kvprune.runtime.files import RESUME, write_whole, writing_to

_SETTINGS, _SCORES, _LOSSES = "settings.json", "scores.safetensors", "losses.jsonl"
_ESTIMATES = "estimates.json"
_REFIT = "refit-{:04}.safetensors"


class Journal:
    """Losses by (batch, probe), the importance scores, and the refitted layers. Without a folder nothing is written."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.losses: dict[tuple[int, int], float] = {}
        if folder is None:
            return
        path = folder / _LOSSES
        if path.exists():
            written = path.read_text()
            whole = written[: written.rfind("\n") + 1]
            for line in whole.splitlines():
                batch, probe, loss = json.loads(line)
                self.losses[batch, probe] = loss
            if whole != written:  # a last line that was cut short would spoil the next one
                with writing_to(folder.parent):
                    os.truncate(path, len(whole.encode()))

    @staticmethod
    def check(out: Path, resume: bool) -> dict[str, Any] | None:
        """The settings of the unfinished run in `out`, if there is one. Raises OutputExists as `open` does, but for
        settings that differ: what can be known before any work is done."""
        try:
            found = json.loads((out / RESUME / _SETTINGS).read_text())
        except (OSError, ValueError):
            found = None
        if found is None:
            if out.exists() and (not out.is_dir() or any(p.name != RESUME for p in out.iterdir())):
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
        if self.folder is None:
            return
        with writing_to(self.folder.parent), (self.folder / _LOSSES).open("a") as file:
            file.write(json.dumps([batch, probe, loss]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save_scores(self, scores: Sequence[Scores], bases: Sequence[Basis] | None) -> None:
        """Keep the importance scores of all layers, and the bases they go with."""
        if self.folder is None:
            return
        tensors = {f"{i}.{name}": getattr(s, name) for i, s in enumerate(scores) for name in ("qk", "vo")}
        for i, basis in enumerate(bases or ()):
            tensors |= {f"{i}.{name}": tensor for name, tensor in basis.tensors().items()}
        self._save(_SCORES, tensors)

    def load_scores(self) -> tuple[list[Scores], list[Basis] | None] | None:
        """What save_scores kept, or None if that phase had not finished."""
        if self.folder is None or not (self.folder / _SCORES).exists():
            return None
        try:
            tensors = load_file(self.folder / _SCORES)
        except SafetensorError:
            return None
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, field = name.partition(".")
            layers.setdefault(int(layer), {})[field] = tensor
        found = [layers[i] for i in sorted(layers)]
        scores = [Scores(layer.pop("qk"), layer.pop("vo")) for layer in found]
        return scores, [Basis.of(layer) for layer in found] if found[0] else None

    def save_estimates(self, changes: Sequence[float]) -> None:
        """Keep the estimated sensitivities of all probes."""
        if self.folder is not None:
            with writing_to(self.folder.parent):
                write_whole(self.folder / _ESTIMATES, json.dumps(list(changes)))

    def load_estimates(self) -> list[float] | None:
        """What save_estimates kept, or None if that phase had not finished."""
        path = None if self.folder is None else self.folder / _ESTIMATES
        return json.loads(path.read_text()) if path is not None and path.exists() else None

    def save_refit(self, layer: int, tensors: dict[str, torch.Tensor], report: list[dict[str, Any]]) -> None:
        """Keep what refit made of a layer, and what it reports of it."""
        if self.folder is not None:
            self._save(_REFIT.format(layer), tensors, {"report": json.dumps(report)})

    def load_refit(self, layer: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]] | None:
        """What save_refit kept of a layer, or None."""
        path = None if self.folder is None else self.folder / _REFIT.format(layer)
        if path is None or not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            report = json.loads(file.metadata()["report"])
            return {name: file.get_tensor(name) for name in file.keys()}, report  # noqa: SIM118  # no dict

    def _save(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write a file of the journal, whole or not at all. Raises NoSpace."""
        assert self.folder is not None
        partial = self.folder / (name + ".partial")
        with writing_to(self.folder.parent):
            save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, partial, metadata)
            os.replace(partial, self.folder / name)

    def close(self) -> None:
        """The run is finished: forget it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """The run is of no use: forget it, and remove the output folder if nothing else is in it."""
        self.close()
        if self.folder is not None and self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def check_same(found: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    """Raise OutputExists, which begins with `what`, if `found` has other values than `settings`."""
    for name, value in settings.items():
        if name not in found:
            raise OutputExists(f"{what} that an older kvprune began; remove it, or choose another --out")
        if value != found[name]:
            raise OutputExists(
                f"{what} with {name}={found[name]!r}, not {value!r}; repeat its settings, or choose another --out"
            )
