"""A study's finished cells on the disk, a line each, so that a kill costs no more than the cell that was running.

Each line has a checksum of the rest of it and of all lines before: a line that was changed would spoil the report, and
nobody would see it.
"""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from kvprune.channels.journal import check_same
from kvprune.errors import KVPruneError, OutputExists
from kvprune.runtime.files import alone, write_whole, writing_to

CELLS, REPORT, PICTURE = "study.jsonl", "study.json", "study.png"
_SUM = "crc32"


class StudyJournal:
    """DIR/study.jsonl: the settings in the first line, then a cell a line."""

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool):
        """Raises OutputExists unless `out` is missing, empty, or a study of the same settings and `resume` is set.
        Nothing is written yet."""
        self.out, self.path, self.settings, self.resume = out, out / CELLS, settings, resume
        self.cells: list[dict[str, Any]] = []
        self.whole = self.sum = 0  # bytes of the file that are whole lines, and their checksum
        if out.exists() and not out.is_dir():
            raise OutputExists(f"{out} is a file; choose another --out")
        self._look()

    def _look(self) -> None:
        if self.path.is_file():
            self._read()
        elif self.out.exists() and any(self.out.iterdir()):
            raise OutputExists(f"{self.out} exists and is not empty; choose another --out or remove it")

    def _read(self) -> None:
        if not self.resume:
            finished = (self.out / REPORT).exists()
            state, mend = ("a finished", "choose another --out") if finished else ("an unfinished", "add --resume")
            raise OutputExists(f"{self.out} holds {state} study; {mend}, or remove it")
        written, self.sum = self.path.read_bytes(), 0
        self.whole = written.rfind(b"\n") + 1  # a last line that was cut short would spoil the next one
        try:
            lines = [self._checked(line) for line in written[: self.whole].splitlines()]
        except ValueError:
            raise OutputExists(f"{self.path} is damaged; remove {self.out} and start again") from None
        if not lines:
            return
        check_same(lines[0], self.settings, f"{self.out} holds a study")
        self.cells = lines[1:]

    @contextmanager
    def running(self) -> Iterator[None]:
        """While nobody else writes to the folder; of a study that fails without a finished cell nothing stays. Raises
        OutputExists and NoSpace."""
        with alone(self.out):
            self._look()  # once more: another run may have finished since
            try:
                self._start()
                yield
            except KVPruneError:
                self._discard_if_empty()
                raise

    def _start(self) -> None:
        """Write the settings, or cut off a broken last line."""
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
            file.write(json.dumps({**value, _SUM: self._sum(value)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.sum = self._sum(value)

    def _sum(self, value: dict[str, Any]) -> int:
        """Of what JSON makes of it, whether it was read or is to be written."""
        return zlib.crc32(json.dumps(value).encode(), self.sum)

    def _checked(self, line: bytes) -> dict[str, Any]:
        """A line without its checksum. Raises ValueError for one that was changed."""
        value = from_json(line)
        if not isinstance(value, dict) or value.pop(_SUM, None) != self._sum(value):
            raise ValueError("a line was changed")
        self.sum = self._sum(value)
        return value

    def finish(self, report: dict[str, Any]) -> None:
        """Write study.json, whole or not at all."""
        with writing_to(self.out):
            write_whole(self.out / REPORT, json.dumps(report, indent=1) + "\n")

    def _discard_if_empty(self) -> None:
        if not self.cells:
            self.path.unlink(missing_ok=True)
            if self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()
