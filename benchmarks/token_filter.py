"""What skipping costs: Token Filtering as published, as it is here, and a random choice at the same rates.

    KVPRUNE_DATA=DIR python benchmarks/token_filter.py MODEL [--only PATTERN ...] [--out OUT]

DIR holds wikitext2-test.txt and ptb-test.txt, of which the first 16,384 tokens are read in windows of 512. "dropped":
the K/V of as many tokens leave the cache; "kept": all stay cached. Random choice is the mean of three seeds. Finished
cells are kept in OUT.json; OUT.md is drawn from it.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from cells import Cells

import kvprune
from kvprune.measure.perplexity import perplexity
from kvprune.text.windows import judged_windows

TEXTS, TOKENS, WINDOW, SEEDS = ("wikitext2", "ptb"), 16384, 512, (0, 1, 2)
RATIOS = (0.1, 0.25, 0.4)
WAYS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "dropped": {},
    "kept": {"drop_ratio": 0.0},
    "random, dropped": {"signal": "random"},
    "random, kept": {"signal": "random", "drop_ratio": 0.0},
}


def measure(model, texts: list[tuple[str, torch.Tensor]], options: dict[str, Any] | None) -> dict[str, Any]:
    """Perplexity of each text, under a filter with these options if there are any, and what the filter reports."""
    found: dict[str, Any] = {}
    for name, windows in texts:
        if options is None:
            found[name] = {"perplexity": perplexity(model, windows).value}
            continue
        with torch.no_grad(), kvprune.TokenFilter(**options)(model) as f:
            value = perplexity(model, windows).value
        kept = ("ratio_achieved", "drop_ratio_achieved", "per_layer", "deciding_seconds")
        found[name] = {"perplexity": value, **{key: f.report[key] for key in kept}}
    return found


def run(cells: Cells, model, texts: list[tuple[str, torch.Tensor]]) -> None:
    cells.run("dense", lambda: measure(model, texts, None))
    for ratio in (0.25, 0.4, 0.1):
        for way, options in WAYS.items():
            for seed in SEEDS if "random" in way else SEEDS[:1]:
                name = f"{ratio}, {way}" + (f", seed {seed}" if "random" in way else "")
                chosen = {"ratio": ratio, "seed": seed, **options}
                cells.run(name, lambda chosen=chosen: measure(model, texts, chosen))


def table(cells: Cells) -> str:
    rows = [
        "| ratio | tokens | K/V | WikiText-2 | / dense | PTB | / dense | achieved |",
        "| ---: | --- | --- |" + " ---: |" * 5,
    ]
    dense = {text: cells.cells["dense"][text]["perplexity"] for text in TEXTS}
    for ratio in RATIOS:
        for way in WAYS:
            name = f"{ratio}, {way}"
            found = [cell for key, cell in cells.cells.items() if key == name or key.startswith(name + ", seed")]
            if not found:
                continue
            values = {t: math.exp(statistics.fmean(math.log(c[t]["perplexity"]) for c in found)) for t in TEXTS}
            achieved = statistics.fmean(c[t]["ratio_achieved"] for c in found for t in TEXTS)
            what = "paper's" if way == "paper" else "random" if "random" in way else "ours"
            columns = (
                f"{ratio:g}",
                what,
                "kept" if "kept" in way else "dropped",
                *(entry for t in TEXTS for entry in (f"{values[t]:.2f}", f"{values[t] / dense[t]:.3f}")),
                f"{achieved:.3f}",
            )
            rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_filter"))
    arguments = parser.parse_args()
    cells = Cells(arguments.out, arguments.model, arguments.only)
    model = kvprune.load(arguments.model)
    tokenizer = kvprune.load_tokenizer(arguments.model)
    run(cells, model, judged_windows(TEXTS, tokenizer, (WINDOW,), TOKENS))
    arguments.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
