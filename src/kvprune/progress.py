"""Progress of long work: silent by default, a bar per phase on stderr for the command line. Keeps each phase's time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
