"""kill -9 at random moments of a command, again and again. `KVPRUNE_KILLS=34` asks for more of them, in each test."""

import multiprocessing
import os
import random
import time
from functools import lru_cache

PRELOADED = [
    "kvprune.channels.prune",
    "kvprune.recovery.recover",
    "kvprune.studies.calibration",
    "kvprune.engines.gguf",
]
PRELOADED += ["transformers.models.llama.modeling_llama", "peft", "matplotlib.figure"]
killed: dict[str, int] = {}  # by test, for the summary


def kills(fewest: int) -> int:
    return int(os.environ.get("KVPRUNE_KILLS", fewest))


@lru_cache
def processes():
    """A server that has imported everything, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    imports = context.Process(target=int)
    imports.start()
    imports.join()
    return context


def _begun(work, arguments):
    """In a process of its own, with this one's environment: the server has that of whoever asked for it first."""
    process = processes().Process(target=_work, args=(dict(os.environ), work, arguments))
    process.start()
    return process


def _work(environment, work, arguments):
    os.environ.update(environment)
    work(*arguments)


def seconds(work, *arguments) -> float:
    """How long it takes when it is not disturbed."""
    start = time.monotonic()
    process = _begun(work, arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - start


def disturb(name: str, times: int, takes: float, work, *arguments):
    """Run it again and again, and kill it so many times, at moments of the first `takes` seconds; then let it end.
    Yields whether that was a run that ended by itself, after each."""
    moments, done = random.Random(name), 0
    while True:
        process = _begun(work, arguments)
        is_last = done == times
        process.join(None if is_last else moments.uniform(0, takes))
        done += process.exitcode is None
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        killed[name] = done
        yield process.exitcode == 0
        if is_last:
            return
