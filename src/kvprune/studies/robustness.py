"""How a model fares the further it reads and writes: perplexity and repetition against position [ours].

KVPruner (arXiv 2409.11057) judges on short windows. Here one text is read from its beginning to its end, and one answer
is written at length. Where the model's context ends, it goes on behind the last half of it, read anew.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from kvprune.errors import BadOption, TextTooShort
from kvprune.measure import memory
from kvprune.measure.perplexity import LARGEST
from kvprune.measure.plot import check as check_matplotlib
from kvprune.models.finite import not_finite
from kvprune.models.logits import Head
from kvprune.models.source import Source, load_config, load_model, resolve
from kvprune.models.tokenizer import check_ids, one_tokenizer
from kvprune.progress import Progress
from kvprune.runtime.attention import pack_groups
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.files import writing_to
from kvprune.runtime.linear import pack_weights
from kvprune.runtime.modeling import CACHE
from kvprune.studies.journal import PICTURE, StudyJournal
from kvprune.text.corpus import read_text
from kvprune.text.windows import digest, started, token_ids
from kvprune.versions import versions

FIRST = 512  # tokens of the first stretch
GRAM = 4  # tokens of a repetition
PROMPT = 64  # tokens that the answer begins behind
PIECE = 512  # tokens read at once


def study_robustness(
    source: str | Path,
    out: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path = "wikitext2",
    tokens: int = 100_000,
    new_tokens: int = 4096,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read `tokens` of a text's test split (or file), and write `new_tokens` greedily behind its beginning.

    Positions fall into stretches that double, from FIRST on. Writes out/study.json (the report, which is returned) and
    study.png. Returns {"sources", "context" (of the least model), "text", "reading": [{"from", "to", "perplexity"}],
    "writing": [{"from", "to", "repetition"}]} with one value per source; repetition is the share of the stretch's
    4-grams that the answer had before. Raises a KVPruneError before any model is loaded for what can be known by then.
    """
    check_matplotlib()
    if tokens < FIRST or new_tokens < GRAM:
        raise BadOption(f"--tokens must be at least {FIRST}, and --new-tokens at least {GRAM}")
    sources = [resolve(s, revision, trust_remote_code) for s in (source, against) if s is not None]
    tokenizer = one_tokenizer(sources)
    ids = started(token_ids(read_text(str(text), "test"), tokenizer, tokens), tokenizer)[:tokens]
    if len(ids) < tokens:
        raise TextTooShort(f"the text {text} has {len(ids)} tokens, but {tokens} are asked for; ask for fewer")
    configs = [load_config(s) for s in sources]
    check_ids(ids, min(config.vocab_size for config in configs), f"the text {text}")
    context = min(config.max_position_embeddings for config in configs)
    settings = {"study": "robustness", "sources": [s.name for s in sources], "context": context, "text": str(text)}
    settings |= {"tokens": tokens, "new_tokens": new_tokens, "dtype": dtype, "sha256": digest([ids])}
    journal = StudyJournal(Path(out), {**settings, "versions": versions()}, resume)
    progress = progress or Progress()
    with journal.running():
        for index, one in enumerate(sources):
            _study_one(index, one, ids, context, new_tokens, journal, progress, device, dtype)
        report = {**journal.settings, **_side_by_side(journal.cells, len(sources))}
        with writing_to(journal.out):
            draw(report, journal.out / PICTURE)
        journal.finish(report)
    return report


def _study_one(
    index: int,
    source: Source,
    ids: torch.Tensor,
    context: int,
    new_tokens: int,
    journal: StudyJournal,
    progress: Progress,
    device: str,
    dtype: str,
) -> None:
    """Both cells of a source, unless the journal has them."""
    done = {cell["part"] for cell in journal.cells if cell["source"] == index}
    if done == {"reading", "writing"}:
        return
    with progress.phase(f"load {index + 1}"):
        model = load_model(source, device, dtype)
        pack_groups(model)
        pack_weights(model)
    if "reading" not in done:
        with progress.phase(f"read {index + 1}", len(ids)) as advance:
            rows = reading(read(model, ids, context, advance), model)
        journal.add({"source": index, "part": "reading", "rows": rows})
    if "writing" not in done:
        with progress.phase(f"write {index + 1}", new_tokens) as advance:
            answer = write(model, ids[: min(PROMPT, context // 2)], new_tokens, context, advance)
        journal.add({"source": index, "part": "writing", "rows": writing(answer)})
    del model
    memory.release()


def stretches(tokens: int) -> list[tuple[int, int]]:
    """(from, to) of positions: FIRST of them, as many again, then twice as many and so on."""
    edges = [0, FIRST]
    while edges[-1] < tokens:
        edges.append(2 * edges[-1])
    return [(a, min(b, tokens)) for a, b in pairwise(edges)]


def reading(losses: torch.Tensor, model: PreTrainedModel) -> list[dict[str, Any]]:
    """[{"from", "to", "perplexity"}] of losses (n,) in nats, of which the first is of no token. Raises NotFinite."""
    rows = []
    for first, last in stretches(len(losses)):
        mean = losses[max(first, 1) : last].double().mean().item()
        if not math.isfinite(mean):
            raise not_finite(f"the model's loss at positions {first} to {last}", model)
        rows.append({"from": first, "to": last, "perplexity": math.exp(min(mean, LARGEST))})
    return rows


def writing(answer: list[int]) -> list[dict[str, Any]]:
    """[{"from", "to", "repetition"}]: of the GRAM-grams that end in a stretch, the share that came before."""
    seen: set[tuple[int, ...]] = set()
    again = [False] * len(answer)
    for end in range(GRAM, len(answer) + 1):
        gram = tuple(answer[end - GRAM : end])
        again[end - 1] = gram in seen
        seen.add(gram)
    rows = []
    for first, last in stretches(len(answer)):
        whole = again[max(first, GRAM - 1) : last]
        rows.append({"from": first, "to": last, "repetition": sum(whole) / len(whole)})
    return rows


@torch.no_grad()
def read(
    model: PreTrainedModel, ids: torch.Tensor, context: int, advance: Callable[[int], None] = lambda n: None
) -> torch.Tensor:
    """Loss (n,) of every token of ids (n,) behind those before it, nats; of the first, NaN.

    Up to `context` they are all of those before it; from there on the last half of the context, at least.
    """
    found = torch.full((len(ids),), math.nan)
    head, half = Head.of(model), context // 2
    here = ids.to(model.device)
    for start in range(0, max(len(ids) - half, 1), half):
        cache = GrowingCache(model.config)
        scored = start + half if start else 1  # from here on
        for first in range(start, min(start + 2 * half, len(ids)), PIECE):
            last = min(first + PIECE, start + 2 * half, len(ids))
            hidden = model.base_model(input_ids=here[None, first:last], **{CACHE: cache}).last_hidden_state[0]
            labels = range(max(first + 1, scored), min(last + 1, start + 2 * half, len(ids)))
            if labels:
                states = hidden[labels[0] - 1 - first : labels[-1] - first]
                of = slice(labels[0], labels[-1] + 1)
                found[of] = functional.cross_entropy(head(states).float(), here[of], reduction="none").cpu()
                advance(len(labels))
    return found


@torch.no_grad()
def write(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    new_tokens: int,
    context: int,
    advance: Callable[[int], None] = lambda n: None,
) -> list[int]:
    """The greedy answer behind prompt (n,), which no end-of-text token ends."""
    ids = prompt.tolist()
    cache, fresh = GrowingCache(model.config), ids
    for _ in range(new_tokens):
        logits = model(torch.tensor([fresh], device=model.device), logits_to_keep=1, **{CACHE: cache}).logits
        fresh = [int(logits[0, -1].argmax())]
        ids += fresh
        advance(1)
        if cache.get_seq_length() == context:
            cache, fresh = GrowingCache(model.config), ids[-(context // 2) :]
    return ids[len(prompt) :]


def _side_by_side(cells: list[dict[str, Any]], sources: int) -> dict[str, Any]:
    """The cells of all sources as rows with a value each."""
    found: dict[str, Any] = {}
    for part, name in (("reading", "perplexity"), ("writing", "repetition")):
        by_source = {cell["source"]: cell["rows"] for cell in cells if cell["part"] == part}
        rows = zip(*(by_source[i] for i in range(sources)), strict=True)
        found[part] = [
            {"from": same[0]["from"], "to": same[0]["to"], name: [row[name] for row in same]} for same in rows
        ]
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Both against position, a line a source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (("reading", "perplexity", "perplexity"), ("writing", "repetition", "4-grams that were there before"))
    for axes, (part, name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, source in enumerate(report["sources"]):
            rows = report[part]
            edges = [rows[0]["from"] or FIRST // 2, *(row["to"] for row in rows)]
            axes.stairs([row[name][number] for row in rows], edges, baseline=None, linewidth=1.8, label=source)
        axes.set_xscale("log", base=2)
        axes.axvline(report["context"], color="0.5", linewidth=1, linestyle="--")
        axes.set_xlabel("position, tokens (dashed: the model's context ends)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150, format="png")
