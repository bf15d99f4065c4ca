"""The same prune with the whole model in memory, block by block from disk, and shared by two processes.

    python benchmarks/streamed.py MODEL --work DIR [--runs 2] [--out benchmarks/results/streamed]

MODEL is a folder of safetensors or a .gguf file. The three ways take turns, each in a process of its own. Written down:
seconds of each run and their ratio to the first way, the peak of the process's memory, whether plan and weights are
equal to the last bit, and, for two processes, the largest relative difference of a weight matrix.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import kvprune
from kvprune import processes
from kvprune.channels.planning import choose_merge
from kvprune.channels.room import find_room
from kvprune.channels.settings import Settings
from kvprune.models.source import resolve, skeleton
from kvprune.models.view import ModelView
from kvprune.versions import versions

WAYS = ("whole", "streamed", "two processes")


def enough(model: Path) -> int:
    """Bytes: what the whole model takes by the formula."""
    s, view = Settings(source=str(model)), ModelView(skeleton(resolve(model)))
    merge = choose_merge(s, view.shape, print)
    return sum(find_room(s, view, merge, [torch.device("cpu")], 2**60, None, resolve(str(model))).needs.values())


def prune(model: Path, out: Path, memory: int) -> None:
    result = kvprune.prune(model, out, memory=memory)
    if processes.is_main():
        record = result.record
        told = {"seconds": sum(record["seconds"].values()), "phases": record["seconds"]}
        print(json.dumps(told | {"peak": record["peak_memory_bytes"], "streamed": record["streamed"]}))


def run(way: str, model: Path, out: Path, memory: int) -> dict[str, Any]:
    command = [sys.executable]
    if way == "two processes":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = memory - 1 if way == "streamed" else 2**60
    command += [__file__, "prune", str(model), "--work", str(out), "--memory", str(given)]
    threads = {"OMP_NUM_THREADS": "1"} if way == "two processes" else {}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
    return json.loads(done.stdout.strip().splitlines()[-1])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def compared(one: Path, other: Path) -> dict[str, Any]:
    plans = [json.loads((folder / "plan.json").read_text())["layers"] for folder in (one, other)]
    a, b = tensors(one), tensors(other)
    away = [float((b[n].float() - t.float()).norm() / t.float().norm().clamp_min(1e-12)) for n, t in a.items()]
    perplexity = [json.loads((folder / "kvprune.json").read_text())["perplexity"] for folder in (one, other)]
    return {
        "plans are equal": plans[0] == plans[1],
        "weights are equal": all(torch.equal(b[name], t) for name, t in a.items()),
        "largest difference of a matrix": max(away),
        "perplexities": perplexity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="compare")
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streamed"))
    given = parser.parse_args()
    if given.what == "prune":
        prune(given.model, given.work, given.memory)
        return
    memory = enough(given.model)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(given.runs):
        for way in WAYS:
            runs[way].append(run(way, given.model, given.work / f"{way} {number}", memory))
            print(way, runs[way][-1], file=sys.stderr, flush=True)
    medians = {way: statistics.median(one["seconds"] for one in runs[way]) for way in WAYS}
    found = {
        "runs": runs,
        "ratio": {way: medians[way] / medians["whole"] for way in WAYS},
        "against the whole": {way: compared(given.work / "whole 0", given.work / f"{way} 0") for way in WAYS[1:]},
        "versions": versions(),
    }
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: found[name] for name in ("ratio", "against the whole")}, indent=2))


if __name__ == "__main__":
    main()
