"""A study's finished cells on the disk, a line each, so that a kill costs no more than the cell that was running."""

import json
import os
from pathlib import Path
from typing import Any

from kvprune.channels.journal import check_same
from kvprune.errors import OutputExists
from kvprune.runtime.files import write_whole, writing_to

CELLS, REPORT, PICTURE = "study.jsonl", "study.json", "study.png"


class StudyJournal:
    """DIR/study.jsonl: the settings in the first line, then a cell a line."""

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool):
        """Raises OutputExists unless `out` is missing, empty, or a study of the same settings and `resume` is set.
        Nothing is written yet."""
        self.out, self.path, self.settings = out, out / CELLS, settings
        self.cells: list[dict[str, Any]] = []
        self.whole = 0  # bytes of the file that are whole lines
        if out.exists() and not out.is_dir():
            raise OutputExists(f"{out} is a file; choose another --out")
        if self.path.is_file():
            self._read(resume)
        elif out.exists() and any(out.iterdir()):
            raise OutputExists(f"{out} exists and is not empty; choose another --out or remove it")

    def _read(self, resume: bool) -> None:
        if not resume:
            finished = (self.out / REPORT).exists()
            state, mend = ("a finished", "choose another --out") if finished else ("an unfinished", "add --resume")
            raise OutputExists(f"{self.out} holds {state} study; {mend}, or remove it")
        written = self.path.read_bytes()
        self.whole = written.rfind(b"\n") + 1  # a last line that was cut short would spoil the next one
        try:
            lines = [json.loads(line) for line in written[: self.whole].splitlines()]
        except ValueError:
            raise OutputExists(f"{self.path} is damaged; remove {self.out} and start again") from None
        if not lines:
            return
        check_same(lines[0], self.settings, f"{self.out} holds a study")
        self.cells = lines[1:]

    def start(self) -> None:
        """Write the settings, or cut off a broken last line. Raises NoSpace."""
        with writing_to(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self.whole)
        if not self.whole:
            self._append(self.settings)

    def add(self, cell: dict[str, Any]) -> None:
        """Record a finished cell; it is on the disk before this returns. Raises NoSpace."""
        self._append(cell)
        self.cells.append(cell)

    def _append(self, value: dict[str, Any]) -> None:
        with writing_to(self.out), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, report: dict[str, Any]) -> None:
        """Write study.json, whole or not at all."""
        with writing_to(self.out):
            write_whole(self.out / REPORT, json.dumps(report, indent=1) + "\n")

    def discard_if_empty(self) -> None:
        """Leave nothing behind of a study without a finished cell."""
        if not self.cells:
            self.path.unlink(missing_ok=True)
            if self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()
