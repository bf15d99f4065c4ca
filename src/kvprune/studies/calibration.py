"""How much the calibration text matters: its source, its size and its seed against the perplexity of the pruned model.

The paper (KVPruner, arXiv 2409.11057) calibrates on one sample and leaves open what another would have given. Every
cell (text, tokens, seed) is one `kvprune.prune`, in memory. A seed is another stretch of the text's valid split (seed
0: its beginning, as `prune` reads it), or another sample where the text is `self`; scores, allocation and repair all
read the same `tokens` tokens, so that the size means the size. Nothing but the calibration text differs between cells.
"""

import hashlib
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
from kvprune.studies.stretches import Pieces, Stretches, find_stretches, pieces_of
from kvprune.studies.summary import summarise
from kvprune.text.corpus import SELF, is_file
from kvprune.text.judged import GivenTexts, find_texts, judged_windows, same
from kvprune.versions import versions

_OWN = ("calibration", "calibration_tokens", "repair_tokens", "seed", "plan", "windows")  # what the study decides


def study_calibration(
    source: str | Path,
    out: str | Path,
    *,
    texts: GivenTexts = ("wikitext2", "ptb", SELF),
    tokens: Sequence[int] = (2048, 16384),
    seeds: int = 3,
    eval: GivenTexts = (),
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

    texts: one text, or a list of them, each of any kind that `prune` calibrates on: names, files, "self", "chat:FILE",
    "hub:..."; strings as a list within the list, token ids or windows as tensors, conversations. tokens: sizes. seeds:
    how many of each. eval: texts that all cells are judged on, of these kinds (default: the test splits of the named
    ones). preset to trust_remote_code: as in `prune`.
    Writes out/study.jsonl (a cell a line, as they finish), study.json (the report, which is returned) and study.png.
    Raises a KVPruneError before anything is pruned or written for whatever can be known by then.
    """
    options = with_preset(preset, given_of(Settings, locals()))
    options |= {"windows": (window,)}
    return _Study(options, out, texts, eval, tokens, seeds, resume, progress).run()


class _Study:
    """The checks, then the cells, then the report."""

    def __init__(self, options: dict[str, Any], out, texts, eval, tokens, seeds: int, resume: bool, progress) -> None:
        check_matplotlib()
        self.texts = {text.known_as: text for text in find_texts(texts, "calibration")}
        self.sizes = sorted(set(tokens))
        self.seeds = seeds
        self.progress: Progress = progress or Progress()
        for text in self.texts.values():
            if len(text.parts) > 1:
                raise BadOption(f"a study compares texts, and --text {text.name} is several: name them one by one")
        if not self.texts or not self.sizes:
            raise BadOption("a study needs at least one --text and one --tokens")
        if seeds < 1:
            raise BadOption(f"--seeds {seeds} is too few: give at least 1")
        if self.sizes[0] < 2:
            raise BadOption(f"--tokens {self.sizes[0]} is too few: give at least 2")
        self.judged = find_texts(eval) or tuple(text for text in self.texts.values() if not text.judges)
        if not self.judged:
            raise BadOption("none of the texts has a test split; give one to judge on with --eval")
        self.options = options | {"eval": self.judged}
        names = {"eval": tuple(text.known_as for text in self.judged)}
        checked = Settings(**options | names, calibration_tokens=self.sizes[0], repair_tokens=self.sizes[0])
        if not checked.ratio > 0:
            raise BadOption(f"--ratio {checked.ratio:g} removes nothing to study; give one above 0")
        self.settings = checked
        self.source = self._resolve(checked)
        config = load_config(self.source)
        self._check_reachable(config)
        self._check_windows(config)
        tokenizer = load_tokenizer(self.source)
        self.pieces: dict[str, Pieces] = {}
        self.stretches = self._find_stretches(tokenizer, config.vocab_size)
        read = {name: _sha256(pieces) for name, pieces in self.pieces.items()}
        judged = self._check_evaluation(tokenizer, config, read)
        self.journal = StudyJournal(Path(out), self._identity(read, judged), resume)

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
        """Refit holds out some of the windows: the smallest size must have two, and where windows were given, one."""
        s, limit = self.settings, config.get_text_config().max_position_embeddings
        for text in self.texts.values():
            text.check_fits(limit)
            length = text.row or min(s.calibration_window, limit)
            few = f"--tokens {self.sizes[0]} is too few for"
            if s.refits and self.sizes[0] < 2 * length:
                needs = f"--repair {s.repair}, which needs two windows of {length}: give at least {2 * length}"
                raise BadOption(f"{few} {needs}")
            if text.row is not None and self.sizes[0] < text.row:
                raise BadOption(f"{few} {text.name}: give at least {text.row}")

    def _find_stretches(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[tuple[str, int], Stretches]:
        """By (text, tokens), largest size first: a text that is too short is found out at once."""
        found = {}
        for name, text in self.texts.items():
            if name == SELF and not is_file(name):
                continue
            self.pieces[name] = pieces = pieces_of(text, tokenizer)
            for size in reversed(self.sizes):
                what = f"the calibration text {name}"
                found[name, size] = find_stretches(pieces, text.whole(size), self.seeds, what)
                for start, end in found[name, size].spans:
                    check_ids(pieces.ids(start, end), rows, what)
        return found

    def _check_evaluation(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, read: dict[str, str]
    ) -> dict[str, str]:
        """The sha256 of every evaluation text, which is long enough and none of those that are read."""
        s, found = self.settings, {}
        length = min(s.windows[0], config.get_text_config().max_position_embeddings, s.eval_tokens)
        for text in self.judged:
            ((name, pages),) = judged_windows([text], tokenizer, [length], s.eval_tokens)
            check_ids(pages, config.vocab_size, f"the evaluation text {name}")
            found[name] = _sha256(pieces_of(text, tokenizer, "test"))
            if found[name] in read.values() or any(same(text, one) for one in self.texts.values()):
                raise BadOption(f"--eval {name} is calibrated on; judge on another text")
        return found

    def _identity(self, read: dict[str, str], judged: dict[str, str]) -> dict[str, Any]:
        """What must be the same for an unfinished study to go on."""
        s = self.settings
        fixed = {name: value for name, value in s.as_json().items() if name not in _OWN and name != "eval"}
        return {
            "study": "calibration",
            **fixed,
            "device": str(find_device(s.device)),
            "window": s.windows[0],
            "texts": list(self.texts),
            "tokens": self.sizes,
            "seeds": self.seeds,
            "eval": list(s.eval),
            "calibration_sha256": read,
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
        inner = Noted(self.progress, advance, f"{plot.short(text)} {size:,} #{seed}")
        given: dict[str, Any] = {"calibration": SELF, "seed": seed}
        first = unit = None
        if text in self.pieces:
            pieces = self.pieces[text]
            first, unit = self.stretches[text, size].spans[seed][0], pieces.unit
            given = {"calibration": pieces.behind(first), "seed": 0}  # to the text's end: prune reads `size` tokens
        result = prune(progress=inner, calibration_tokens=size, repair_tokens=size, **given, **self.options)
        record = result.record
        del result
        memory.release()
        return {
            "text": text,
            "tokens": size,
            "seed": seed,
            "first": first,
            "unit": unit,
            "first_character": first if unit == "character" else None,
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


def _sha256(pieces: Pieces) -> str:
    return hashlib.sha256(pieces.content).hexdigest()
