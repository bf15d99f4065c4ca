"""The paper's two headlines on known shapes, cell by cell: half of the KV memory, and 35 % more throughput.

    python benchmarks/shapes_grid.py [SHAPE ...] [--batch 1 8 32 128] [--context 512 2048 8192] [--merge auto]
        [--out OUT]

`kvprune bench SHAPE --pruned-shape --ratio 0.5`: random weights of the true shape, dense and pruned in turns, in
bfloat16; KV heads are merged as `prune` does it, or with `--merge 1` each is cut by itself, as in the paper. Source of
the headlines: KVPruner (arXiv 2409.11057), abstract, of LLaMA-7B. A context that a shape does not take is left out, and
a batch that does not fit says so. Needs torch and transformers only. Finished pairs of shape and context are kept in
OUT.json; OUT.md is drawn from it.
"""

import argparse
from pathlib import Path
from typing import Any

from cells import Cells

import kvprune
from kvprune.measure.shapes import dense_config

RATIO = 0.5
FASTER = 1.35


def table(cells: Cells) -> str:
    rows = [
        "| shape | heads merged | context | batch | KV GB, dense / pruned | half of it | weights GB that a step reads "
        "| tokens/s, dense / pruned | ratio (spread) | of the limit | 35 % more |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, report in cells.cells.items():
        shape, context = name.rsplit(", ", 1)
        first = f"| {shape} | {report['environment']['merge']} | {context} | "
        rows += [f"{first}{row(cell)} |" for cell in report["cells"]]
    where = next(iter(cells.cells.values()), {"environment": {}})["environment"]
    hardware = ", ".join(str(where.get(name, "")) for name in ("device", "dtype", "engine", "attention"))
    return f"{hardware}; {where.get('new_tokens')} new tokens behind each prompt.\n\n" + "\n".join(rows) + "\n"


def row(cell: dict[str, Any]) -> str:
    if "error" in cell:
        return f"{cell['batch']} | {cell['error']} | | | | | |"
    dense, pruned = (cell["memory_bytes"][side]["kv_cache"] for side in ("dense", "pruned"))
    weights = (side["weights"] for side in cell["decode_bytes_read"].values())
    speeds = cell["decode_tokens_per_second"]
    low, high = cell["spread"]["decode"]
    return " | ".join(
        (
            f"{cell['batch']}",
            f"{dense / 1e9:.3g} / {pruned / 1e9:.3g}",
            "yes" if pruned <= (1 - RATIO) * dense else "no",
            " / ".join(f"{n / 1e9:.3g}" for n in weights),
            f"{speeds['dense']:,.0f} / {speeds['pruned']:,.0f}",
            f"{cell['decode_ratio']:.2f} ({low:.2f} to {high:.2f})",
            f"{cell['decode_ratio_over_limit']:.0%} of {cell['decode_limit']:.2f}",
            "yes" if cell["decode_ratio"] >= FASTER else "no",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["llama-7b", "llama-3-8b"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--merge", default="auto", help="how many KV heads become one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shapes_grid"))
    arguments = parser.parse_args()
    how = {name: getattr(arguments, name) for name in ("batch", "new_tokens", "rounds", "merge", "device", "dtype")}
    cells = Cells(arguments.out, "shapes", [], how)
    for shape in arguments.shapes:
        longest = dense_config(shape)[0].max_position_embeddings - arguments.new_tokens
        for context in (c for c in arguments.context if c <= longest):
            options = {**how, "context": [context], "pruned_shape": True, "ratio": RATIO}
            cells.run(f"{Path(shape).name}, {context}", lambda s=shape, o=options: kvprune.bench(s, **o))
    arguments.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
