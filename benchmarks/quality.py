"""Quality against KV bytes: closed-form repair, recovery, the paper's preset, and what each part adds.

    python demo/fetch.py DIR
    KVPRUNE_DATA=DIR python benchmarks/quality.py MODEL WORK [--only PATTERN ...] [--out benchmarks/results/quality]

DIR holds wikitext2-{valid,test}.txt, ptb-{valid,test}.txt and the demo's text, wiki-valid.txt. Everything is
calibrated, repaired and trained on the WikiText-2 valid split alone, but for the cells that say "wiki" (leads of
Wikipedia's articles) or "self" (sampled from the model); it is judged on the first 16,384 tokens of the test splits
of WikiText-2 and PTB, windows of 512 and 2048. WORK keeps the pruned folders. A cell that OUT.json has is not run
again, so an interrupted run continues, and --only takes the cells whose name matches a pattern; OUT.md and the
picture are drawn from OUT.json.
"""

import argparse
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.measure.perplexity import perplexity
from kvprune.progress import on_stderr
from kvprune.text.judged import find_texts, judged_windows

RATIOS = (0.25, 0.5, 0.75)
TEXTS, TOKENS, WINDOWS = ("wikitext2", "ptb"), 16384, (512, 2048)  # that every cell is judged on
PRUNE = {"eval": ("wikitext2",), "eval_tokens": 1024, "windows": (512,), "probe_tokens": 4096}
# What was the default before heads could be merged; a preset decides the first two itself, and merges no heads.
MADE_WITH = {"allocation": "sensitivity", "probes": "measured", "repair_tokens": 65536, "merge": 1}
TODAY = {"probe_tokens": None}  # today's defaults, whatever they are
QUICK = {"eval": ("wikitext2",), "eval_tokens": 1024, "eval_windows": (512,)}  # recover's own evaluation, not reported
RECOVER = {**QUICK, "loss": "next-token", "lr": 5e-4, "steps": 100, "batch": 4, "window": 512}
PLUS, PAPER_PLUS = "dense, recovered on wikitext2", "dense, recovered by the paper's preset"
DISTIL = {**RECOVER, "text": "wikitext2", "loss": "logits", "steps": 60, "lr": 1.5e-3}
MERGED = {**DISTIL, "steps": 90, "lr": 1e-3}
GENERAL = {**RECOVER, "text": "wiki", "loss": "logits", "steps": 150, "lr": 1.5e-3}
PAPER = {**QUICK, "preset": "kvpruner", "tokens": 65536}
PROMPTS = (
    "The history of the city begins with",
    "Once upon a time, in a small village,",
    "To make a good cup of coffee, first",
    "The main difference between a virus and a bacterium is",
)

# What the default is compared with, at half of the bytes: name -> options.
PARTS: dict[str, dict[str, Any]] = {
    "no repair": {"repair": "none"},
    "rotate alone": {"repair": "rotate"},
    "refit alone": {"repair": "refit"},
    "importance energy": {"importance": "energy"},
    "importance taylor": {"importance": "taylor"},
    "allocation uniform": {"allocation": "uniform"},
    "allocation budget": {"allocation": "budget"},
    "repair on 16,384 tokens": {"repair_tokens": 16384},
    "repair on 262,144 tokens": {"repair_tokens": 262144},
    "calibration self": {"calibration": "self"},
}


KEPT = (  # of a cell's record
    *("ratio_achieved", "kv_bytes_per_token", "weights_read_bytes", "merge", "widths", "method", "perplexity"),
    *("seconds", "recovered", "peak_memory_bytes", "repetition"),
)


class Bench:
    def __init__(self, model: str, work: Path, cells: Cells):
        self.model, self.work, self.cells = model, work, cells

    def cell(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        def kept() -> dict[str, Any]:
            record = run()
            return {key: record[key] for key in KEPT if key in record}

        self.cells.run(name, kept)

    def folder(self, name: str) -> Path:
        return self.work / name.replace(" ", "-").replace(",", "")

    def prune(
        self,
        name: str,
        ratio: float,
        source: str | None = None,
        keep: bool = True,
        made_with: dict[str, Any] = MADE_WITH,
        **options,
    ) -> None:
        out = self.folder(name) if keep else None

        def run() -> dict[str, Any]:
            if out is not None and finished(out):
                return judged_again(out)
            model = self.model if source is None else plain(self.model, self.folder(source))
            chosen = {**PRUNE, **({} if "preset" in options else made_with), **options}
            result = kvprune.prune(model, out, ratio=ratio, resume=True, progress=on_stderr(), **chosen)
            return judged(result.record, result.model, result.tokenizer)

        self.cell(name, run)

    def recover(self, name: str, source: str, **options) -> None:
        def run() -> dict[str, Any]:
            out = self.folder(name)
            if finished(out):
                return judged_again(out)
            settings = options if "preset" in options else {**RECOVER, **options}
            result = kvprune.recover(self.folder(source), out, resume=True, progress=on_stderr(), **settings)
            assert result.record is not None
            return judged(result.record, result.model, result.tokenizer)

        self.cell(name, run)

    def perplexity(self, name: str, text: str, window: int) -> float | None:
        for row in self.cells.cells.get(name, {}).get("perplexity", ()):
            if (row["text"], row["window"]) == (text, window):
                return row["pruned"]
        return None


def finished(folder: Path) -> bool:
    """Whether prune or recover wrote it whole, and a kill came only later."""
    return (folder / "config.json").exists()  # the last that is written


def plain(model: str, folder: Path) -> Path:
    """The checkpoint of the model's own architecture with the weights of a folder that was pruned by nothing."""
    out = folder.with_name(f"{folder.name}-plain")
    if not (out / "tokenizer_config.json").exists():  # the last that is written
        path = Path(model)
        files = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        config = AutoConfig.from_pretrained(path.parent if files else model, **files)
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weights = load_file(folder / "model.safetensors")
        missing, unexpected = dense.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"}, missing
        for name in unexpected:  # which rotary channels a head has: all, in order
            assert name.endswith("rope_index"), name
            assert (weights[name] == torch.arange(weights[name].shape[-1])).all(), name
        dense.save_pretrained(out)
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def judged(record: dict[str, Any], model, tokenizer) -> dict[str, Any]:
    """The record of what prune or recover made, with perplexities and repetition."""
    rows = []
    for text, ids in judged_windows(find_texts(TEXTS), tokenizer, WINDOWS, TOKENS):
        found = perplexity(model, ids)
        rows.append({"text": text, "window": found.window, "tokens": found.tokens, "pruned": found.value})
    return {**record, "perplexity": rows, "repetition": repetition(model, tokenizer)}


def judged_again(folder: Path) -> dict[str, Any]:
    """The same of a finished folder."""
    return judged(kvprune.read_record(folder), kvprune.load(folder), kvprune.load_tokenizer(folder))


@torch.no_grad()
def repetition(model, tokenizer) -> float:
    """Mean share of 4-grams that were there before, in greedy continuations of 128 tokens; 1 is an endless loop."""
    shares = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=128, min_new_tokens=128, do_sample=False)[0].tolist()
        ids = ids[inputs["input_ids"].shape[1] :]
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares)


def run(bench: Bench) -> None:
    """All cells, the important ones first."""
    bench.prune("dense", 0.0)  # ratio 0 is the dense model, as a folder that recovery takes
    for ratio in (0.5, 0.25, 0.75):
        bench.prune(f"merged {ratio}", ratio, made_with=TODAY)
        bench.recover(f"merged {ratio}, distilled", f"merged {ratio}", **MERGED)
    bench.recover("dense, recovered on wikitext2", "dense", text="wikitext2")
    for ratio in (0.5, 0.25, 0.75):
        name = f"closed form {ratio}"
        bench.prune(name, ratio)
        bench.recover(f"{name}, recovered on wikitext2", name, text="wikitext2")
        bench.recover(f"{name}, distilled on wikitext2", name, **DISTIL)
        bench.recover(
            f"{name}, distilled and recovered on wikitext2", f"{name}, distilled on wikitext2", text="wikitext2"
        )
        tutored = {**DISTIL, "steps": 80, "teacher": bench.folder(PLUS)}  # and 100 steps before, of the teacher itself
        bench.recover(f"{name}, distilled from dense+ on wikitext2", name, **tutored)
        bench.recover(f"{name}, recovered on wiki", name, **GENERAL)
        name = f"dense+, closed form {ratio}"  # trained on the text first, then pruned, then distilled from itself
        bench.prune(name, ratio, source=PLUS)
        bench.recover(f"{name}, distilled on wikitext2", name, **DISTIL)
        bench.recover(f"{name}, distilled gently on wikitext2", name, **{**DISTIL, "lr": 5e-4})
        bench.recover(f"{name}, distilled for long on wikitext2", name, **{**DISTIL, "steps": 200})
        bench.recover(f"{name}, distilled gently for long on wikitext2", name, **{**DISTIL, "steps": 90, "lr": 6e-4})
        bench.recover(f"{name}, trained again on wikitext2", f"{name}, distilled on wikitext2", text="wikitext2")
    for ratio, options in ((0.75, {"min_width": 8}), (0.5, {}), (0.25, {})):
        for start, source in (("dense+, ", PLUS), ("", None)):
            name = f"{start}closed form {ratio} by budget"
            bench.prune(name, ratio, source=source, allocation="budget", **options)
            bench.recover(
                f"{name}, distilled on wikitext2", name, **({**DISTIL, "lr": 5e-4} if ratio < 0.375 else DISTIL)
            )
    name = "closed form 0.5"
    bench.recover(f"{name}, distilled with attention on wikitext2", name, **{**DISTIL, "loss": "logits+attention"})
    bench.recover(f"{name}, recovered on wiki by next-token", name, **{**GENERAL, "loss": "next-token"})
    bench.recover(f"{name}, recovered on self", name, **{**GENERAL, "text": "self", "tokens": 131072})
    for ratio in (0.5, 0.25, 0.75):
        bench.prune(f"paper {ratio}", ratio, preset="kvpruner")
        bench.recover(f"paper {ratio}, recovered", f"paper {ratio}", **PAPER)
        bench.recover(f"paper {ratio}, distilled on wikitext2", f"paper {ratio}", **DISTIL)
    bench.recover(PAPER_PLUS, "dense", **PAPER)
    for name, options in PARTS.items():
        bench.prune(f"0.5, {name}", 0.5, keep=False, **options)


# Order of the rows
GROUPS = ("dense", *(f"{how} {ratio}" for how in ("merged", "closed form") for ratio in RATIOS), "paper", "0.5,")


def table(bench: Bench) -> str:
    """Perplexities and their ratios to dense, on WikiText-2 to dense+ too where the model was adapted to it."""
    rows = [
        "| cell | KV bytes | WikiText-2, 512 | / dense | / dense+ | PTB, 512 | / dense | WikiText-2, 2048 | / dense "
        "| PTB, 2048 | / dense | repetition | minutes | threads |",
        "| --- |" + " ---: |" * 13,
    ]
    names = [name for group in GROUPS for name in bench.cells.cells if name.startswith(group)]
    return "\n".join([*rows, *(row(bench, name) for name in names)]) + "\n"


def row(bench: Bench, name: str) -> str:
    cell = bench.cells.cells[name]
    share = cell["kv_bytes_per_token"]["pruned"] / cell["kv_bytes_per_token"]["dense"]
    columns = [name, f"{100 * share:.0f} %"]
    for text, window in (("wikitext2", 512), ("ptb", 512), ("wikitext2", 2048), ("ptb", 2048)):
        value = bench.perplexity(name, text, window)
        columns += [number(value), ratio_of(value, bench.perplexity("dense", text, window))]
        if (text, window) == ("wikitext2", 512):
            plus = bench.perplexity(PAPER_PLUS if "paper" in name else PLUS, text, window)
            columns.append(ratio_of(value, plus) if is_adapted(name) else "")
    seconds = [value for phase, value in cell["seconds"].items() if "evaluate" not in phase]
    columns += [f"{cell['repetition']:.2f}", f"{sum(seconds) / 60:.1f}", str(cell["threads"])]
    return "| " + " | ".join(columns) + " |"


def is_adapted(name: str) -> bool:
    """Whether the model was trained on WikiText-2 itself, or came from one that was."""
    if name.startswith("dense+"):
        return True
    trained = "recovered" in name or "distilled from dense+" in name
    return trained and ("wikitext2" in name or "paper" in name)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def ratio_of(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value / base:.3f}"


HIGHEST = 20  # that the picture shows; what is above says so
LINES = {  # label -> (cells whose names match, the best of each ratio; style)
    "merged heads, closed form": ("merged {}", "P-"),
    "merged heads, distilled": ("merged {}, distilled", "X-"),
    "closed form": ("closed form {}", "o-"),
    "closed form, by budget": ("closed form {} by budget", "v-"),
    "distilled": ("closed form {}, distilled on wikitext2", "s-"),
    "distilled, then trained": ("closed form {}, distilled and recovered on wikitext2", "^-"),
    "trained, then pruned, then distilled": ("dense+, closed form {}*distilled*", "D-"),
    "the paper's preset": ("paper {}", "x--"),
    "the paper's preset, recovered": ("paper {}, recovered", "+--"),
    "the paper's preset, distilled": ("paper {}, distilled on wikitext2", "*--"),
}


def points(bench: Bench, pattern: str, text: str) -> list[tuple[float, float]]:
    """(share of the KV bytes left, perplexity over that of dense, or of dense+ where the text is what was learnt)."""
    found = []
    for ratio in RATIOS:
        names = [name for name in bench.cells.cells if fnmatch(name, pattern.format(ratio))]
        values = [(bench.perplexity(name, text, 512), name) for name in names]
        for value, name in sorted((v, n) for v, n in values if v is not None)[:1]:
            plus = PAPER_PLUS if "paper" in name else PLUS
            base = bench.perplexity(plus if is_adapted(name) and text == "wikitext2" else "dense", text, 512)
            if base is not None:
                found.append((1 - ratio, value / base))
    return found


def draw(bench: Bench, picture: Path) -> None:
    """Perplexity over dense against the KV bytes that are left, one panel a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    titles = {
        "wikitext2": "WikiText-2 (trained models: over dense trained alike)",
        "ptb": "PTB, never seen (all: over dense)",
    }
    for panel, (text, title) in zip(panels, titles.items(), strict=True):
        beyond: dict[float, list[str]] = {}
        for label, (pattern, style) in LINES.items():
            line = points(bench, pattern, text)
            if line:
                panel.plot(*zip(*sorted(line), strict=True), style, label=label)
            for share, ratio in line:
                beyond.setdefault(share, []).extend([f"{ratio:.0f}"] if ratio > HIGHEST else [])
        for share, ratios in beyond.items():
            panel.annotate(", ".join(ratios), (share, HIGHEST), ha="center", va="top", fontsize=8)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_yscale("log")
        ticks = (0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16)
        panel.set_yticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.set_ylim(0.8, HIGHEST)
        panel.set_xlim(0.2, 0.8)
        panel.set_xticks([0.25, 0.5, 0.75], ["25 %", "50 %", "75 %"])
        panel.set_xlabel("KV bytes per token that are left")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity / dense perplexity, windows of 512")
    panels[1].legend(fontsize=8)
    figure.suptitle(f"{bench.cells.results['environment']['model']}: quality against KV bytes")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    parser.add_argument("--picture", type=Path, default=Path("docs/quality.png"))
    arguments = parser.parse_args()
    bench = Bench(arguments.model, arguments.work, Cells(arguments.out, arguments.model, arguments.only))
    run(bench)
    arguments.out.with_suffix(".md").write_text(table(bench))
    print(table(bench))
    draw(bench, arguments.picture)


if __name__ == "__main__":
    main()
