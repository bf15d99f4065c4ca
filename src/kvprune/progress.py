"""Progress of long work: silent by default; on stderr for the command line, a bar per phase on a terminal and plain
lines elsewhere. Keeps each phase's time."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TextIO

from kvprune import processes

LONG = 1.0  # seconds from which on a phase is worth a line


class Progress:
    """Times phases and shows nothing. `seconds` maps each finished phase to its wall time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int = 1) -> Iterator[Callable[..., None]]:
        """A phase of `total` steps; yields advance(steps, note=""), note being a few words on how it goes."""
        start = time.perf_counter()
        with self._show(name, total) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def say(self, message: str) -> None:
        """A line for the user."""

    @contextmanager
    def _show(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda steps, note="": None


@contextmanager
def replaced(module: ModuleType | type, **attributes: Any) -> Iterator[None]:
    """Within, a module or class has other attributes; those that it has not at all are left alone."""
    before = {name: getattr(module, name) for name in attributes if hasattr(module, name)}
    for name in before:
        setattr(module, name, attributes[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers reads and writes weights without bars of its own. Downloads from the hub keep theirs."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    try:
        with replaced(modeling_gguf_pytorch_utils, tqdm=lambda rows, **_: rows):
            yield
    finally:
        logging.set_tqdm_hook(before)


def on_stderr() -> Progress:
    """Bars where stderr is a terminal that can draw them, Lines where it is a file, a pipe or a plain one; of several
    processes the main one's."""
    if not processes.is_main():
        return Progress()
    bars = Bars()
    drawn = sys.stderr.isatty() and bars.console.is_terminal and not bars.console.is_dumb_terminal
    return bars if drawn else Lines()


class Bars(Progress):
    """A rich progress bar per phase, on stderr."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self.console = Console(stderr=True)

    def say(self, message: str) -> None:
        self.console.print(message, style="yellow", highlight=False, markup=False)

    @contextmanager
    def _show(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=max(8, min(40, self.console.width - 72))),  # what a note leaves
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total, note="")
            yield lambda steps, note="": bars.update(task, advance=steps, note=note)
            bars.update(task, completed=total)


class Lines(Progress):
    """A plain line every `interval` seconds of a phase, also within a step, and one at the end of a long phase."""

    interval = 30.0  # seconds
    look = 1.0  # seconds between two looks at the clock

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """stream: stderr, as it is when a line is due, if None. clock: in seconds."""
        super().__init__()
        self.stream, self.clock = stream, clock

    def say(self, message: str) -> None:
        with suppress(OSError, ValueError):  # a log that is gone must not end hours of work
            stream = self.stream or sys.stderr
            stream.write(message + "\n")  # at once: two threads speak
            stream.flush()

    @contextmanager
    def _show(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        state = _Phase(name, total, self.clock())
        ended = threading.Event()

        def watch() -> None:
            said = state.start
            while not ended.wait(self.look):
                now = self.clock()
                if now - said >= self.interval:
                    said = now
                    self.say(state.line(now))

        thread = threading.Thread(target=watch, daemon=True, name=f"progress of {name}")
        thread.start()
        try:
            yield lambda steps, note="": state.advance(steps, note, self.clock())
        finally:
            ended.set()
            thread.join()  # no line behind the phase's end
        taken = self.clock() - state.start
        if taken >= LONG:
            self.say(", ".join([f"{name}: done in {taken:.1f} s", *filter(None, [state.note])]))


@dataclass
class _Phase:
    """How far a phase is. Times are the clock's, in seconds."""

    name: str
    total: int
    start: float
    done: int = 0
    note: str = ""
    latest: float = field(init=False)  # when a step was last done
    base: tuple[float, int] = field(init=False)  # the time and the steps from which on speed is measured

    def __post_init__(self) -> None:
        self.latest, self.base = self.start, (self.start, 0)

    def advance(self, steps: int, note: str, now: float) -> None:
        self.note = note
        if not steps:
            return
        self.done, self.latest = self.done + steps, now
        if now - self.start < LONG:  # steps of a resumed run, which come at once, say nothing of the speed
            self.base = now, self.done

    def line(self, now: float) -> str:
        """As "train: 12 of 100 (12%), 0:30 elapsed, 3:40 left, loss 2.345"."""
        parts = [] if self.total <= 1 else [f"{self.done:,} of {self.total:,} ({self.done / self.total:.0%})"]
        parts.append(f"{_clock(now - self.start)} elapsed")
        since, before = self.base
        if self.done > before:
            left = (self.latest - since) / (self.done - before) * (self.total - self.done)
            parts.append(f"{_clock(max(left - (now - self.latest), 0))} left")
        return f"{self.name}: " + ", ".join([*parts, *filter(None, [self.note])])


def _clock(seconds: float) -> str:
    """90 -> "1:30"; with hours where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
