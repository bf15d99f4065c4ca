"""What each phase of the default prune costs, as a multiple of one dense forward pass over the same tokens.

    KVPRUNE_DATA=DIR python benchmarks/phase_cost.py MODEL [--out benchmarks/results/phase_cost]

The dense pass (with its loss, in the same batches) runs before and after the prune, three times each (median).
Evaluation is reported apart from the sum. Needs a quiet machine.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

import kvprune
from kvprune.channels.texts import BATCH_TOKENS
from kvprune.measure.perplexity import perplexity
from kvprune.progress import on_stderr
from kvprune.text.corpus import read_text
from kvprune.text.windows import windows
from kvprune.versions import versions

TOKENS, WINDOW = 16384, 512
COUNTED = ("load", "importance", "sensitivity", "surgery", "save")  # not: evaluation and repair


def dense_seconds(model, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    perplexity(model, ids)
    return time.perf_counter() - start


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--importance", default="variance")
    parser.add_argument("--repair-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "phase_cost")
    arguments = parser.parse_args()

    model, tokenizer = kvprune.load(arguments.model), kvprune.load_tokenizer(arguments.model)
    ids = windows(read_text("wikitext2", "valid"), tokenizer, WINDOW, TOKENS)
    perplexity(model, ids[: BATCH_TOKENS // WINDOW])  # warm-up
    passes = [dense_seconds(model, ids) for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        progress = on_stderr()
        options = {"importance": arguments.importance, "repair_tokens": arguments.repair_tokens}
        record = kvprune.prune(arguments.model, out, progress=progress, **options).record
    passes += [dense_seconds(model, ids) for _ in range(3)]
    one = statistics.median(passes)
    multiples = {name: round(seconds / one, 2) for name, seconds in progress.seconds.items()}
    result = {
        "importance": arguments.importance,
        "calibration_tokens": TOKENS,
        "dense_pass_seconds": [round(seconds, 2) for seconds in passes],
        "multiples_of_one_dense_pass": multiples,
        "repair_tokens": arguments.repair_tokens,
        "total_without_evaluation_and_repair": round(sum(multiples.get(name, 0) for name in COUNTED), 2),
        "threads": torch.get_num_threads(),
        "dtype": record["dtype"],
        "perplexity": record["perplexity"],
        "ratio_achieved": record["ratio_achieved"],
        "machine": cpu_name(),
        "versions": versions(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
