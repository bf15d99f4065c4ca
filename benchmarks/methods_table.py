"""The table of pruning methods without repair or merged heads: perplexity by score, channels, allocation and ratio.

    KVPRUNE_DATA=DIR python benchmarks/methods_table.py MODEL [--out benchmarks/results/methods_table]

DIR holds wikitext2-{valid,test}.txt and ptb-{valid,test}.txt. Every text is calibrated on its valid split and
evaluated on its test split, windows of 512. Results go to OUT.json, each as soon as it is there, so that an
interrupted run continues, and to OUT.md.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

import kvprune
from kvprune.channels.choice.basis import identity
from kvprune.channels.choice.selection import select
from kvprune.channels.cut.surgery import cut
from kvprune.channels.evidence.importance import IMPORTANCE
from kvprune.channels.evidence.statistics import score_layers
from kvprune.channels.journal import Journal
from kvprune.channels.plan import LayerPlan, Model, PruningPlan
from kvprune.channels.widths import allocation
from kvprune.channels.widths.sensitivity import Probe, measure_sensitivity, probe_width
from kvprune.models.view import ModelView
from kvprune.text.corpus import read_text
from kvprune.text.windows import windows
from kvprune.versions import versions

TEXTS = ("wikitext2", "ptb")
RATIOS = (0.25, 0.5)
ROWS = (("l1", "joint"), ("l2", "joint"), ("taylor", "joint"), ("taylor", "split"), ("energy", "split"))
BEST = ("energy", "split")  # tried further: other tau, other probes, rank
WINDOW, SCORE_TOKENS, EVAL_TOKENS = 512, 16384, 16384
PROBE_TOKENS = {"l1": 2048, "l2": 2048, "taylor": 4096, "energy": 4096}


class Bench:
    def __init__(self, model: str, out: Path):
        self.view = ModelView(kvprune.load(model))
        self.tokenizer = kvprune.load_tokenizer(model)
        self.out = out
        path = out.with_suffix(".json")
        self.results = json.loads(path.read_text()) if path.exists() else {}
        self.results.setdefault("perplexity", {})
        self.results.setdefault("sensitivity", {})
        self.results["environment"] = {
            "model": Path(model).name,
            "versions": versions(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "dtype": str(self.view.lm.dtype),
            "window": WINDOW,
            "score_tokens": SCORE_TOKENS,
            "probe_tokens": PROBE_TOKENS,
            "eval_tokens": EVAL_TOKENS,
        }
        self.scores: dict[tuple[str, str], list] = {}

    def ids(self, text: str, split: str, tokens: int) -> torch.Tensor:
        return windows(read_text(text, split), self.tokenizer, WINDOW, tokens, text)

    def keep(self, kind: str, key: str, value) -> None:
        self.results[kind][key] = value
        self.out.with_suffix(".json").write_text(json.dumps(self.results, indent=1) + "\n")
        if kind == "perplexity":
            print(f"{key}: {value:.2f}", flush=True)

    def layer_scores(self, text: str, importance: str) -> list:
        if (text, importance) not in self.scores:
            batches = self.ids(text, "valid", SCORE_TOKENS).split(8)
            self.scores[text, importance] = score_layers(self.view, IMPORTANCE[importance], batches, lambda n: None)
        return self.scores[text, importance]

    def sensitivity(self, text: str, importance: str, channels: str, probe: float) -> list[float]:
        key = f"{text} {importance} {channels} probe {probe}"
        if key not in self.results["sensitivity"]:
            shape, scores = self.view.shape, self.layer_scores(text, importance)
            width = probe_width(shape.head_dim, probe, self.view.units.shape[1])
            plain = identity(shape.kv_heads, shape.head_dim)
            probes = [
                Probe(block, select(s, width, self.view.units, channels == "joint"), plain)
                for block, s in enumerate(scores)
            ]
            batches = self.ids(text, "valid", PROBE_TOKENS[importance]).split(8)
            found = measure_sensitivity(self.view, batches, probes, Journal(), lambda n: None)
            self.keep("sensitivity", key, found)
        return self.results["sensitivity"][key]

    def measure(self, text, ratio, importance, channels, allocated, tau=3.0, probe=None) -> None:
        extra = ("" if tau == 3.0 else f" tau {tau:g}") + ("" if probe is None else f" probe {probe:g}")
        key = f"{text} {ratio} {importance} {channels} {allocated}{extra}"
        if key in self.results["perplexity"]:
            return
        shape = self.view.shape
        grid = allocation.Grid(shape.layers, shape.head_dim, 8, 16, 2)
        if allocated == "uniform":
            ratios = allocation.uniform(shape.layers, ratio)
        else:
            changes = self.sensitivity(text, importance, channels, ratio if probe is None else probe)
            if allocated == "rank":
                ratios = allocation.by_rank(changes, ratio, grid.max_ratio)
            else:
                ratios = allocation.by_sensitivity(changes, ratio, grid.max_ratio, tau)
        widths = allocation.round_widths(ratios, ratio, grid)
        kept = [
            select(s, w, self.view.units, channels == "joint")
            for s, w in zip(self.layer_scores(text, importance), widths, strict=True)
        ]
        layers = [LayerPlan.model_validate({"qk": k.qk.tolist(), "vo": k.vo.tolist()}) for k in kept]
        self.keep("perplexity", key, self.perplexity(text, cut(self.view, self.plan(ratio, layers))))

    def plan(self, ratio: float, layers: list[LayerPlan]) -> PruningPlan:
        model = Model(source="", revision=None, architecture=self.view.family.model_type, **vars(self.view.shape))
        provenance = {"method": {}, "calibration": None, "sensitivity": None, "seed": 0, "versions": {}}
        return PruningPlan(model=model, ratio=ratio, layout="per-layer", layers=tuple(layers), **provenance)

    def perplexity(self, text: str, lm) -> float:
        return kvprune.perplexity(lm, self.ids(text, "test", EVAL_TOKENS)).value

    def run(self) -> None:
        for text in TEXTS:
            if f"{text} dense" not in self.results["perplexity"]:
                self.keep("perplexity", f"{text} dense", self.perplexity(text, self.view.lm))
        for importance, channels in reversed(ROWS):
            for text in TEXTS:
                for ratio in RATIOS:
                    for allocated in ("uniform", "sensitivity"):
                        self.measure(text, ratio, importance, channels, allocated)
                    self.write()
        for text in TEXTS:
            for ratio in RATIOS:
                for tau in (1.0, 10.0):
                    self.measure(text, ratio, *BEST, "sensitivity", tau=tau)
                self.measure(text, ratio, *BEST, "rank")
                self.measure(text, ratio, *BEST, "sensitivity", probe=1.0)
        self.write()

    def write(self) -> None:
        """The JSON as Markdown."""
        found = self.results["perplexity"]

        def cells(row: str) -> str:
            values = [found.get(f"{text} {ratio} {row}") for text in TEXTS for ratio in RATIOS]
            return " | ".join("" if v is None else f"{v:.1f}" for v in values)

        dense = ", ".join(f"{text} {found[f'{text} dense']:.2f}" for text in TEXTS if f"{text} dense" in found)
        head = " | ".join(f"{text}, {ratio:.0%} cut" for text in TEXTS for ratio in RATIOS)
        lines = [f"Dense: {dense}.", "", f"| score, channels, allocation | {head} |", "|---" * 5 + "|"]
        for importance, channels in ROWS:
            for allocated in ("uniform", "sensitivity"):
                row = f"{importance} {channels} {allocated}"
                lines.append(f"| {row} | {cells(row)} |")
        for extra in ("sensitivity tau 1", "sensitivity tau 10", "sensitivity probe 1", "rank"):
            row = f"{' '.join(BEST)} {extra}"
            lines.append(f"| {row} | {cells(row)} |")
        self.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "methods_table")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Bench(arguments.model, arguments.out).run()
