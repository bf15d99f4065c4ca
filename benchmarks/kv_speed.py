"""Speed against KV bytes: fewer bits, less width, fewer tokens, and their products, each in turns with the dense model.

    python benchmarks/kv_speed.py MODEL NAME=FOLDER ... [--batch 8] [--context 1024] [--only PATTERN ...] [--out OUT]

MODEL is the dense one; every FOLDER, pruned or not, is a model called NAME: `half=work/closed-form-0.5`. Each is
timed by `kvprune bench` beside MODEL: as it is, on caches of 8, 4 and 2 bits (transformers' own), under a token
filter of 25 %, and both. What these cost in quality, kv_curve.py says. Finished cells are kept in OUT.json; OUT.md is
drawn from it.
"""

import argparse
from pathlib import Path
from typing import Any

from cells import Cells
from kv_curve import DENSE, ways

import kvprune


def run(cells: Cells, models: dict[str, str], layers: list[int] | None, settings: dict[str, Any]) -> None:
    for name, source in models.items():
        against = None if name == DENSE else source
        for way, bits, given in ways():
            skip, keep = given.get("ratio"), given.get("keep")
            asked = {**settings, "kv_bits": bits, "keep": keep, "skip": skip, "skip_layers": layers if skip else None}
            cells.run(f"{name}: {way}", lambda a=against, o=asked: kvprune.bench(models[DENSE], a, **o)["cells"][0])


def table(cells: Cells) -> str:
    rows = [
        "| model | read | KV bytes | decoding, times as fast as dense | spread | what the bytes allow | prefill |",
        "| --- | --- |" + " ---: |" * 5,
    ]
    found = []
    for key, cell in cells.cells.items():
        name, way = key.split(": ")
        if "error" in cell:
            found.append((0.0, f"| {name} | {way} | {cell['error']} | | | | |"))
            continue
        held = {side: parts["kv_cache"] for side, parts in cell["memory_bytes"].items()}
        share, (low, high) = held["pruned"] / held["dense"], cell["spread"]["decode"]
        row = f"| {name} | {way} | {share:.1%} | {cell['decode_ratio']:.2f} | {low:.2f} to {high:.2f} "
        found.append((share, row + f"| {cell['decode_limit']:.2f} | {cell['prefill_ratio']:.2f} |"))
    return "\n".join(rows + [row for _, row in sorted(found, reverse=True)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("others", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="*", help="those that may skip, best first")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kv_speed"))
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("batch", "context", "new_tokens", "rounds")}
    cells = Cells(arguments.out, arguments.model, arguments.only, {**settings, "layers": arguments.layers})
    models = {DENSE: arguments.model} | dict(other.split("=", 1) for other in arguments.others)
    run(cells, models, arguments.layers, settings)
    arguments.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
