"""What skipping costs: Token Filtering as published, as it is here, and a random choice at the same rates.

    KVPRUNE_DATA=DIR python benchmarks/token_filter.py MODEL [--pruned FOLDER] [--only PATTERN ...] [--out OUT]

DIR holds wikitext2-{valid,test}.txt and ptb-test.txt. Judged on the first 16,384 tokens of the test splits, windows of
512. "dropped": the K/V of as many tokens leave the cache; "kept": all stay cached. "studied": the layers that `kvprune
study layers` finds on 4,096 tokens of the WikiText-2 valid split; otherwise the last ones. Random choice of the tokens
is the mean of three seeds. Cells "rate ...": the ratio achieved on one prompt of 4,096 tokens of prose, code and text
that repeats itself, and on prose with the pruned model in FOLDER. Finished cells are kept in OUT.json; OUT.md is drawn
from it.
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
from kvprune.text.corpus import read_text
from kvprune.text.judged import find_texts, judged_windows
from kvprune.text.windows import token_ids

HERE = Path(__file__).resolve().parent.parent

TEXTS, TOKENS, WINDOW, SEEDS = ("wikitext2", "ptb"), 16384, 512, (0, 1, 2)
RATIOS = (0.1, 0.25, 0.4)
RATE_TOKENS = 4096
WAYS: dict[str, dict[str, Any]] = {  # "studied" stands for the layers
    "paper": {"preset": "paper"},
    "last layers, dropped": {},
    "last layers, kept": {"drop_ratio": 0.0},
    "random, last layers, dropped": {"signal": "random"},
    "studied, dropped": {"layers": "studied"},
    "studied, kept": {"layers": "studied", "drop_ratio": 0.0},
    "random, studied, dropped": {"layers": "studied", "signal": "random"},
    "random, studied, kept": {"layers": "studied", "signal": "random", "drop_ratio": 0.0},
    "studied, by keys": {"layers": "studied", "fusion": "key"},
    "studied, by values": {"layers": "studied", "fusion": "value"},
    "studied, by the mean": {"layers": "studied", "fusion": "mean"},
    "studied, by keys behind RoPE": {"layers": "studied", "fusion": "key", "keys": "post-rope"},
    "studied, by anchors of gamma 0.7": {"layers": "studied", "gamma": 0.7},
    "studied, by anchors of gamma 0.97": {"layers": "studied", "gamma": 0.97},
    "studied, at 0.95 a layer": {"layers": "studied", "layer_ratio": 0.95},
    "studied, at 0.95 a layer, kept": {"layers": "studied", "layer_ratio": 0.95, "drop_ratio": 0.0},
    "studied, at 0.6 a layer": {"layers": "studied", "layer_ratio": 0.6},
    "last, every third decides": {"decide_every": 3},
    "studied, every third decides": {"layers": "studied", "decide_every": 3},
    "studied, every third decides, kept": {"layers": "studied", "decide_every": 3, "drop_ratio": 0.0},
    "studied, every fifth decides": {"layers": "studied", "decide_every": 5},
    "studied, zero": {"layers": "studied", "on_skip": "zero"},
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


def run(cells: Cells, source: str, pruned: str | None) -> None:
    model, tokenizer = kvprune.load(source), kvprune.load_tokenizer(source)
    texts = judged_windows(find_texts(TEXTS), tokenizer, (WINDOW,), TOKENS)
    study = {"text": "wikitext2", "tokens": 4096, "window": WINDOW}
    cells.run("layers", lambda: kvprune.study_layers(source, **study), needed=True)
    cells.run("dense", lambda: measure(model, texts, None), needed=True)
    layers = cells.cells["layers"]["layers"]
    for ratio in (0.25, 0.4, 0.1):
        for way, options in WAYS.items():
            if variant(way) and ratio != 0.25:
                continue
            studied = {"layers": layers} if "layers" in options else {}
            for seed in SEEDS if "random" in way else SEEDS[:1]:
                name = f"{ratio}, {way}" + (f", seed {seed}" if "random" in way else "")
                chosen = {"ratio": ratio, "seed": seed, **options, **studied}
                cells.run(name, lambda chosen=chosen: measure(model, texts, chosen))
    for name, text in kinds_of_text().items():
        ids = token_ids(text, tokenizer, RATE_TOKENS)
        assert len(ids) == RATE_TOKENS, name
        for ratio in RATIOS:
            for way in ("paper", "studied, dropped"):
                chosen = {"ratio": ratio, **WAYS[way]} | ({"layers": layers} if "layers" in WAYS[way] else {})
                cells.run(f"rate {ratio}, {way}, {name}", lambda ids=ids, o=chosen: rates(model, ids, o))
    if pruned is not None:
        small, ids = kvprune.load(pruned), token_ids(read_text("wikitext2", "test"), tokenizer, RATE_TOKENS)
        for ratio in (0.0, *RATIOS):
            chosen = {"ratio": ratio, "layers": layers}
            cells.run(f"rate {ratio}, pruned, prose", lambda o=chosen: rates(small, ids, o))


def kinds_of_text() -> dict[str, str]:
    """Prose, code (this library's), and a paragraph over and over."""
    code = "\n".join(path.read_text() for path in sorted((HERE / "src" / "kvprune").rglob("*.py")))
    prose = read_text("wikitext2", "test")
    paragraph = next(line for line in prose.splitlines() if len(line) > 400)
    return {"prose": prose, "code": code, "repeated": f"{paragraph}\n" * 200}


@torch.no_grad()
def rates(model, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    with kvprune.TokenFilter(**options)(model) as f:
        model(ids[None], logits_to_keep=1)
    rates = ("ratio_asked", "ratio_achieved", "drop_ratio_achieved", "per_layer")
    return {name: f.report[name] for name in (*rates, "kv_bytes", "kv_bytes_dense")}


def table(cells: Cells) -> str:
    rows = [
        "| ratio | tokens | layers | K/V | WikiText-2 | / dense | PTB | / dense | achieved |",
        "| ---: | --- | --- | --- |" + " ---: |" * 5,
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
            columns = (
                f"{ratio:g}",
                "the paper's" if way == "paper" else "random" if "random" in way else f"ours{variant(way)}",
                "last half" if way == "paper" else "studied" if "studied" in way else "last",
                "kept" if "kept" in way else "dropped",
                *(entry for t in TEXTS for entry in (f"{values[t]:.2f}", f"{values[t] / dense[t]:.3f}")),
                f"{achieved:.3f}",
            )
            rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows) + "\n" + rates_table(cells)


def variant(way: str) -> str:
    """What is not as it is by default: the signal, the share of a layer, what stands for the output."""
    named = [part for part in way.split(", ") if part.startswith(("by ", "at ", "every ", "zero"))]
    return "".join(f", {part}" for part in named)


def rates_table(cells: Cells) -> str:
    """Ratio asked and achieved on kinds of text."""
    found = {name: cell for name, cell in cells.cells.items() if name.startswith("rate ")}
    if not found:
        return ""
    rows = [
        "",
        f"| {RATE_TOKENS:,} tokens of | filter | asked | achieved | difference | KV bytes / dense |",
        "| --- | --- |" + " ---: |" * 4,
    ]
    for name, cell in found.items():
        way, text = name.split(", ", 1)[1].rsplit(", ", 1)
        asked, achieved = cell["ratio_asked"], cell["ratio_achieved"]
        who = {"paper": "the paper's", "pruned": "ours, pruned model"}.get(way, "ours")
        share = cell["kv_bytes"] / cell["kv_bytes_dense"]
        rows.append(f"| {text} | {who} | {asked:g} | {achieved:.4f} | {achieved - asked:+.4f} | {share:.3f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pruned", metavar="FOLDER", help="a model that `kvprune prune` wrote")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_filter"))
    arguments = parser.parse_args()
    cells = Cells(arguments.out, arguments.model, arguments.only)
    run(cells, arguments.model, arguments.pruned)
    arguments.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
