"""The same KV memory, more users: vLLM serves one folder after another with the same bytes of KV cache, under one load.

    python benchmarks/serve_load.py DENSE NAME=FOLDER ... --python .venv-vllm/bin/python --kv-memory 180MiB \\
        [--rate 4] [--requests 40] [--prompt 128] [--new-tokens 120] [--fp8] [--minutes 0] [--out OUT]

Clients are open-loop: a request starts at its time whether others have ended or not (Poisson, the same times and
prompts for every folder). --fp8 adds a cell with fp8 KV for each folder. --minutes repeats the load for so long, and
notes how much memory the server held at the beginning and the end. The server listens on the loopback only, is in a
process group of its own, and is ended with it. OUT.json has the cells; OUT.md is drawn from it.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cells import Cells

from kvprune.options import size_in_bytes

DENSE = "dense"
READY = 600  # seconds that a server may take to answer


@contextmanager
def served(python: str, folder: str, memory: int, length: int, fp8: bool) -> Iterator[tuple[str, int]]:
    """(address, process id) of a vLLM that serves `folder`, until the block ends."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["--model", folder, "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--kv-cache-memory-bytes", str(memory), "--max-model-len", str(length), "--trust-remote-code"]
    words += ["--no-enable-prefix-caching", *(["--kv-cache-dtype", "fp8"] if fp8 else [])]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *words]
    server = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, server)
        yield address, server.pid
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            if server.poll() is None:
                os.killpg(server.pid, end)
                try:
                    server.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    continue


def _wait(address: str, server: subprocess.Popen) -> None:
    until = time.monotonic() + READY
    while time.monotonic() < until:
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended with exit code {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"vLLM was not ready after {READY} s")


def load(address: str, requests: int, rate: float, prompt: int, new_tokens: int, seed: int = 0) -> dict[str, Any]:
    """Send so many requests, `rate` a second on average, and time their tokens. Times in seconds."""
    draw = random.Random(seed)
    waits = [draw.expovariate(rate) for _ in range(requests)]
    prompts = [[draw.randrange(100, 1000) for _ in range(prompt)] for _ in range(requests)]
    found: dict[int, tuple[list[float], int]] = {}
    errors: list[str] = []
    busy: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            busy.append(metric(address, "vllm:num_requests_running"))

    def ask(i: int) -> None:
        try:
            found[i] = stream(address, prompts[i], new_tokens)
        except OSError as error:
            errors.append(str(error))

    before = metric(address, "vllm:num_preemptions_total")
    watcher = threading.Thread(target=watch)
    watcher.start()
    clients, started = [threading.Thread(target=ask, args=(i,)) for i in range(requests)], time.monotonic()
    for wait, client in zip(waits, clients, strict=True):
        time.sleep(wait)
        client.start()
    for client in clients:
        client.join()
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    new = sum(tokens for _, tokens in found.values())
    return {
        "requests": requests,
        "errors": errors,
        "new_tokens": new,
        "seconds": seconds,
        "tokens_per_second": new / seconds,
        "preemptions": metric(address, "vllm:num_preemptions_total") - before,
        "in_flight": max(busy, default=0.0),
        "first_token": quantiles([times[1] - times[0] for times, _ in found.values()]),
        "per_token": quantiles([(times[-1] - times[1]) / (n - 1) for times, n in found.values() if n > 1]),
    }


def stream(address: str, prompt: list[int], new_tokens: int) -> tuple[list[float], int]:
    """When a request was sent and when each piece of its answer came, and how many tokens that was. Raises OSError."""
    asked = {"model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps(asked | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    times, tokens = [time.monotonic()], 0
    with urllib.request.urlopen(request, timeout=3600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line.removeprefix(b"data: "))
            if "error" in piece:
                raise OSError(piece["error"])
            if piece["choices"]:
                times.append(time.monotonic())
            tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
    return times, tokens


def metric(address: str, name: str) -> float:
    """The sum of a Prometheus metric over its labels."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": values[0] if values else 0.0, "p99": values[0] if values else 0.0}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def group_bytes(leader: int) -> int:
    """Resident memory of all processes of a group (Linux)."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        if int(after[2]) == leader:
            total += int(after[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def cell(a: argparse.Namespace, folder: str, fp8: bool) -> dict[str, Any]:
    length = a.prompt + a.new_tokens
    with served(a.python, folder, size_in_bytes(a.kv_memory), max(length + 16, 256), fp8) as (address, leader):
        load(address, 2, 100.0, a.prompt, 4)  # the first calls are slow
        held, until = [group_bytes(leader)], time.monotonic() + 60 * a.minutes
        runs = [load(address, a.requests, a.rate, a.prompt, a.new_tokens)]
        while time.monotonic() < until:
            runs.append(load(address, a.requests, a.rate, a.prompt, a.new_tokens, seed=len(runs)))
        held.append(group_bytes(leader))
    errors = sum(len(run["errors"]) for run in runs)
    return runs[0] | {"runs": len(runs), "errors": errors, "server_bytes": {"before": held[0], "after": held[1]}}


def table(cells: Cells) -> str:
    head = ["model", "tokens/s", "of dense", "preemptions", "in flight", "first token p50 / p99", "per token p50 / p99"]
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    dense = cells.cells[DENSE]["tokens_per_second"]
    for name, one in cells.cells.items():
        first, each = (f"{one[key]['p50']:.3f} / {one[key]['p99']:.3f} s" for key in ("first_token", "per_token"))
        speed = one["tokens_per_second"]
        row = f"| {name} | {speed:.1f} | {speed / dense:.2f} | {one['preemptions']:.0f} | {one['in_flight']:.0f} "
        rows.append(row + f"| {first} | {each} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("others", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--kv-memory", default="180MiB")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_load"))
    a = parser.parse_args()
    settings = {name: getattr(a, name) for name in ("kv_memory", "requests", "rate", "prompt", "new_tokens", "minutes")}
    cells = Cells(a.out, a.model, a.only, settings)
    for name, folder in {DENSE: a.model, **dict(other.split("=", 1) for other in a.others)}.items():
        cells.run(name, lambda f=folder: cell(a, f, False), needed=name == DENSE)
        if a.fp8:
            cells.run(f"{name}, fp8 KV", lambda f=folder: cell(a, f, True))
    a.out.with_suffix(".md").write_text(table(cells))


if __name__ == "__main__":
    main()
