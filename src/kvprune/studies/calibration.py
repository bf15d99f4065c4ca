"""How much the calibration text matters: its source, its size and its seed against the perplexity of the pruned model.

The paper (KVPruner, arXiv 2409.11057) calibrates on one sample and leaves open what another would have given. Every
cell (text, tokens, seed) is one `kvprune.prune`, in memory. A seed is another stretch of the text's valid split (seed
0: its beginning, as `prune` reads it), or another sample where the text is `self`; scores, allocation and repair all
read the same `tokens` tokens, so that the size means the size. Nothing but the calibration text differs between cells.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from kvprune.channels.planning import choose_merge, grid_of, reachable
from kvprune.channels.prune import prune
from kvprune.channels.settings import Settings, with_preset
from kvprune.errors import BadOption
from kvprune.measure import memory
from kvprune.measure.plot import check as check_matplotlib
from kvprune.models.places import find_device
from kvprune.models.source import Source, load_config, resolve
from kvprune.models.tokenizer import check_ids, load_tokenizer
from kvprune.models.view import ModelView
from kvprune.options import given_of
from kvprune.progress import Progress
from kvprune.runtime.dtype import find_dtype
from kvprune.runtime.files import writing_to
from kvprune.studies import plot
from kvprune.studies.journal import PICTURE, StudyJournal
from kvprune.studies.noted import Noted
from kvprune.studies.stretches import Stretches, find_stretches
from kvprune.studies.summary import summarise
from kvprune.text.corpus import SELF, is_file, read_text, text_names
from kvprune.text.windows import token_ids, windows
from kvprune.versions import versions

_OWN = ("calibration", "calibration_tokens", "repair_tokens", "seed", "plan", "windows")  # what the study decides


def study_calibration(
    source: str | Path,
    out: str | Path,
    *,
    texts: Sequence[str | Path] = ("wikitext2", "ptb", SELF),
    tokens: Sequence[int] = (2048, 16384),
    seeds: int = 3,
    eval: Sequence[str | Path] = (),
    eval_tokens: int = 16384,
    window: int = 512,
    resume: bool = False,
    preset: str | None = None,
    ratio: float | None = None,
    importance: str | None = None,
    channels: str | None = None,
    merge: int | str | None = None,
    tensor_parallel: int = 1,
    depth: int | str | None = None,
    drop_blocks: int | None = None,
    allocation: str | None = None,
    layout: str | None = None,
    repair: str | None = None,
    probes: str | None = None,
    probe: float | None = None,
    probe_tokens: int | None = None,
    tau: float | None = None,
    align: int | None = None,
    min_width: int | None = None,
    calibration_window: int = 512,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune `source` once for every text, size and seed, and report the spread of perplexity, pruned / dense.

    texts: names, files, or "self". tokens: sizes. seeds: how many of each. eval: texts that all cells are judged on
    (default: the test splits of the named ones). preset to trust_remote_code: as in `prune`.
    Writes out/study.jsonl (a cell a line, as they finish), study.json (the report, which is returned) and study.png.
    Raises a KVPruneError before anything is pruned or written for whatever can be known by then.
    """
    options = with_preset(preset, given_of(Settings, locals()))
    options |= {"eval": text_names(eval), "windows": (window,)}
    return _Study(options, out, texts, tokens, seeds, resume, progress).run()


class _Study:
    """The checks, then the cells, then the report."""

    def __init__(self, options: dict[str, Any], out, texts, tokens, seeds: int, resume: bool, progress) -> None:
        check_matplotlib()
        self.texts = list(dict.fromkeys(text_names(texts)))
        self.sizes = sorted(set(tokens))
        self.seeds = seeds
        self.progress: Progress = progress or Progress()
        if not self.texts or not self.sizes:
            raise BadOption("a study needs at least one --text and one --tokens")
        if seeds < 1:
            raise BadOption(f"--seeds {seeds} is too few: give at least 1")
        if self.sizes[0] < 2:
            raise BadOption(f"--tokens {self.sizes[0]} is too few: give at least 2")
        self.options = options | {"eval": self._judged(options["eval"])}
        checked = Settings(**self.options, calibration_tokens=self.sizes[0], repair_tokens=self.sizes[0])
        if not checked.ratio > 0:
            raise BadOption(f"--ratio {checked.ratio:g} removes nothing to study; give one above 0")
        self.settings = checked
        self.source = self._resolve(checked)
        config = load_config(self.source)
        self._check_reachable(config)
        self._check_windows(config)
        tokenizer = load_tokenizer(self.source)
        self.contents: dict[str, str] = {}
        self.stretches = self._find_stretches(tokenizer, config.vocab_size)
        judged = self._check_evaluation(tokenizer, config)
        self.journal = StudyJournal(Path(out), self._identity(judged), resume)

    def _judged(self, names: Sequence[str]) -> tuple[str, ...]:
        """The texts that all cells are judged on."""
        named_texts = [text for text in self.texts if text != SELF and not is_file(text)]
        judged = list(dict.fromkeys(names)) or named_texts
        if not judged:
            raise BadOption("files and self have no test split; name a text to judge on with --eval")
        return tuple(judged)

    def _resolve(self, s: Settings) -> Source:
        find_device(s.device)
        if s.dtype != "auto":
            find_dtype(s.dtype)
        source = resolve(s.source, s.revision, s.trust_remote_code)
        if source.is_pruned:
            raise BadOption(f"{source.name} is pruned already; study the dense model it came from")
        return source

    def _check_reachable(self, config: PreTrainedConfig) -> None:
        """By a model without weights."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=self.source.trust_remote_code)
        view = ModelView(lm)
        merge = choose_merge(self.settings, view.shape, lambda message: None)  # which every cell says itself
        reachable(self.settings, grid_of(self.settings, view, merge))

    def _check_windows(self, config: PreTrainedConfig) -> None:
        """Refit holds out some of the windows: the smallest size must have two."""
        s = self.settings
        length = min(s.calibration_window, config.get_text_config().max_position_embeddings)
        if s.refits and self.sizes[0] < 2 * length:
            raise BadOption(
                f"--tokens {self.sizes[0]} is too few for --repair {s.repair}, which needs two windows of {length}: "
                f"give at least {2 * length}"
            )

    def _find_stretches(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[tuple[str, int], Stretches]:
        """By (text, tokens), largest size first: a text that is too short is found out at once."""
        found = {}
        for name in self.texts:
            if name == SELF and not is_file(name):
                continue
            self.contents[name] = text = read_text(name, "valid")
            for size in reversed(self.sizes):
                what = f"the calibration text {name}"
                found[name, size] = find_stretches(text, tokenizer, size, self.seeds, what)
                for start, end in found[name, size].spans:
                    check_ids(token_ids(text[start:end], tokenizer), rows, what)
        return found

    def _check_evaluation(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, str]:
        """The sha256 of every evaluation text, which is long enough."""
        s, found = self.settings, {}
        limit = config.get_text_config().max_position_embeddings
        length = min(s.windows[0], limit, s.eval_tokens)
        for name in s.eval:
            text = read_text(name, "test")
            if text in self.contents.values():
                raise BadOption(f"--eval {name} is calibrated on; judge on another text")
            what = f"the evaluation text {name}"
            check_ids(windows(text, tokenizer, length, s.eval_tokens, what), config.vocab_size, what)
            found[name] = _sha256(text)
        return found

    def _identity(self, judged: dict[str, str]) -> dict[str, Any]:
        """What must be the same for an unfinished study to go on."""
        s = self.settings
        fixed = {name: value for name, value in s.as_json().items() if name not in _OWN and name != "eval"}
        return {
            "study": "calibration",
            **fixed,
            "device": str(find_device(s.device)),
            "window": s.windows[0],
            "texts": self.texts,
            "tokens": self.sizes,
            "seeds": self.seeds,
            "eval": list(s.eval),
            "calibration_sha256": {name: _sha256(text) for name, text in self.contents.items()},
            "eval_sha256": judged,
            "versions": versions(),
        }

    def run(self) -> dict[str, Any]:
        cells = [(text, size, seed) for text in self.texts for size in self.sizes for seed in range(self.seeds)]
        for (text, size), stretches in sorted(self.stretches.items()):
            if stretches.overlap:
                self.progress.say(f"{text} is too short for {self.seeds} times {size} tokens: stretches overlap")
        with self.journal.running():
            done = {(cell["text"], cell["tokens"], cell["seed"]) for cell in self.journal.cells}
            with self.progress.phase("prunes", len(cells)) as advance:
                for cell in cells:
                    if cell not in done:
                        self.journal.add(self._cell(*cell, advance))
                    advance(1)
            report = self._report(cells)
            with writing_to(self.journal.out):
                plot.draw(report, self.journal.out / PICTURE)
            self.journal.finish(report)
        return report

    def _cell(self, text: str, size: int, seed: int, advance: Callable[..., None]) -> dict[str, Any]:
        """One prune."""
        start = time.perf_counter()
        inner = Noted(self.progress, advance, f"{Path(text).name} {size:,} #{seed}")
        first = None
        with tempfile.TemporaryDirectory(prefix="kvprune-study-") as folder:
            given: dict[str, Any] = {"calibration": SELF, "seed": seed}
            if (text, size) in self.stretches:
                first, _ = self.stretches[text, size].spans[seed]
                path = Path(folder) / "stretch.txt"  # to the text's end: prune reads `size` tokens of it
                with writing_to(path.parent):
                    path.write_text(self.contents[text][first:], encoding="utf-8")
                given = {"calibration": str(path), "seed": 0}
            result = prune(progress=inner, calibration_tokens=size, repair_tokens=size, **given, **self.options)
        record = result.record
        del result
        memory.release()
        return {
            "text": text,
            "tokens": size,
            "seed": seed,
            "first_character": first,
            "ratio_achieved": record["ratio_achieved"],
            "widths": record["widths"],
            "merge": record["merge"],
            "perplexity": record["perplexity"],
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _report(self, order: list[tuple[str, int, int]]) -> dict[str, Any]:
        """study.json: what was done, every cell in the order of the grid, and their spread."""
        by_key = {(cell["text"], cell["tokens"], cell["seed"]): cell for cell in self.journal.cells}
        cells = [by_key[key] for key in order]
        rows, overall = summarise(cells)
        for row in rows:
            stretches = self.stretches.get((row["text"], row["tokens"]))
            row["overlap"] = round(stretches.overlap, 4) if stretches else 0.0
        return {
            **self.journal.settings,
            "dense": {row["text"]: row["dense"] for row in cells[0]["perplexity"]},
            "summary": rows,
            "overall": overall,
            "cells": cells,
            "seconds": round(sum(cell["seconds"] for cell in cells), 3),
        }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
