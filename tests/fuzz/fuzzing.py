"""Runs a reader on many damaged inputs. It may take one or refuse it with a KVPruneError, and nothing else: no other
exception, no hang, no memory without end."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvprune.errors import KVPruneError

INPUTS = int(os.environ.get("KVPRUNE_FUZZ", "400"))  # to each reader
SECONDS, BYTES = 30, 4 << 30  # what an input may take, and what the process may take beside what it has
counts: dict[str, dict[str, float]] = {}  # what the summary shows


class Hang(BaseException):
    """Not caught by what catches any Exception."""


@contextmanager
def limited() -> Iterator[None]:
    """A process that may not grow without end."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"an input took more than {SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def fuzz(
    name: str,
    check: Callable[[bytes], object],
    valid: bytes,
    damaged: st.SearchStrategy[bytes],
    faults: Iterable[bytes] = (),
    share: int = 1,
) -> None:
    """valid: an input that must be taken. faults: damaged ones that once made something else than a KVPruneError; the
    others are drawn, the same ones in every run. share: one in so many, where an input takes long."""
    count = counts.setdefault(name, dict.fromkeys(("inputs", "taken", "slowest"), 0))

    def survives(content: bytes) -> None:
        start = time.monotonic()
        count["inputs"] += 1
        try:
            with _in_time():
                check(content)
            count["taken"] += 1
        except KVPruneError:
            pass
        count["slowest"] = max(count["slowest"], time.monotonic() - start)

    @settings(
        max_examples=max(INPUTS // share, 5),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged)
    def drawn(content: bytes) -> None:
        survives(content)

    check(valid)
    for content in faults:
        survives(content)
    with limited():
        drawn()
