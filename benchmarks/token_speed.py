"""Speed of a token filter against the dense model, prefill and decode, in alternating runs.

    python benchmarks/token_speed.py MODEL [--skip 0.25] [--layers 28 25 ...] [--decide-every 3] [--out OUT]

Prefill: one prompt. Decode: both caches are filled once, then the two sides take turns, `STEPS` steps each, and grow
alike. Ratios are medians of the pairs, with their spread. The limit is what the bytes that a step reads would allow,
dense / filtered, as `kvprune bench` has it; for prefill the multiplications of projections, MLP and attention. The
prompts are random tokens and the decoded ones greedy, which is all the same to speed. Finished cells are kept in
OUT.json; OUT.md is drawn from it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from cells import Cells

import kvprune
from kvprune.measure.speed import Side, Timing, alternate
from kvprune.models.family import family_of
from kvprune.runtime.linear import pack_weights

STEPS = 16
PREFILL = 2048
DECODE = ((512, 1), (512, 8), (4096, 1), (4096, 8))  # context, batch


def sides(model, options: dict[str, Any]) -> tuple[Side, Side]:
    return Side(model), Side(model, kvprune.TokenFilter(**options))


def prompt(model, batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator)


def summary(timing: Timing, limit: float, token_filter: kvprune.TokenFilter) -> dict[str, Any]:
    """The cell."""
    report = token_filter.report
    return {
        "seconds": dict(zip(("dense", "filtered"), timing.seconds, strict=True)),
        "ratio": timing.ratio,
        "spread": [timing.ratios[0], timing.ratios[-1]],
        "limit": limit,
        "deciding_share": report["deciding_seconds"] / timing.rounds[-1][1],
    }


def prefill(model, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    dense, ours = sides(model, options)
    ids = prompt(model, 1, PREFILL)
    timing = alternate((dense, ours), lambda side: side.prefill(ids), rounds)
    rates = ours.token_filter.report["per_layer"]
    return summary(timing, prefill_limit(model, rates), ours.token_filter)


def prefill_limit(model, rates: list[float]) -> float:
    """Multiplications of one prompt, dense / filtered."""
    family = family_of(model.config.model_type)
    dense = ours = 0.0
    for block, rate in zip(family.blocks(model), rates, strict=True):
        attention = getattr(block, family.attention)
        weights = sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
        query = sum(getattr(attention, name).weight.numel() for name in (family.q, family.o))
        scores = getattr(attention, family.q).out_features * PREFILL  # Q K and A V, half of each behind the causal mask
        dense += weights + scores
        ours += weights - rate * query + (1 - rate) ** 2 * scores
    return dense / ours


def decode(model, options: dict[str, Any], rounds: int, context: int, batch: int) -> dict[str, Any]:
    dense, ours = sides(model, options)
    ids = prompt(model, batch, context)
    for side in (dense, ours):
        with side.running():
            side.prefill(ids)
    timing = alternate((dense, ours), lambda side: side.decode(ids[:, -1:], STEPS), rounds)
    return summary(timing, dense.bytes_read() / ours.bytes_read(), ours.token_filter)


def table(cells: Cells) -> str:
    rows = [
        "| | dense, ms (prefill: a token, decode: a step) | filtered | ratio | spread | limit | deciding | in words |",
        "| --- |" + " ---: |" * 6 + " --- |",
    ]
    for name, cell in cells.cells.items():
        tokens = PREFILL if name.startswith("prefill") else STEPS
        times = " | ".join(f"{1000 * cell['seconds'][side] / tokens:.2f}" for side in ("dense", "filtered"))
        low, high = cell["spread"]
        words = "faster" if low > 1 else "slower" if high < 1 else "no difference beyond the spread"
        rows.append(
            f"| {name} | {times} | {cell['ratio']:.3f} | {low:.3f} to {high:.3f} | {cell['limit']:.3f} "
            f"| {cell['deciding_share']:.1%} | {words} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--skip", type=float, default=0.25)
    parser.add_argument("--layers", type=int, nargs="*", help="those that may skip, best first")
    parser.add_argument("--decide-every", type=int, default=1, help="layers in a row that follow one decision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_speed"))
    arguments = parser.parse_args()
    options = {"ratio": arguments.skip, "layers": arguments.layers, "decide_every": arguments.decide_every}
    cells = Cells(arguments.out, arguments.model, arguments.only, {**options, "rounds": arguments.rounds})
    model = kvprune.load(arguments.model)
    pack_weights(model)  # as `kvprune generate` and `bench` do
    for context, batch in DECODE:
        name = f"decode, context {context}, batch {batch}"
        cells.run(name, lambda c=context, b=batch: decode(model, options, arguments.rounds, c, b))
    cells.run(f"prefill, {PREFILL} tokens", lambda: prefill(model, options, arguments.rounds))
    arguments.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
