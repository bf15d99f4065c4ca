"""A prune inside a study: its phases are notes beside the study's bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvprune.progress import Progress


class Noted(Progress):
    """The phases of one prune as notes beside the study's bar."""

    def __init__(self, outer: Progress, advance: Callable[..., None], cell: str):
        super().__init__()
        self.outer, self.advance, self.cell = outer, advance, cell

    def say(self, message: str) -> None:
        self.outer.say(f"{self.cell}: {message}")

    @contextmanager
    def _show(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        self.advance(0, f"{self.cell}: {name}")
        yield lambda steps, note="": None
