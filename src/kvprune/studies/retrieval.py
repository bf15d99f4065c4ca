"""Whether a model still finds what was said once, long ago: numbers hidden in a text, and asked for at its end [ours].

After the needle in a haystack (Kamradt, 2023) and the multi-key task of RULER (arXiv 2404.06654), in sentences that a
small model can follow. "one number": one sentence says the number of a city. "many numbers": as many sentences as there
are cities say one each, evenly spread. One of them is asked for.
"""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvprune.errors import BadOption, TextTooShort
from kvprune.measure import memory
from kvprune.measure.plot import check as check_matplotlib
from kvprune.models.source import Source, load_config, load_model, resolve
from kvprune.models.tokenizer import check_ids, one_tokenizer
from kvprune.progress import Progress
from kvprune.runtime.files import writing_to
from kvprune.runtime.linear import pack_weights
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import quantized_cache, quantizer
from kvprune.studies.journal import PICTURE, StudyJournal
from kvprune.studies.plot import COLOURS
from kvprune.text.corpus import read_text
from kvprune.text.windows import digest, started, token_ids
from kvprune.tokens.filter import TokenFilter
from kvprune.versions import versions

TASKS = ("one number", "many numbers")
CITIES = ("London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Moscow", "Tokyo")
FACT, QUESTION = " The secret number of {} is {}.", " The secret number of {} is"
DIGITS = 5


@dataclass(frozen=True)
class Sample:
    """context (T,): token ids with the facts in it; question, answer: those behind it."""

    context: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor


def study_retrieval(
    source: str | Path,
    out: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path = "wikitext2",
    contexts: Sequence[int] = (4096, 8000),
    keeps: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
    kv_bits: int | None = None,
    samples: int = 10,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask for numbers that a text's test split (or file) hides, at every share of the KV bytes in `keeps`.

    contexts: tokens of text, question and answer; samples: of each task and context, the place of what is asked for
    moving evenly from the beginning to the end. keep 1 is no filter. Writes out/study.json (the report, which is
    returned) and study.png. Returns {"sources", "rows": [{"source" (its number), "task", "context", "keep", "samples",
    "exact" (share of answers that greedy decoding gives), "loss" (nats, mean of the answers' tokens)}]} and the
    settings. Raises a KVPruneError before any model is loaded for what can be known by then.
    """
    check_matplotlib()
    if samples < 1 or not contexts or not keeps:
        raise BadOption("retrieval needs at least one sample, one context and one share to keep")
    if kv_bits is not None:
        quantizer(kv_bits)
    filters = {keep: None if keep == 1 else TokenFilter(keep=keep) for keep in keeps}
    sources = [resolve(s, revision, trust_remote_code) for s in (source, against) if s is not None]
    tokenizer = one_tokenizer(sources)
    configs = [load_config(s) for s in sources]
    least = min(config.max_position_embeddings for config in configs)
    if max(contexts) > least:
        raise BadOption(f"--context {max(contexts)} is more than the {least} tokens that the model takes")
    hay = started(token_ids(read_text(str(text), "test"), tokenizer, max(contexts)), tokenizer)
    if len(hay) < max(contexts):
        raise TextTooShort(f"the text {text} has {len(hay)} tokens, fewer than the context; ask for a smaller one")
    check_ids(hay, min(config.vocab_size for config in configs), f"the text {text}")
    made = {
        (task, n): [sample_of(task, hay, n, i, samples, tokenizer, seed) for i in range(samples)]
        for task in TASKS
        for n in contexts
    }
    settings: dict[str, Any] = {
        "study": "retrieval",
        "sources": [s.name for s in sources],
        "text": str(text),
        "kv_bits": kv_bits,
    }
    settings |= {"contexts": list(contexts), "keeps": list(keeps), "samples": samples, "seed": seed, "dtype": dtype}
    journal = StudyJournal(Path(out), {**settings, "sha256": digest([hay]), "versions": versions()}, resume)
    progress = progress or Progress()
    with journal.running():
        for index, one in enumerate(sources):
            _study_one(index, one, made, filters, kv_bits, journal, progress, device, dtype)
        report = {**journal.settings, "rows": journal.cells}
        with writing_to(journal.out):
            draw(report, journal.out / PICTURE)
        journal.finish(report)
    return report


def _study_one(
    index: int,
    source: Source,
    made: dict[tuple[str, int], list[Sample]],
    filters: dict[float, TokenFilter | None],
    kv_bits: int | None,
    journal: StudyJournal,
    progress: Progress,
    device: str,
    dtype: str,
) -> None:
    """All cells of a source that the journal does not have."""
    done = {(cell["task"], cell["context"], cell["keep"]) for cell in journal.cells if cell["source"] == index}
    left = [(task, n, keep) for task, n in made for keep in filters if (task, n, keep) not in done]
    if not left:
        return
    with progress.phase(f"load {index + 1}"):
        model = load_model(source, device, dtype)
        pack_weights(model)
    with progress.phase(f"ask {index + 1}", len(left)) as advance:
        for task, n, keep in left:
            answers = [ask(model, sample, filters[keep], kv_bits) for sample in made[task, n]]
            exact, losses = zip(*answers, strict=True)
            cell = {"source": index, "task": task, "context": n, "keep": keep, "samples": len(answers)}
            journal.add({**cell, "exact": sum(exact) / len(exact), "loss": sum(losses) / len(losses)})
            advance(1, f"{task}, {n} tokens, {keep:.0%} kept: {sum(exact)} of {len(exact)}")
    del model
    memory.release()


def sample_of(
    task: str, hay: torch.Tensor, tokens: int, number: int, of: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Sample:
    """The number-th of so many samples: what is asked for moves from the text's beginning to its end."""
    chance = random.Random(f"{seed} {task} {tokens} {number}")
    numbers = {city: str(chance.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for city in CITIES}
    depth = (number + 0.5) / of
    if task == TASKS[0]:
        asked = chance.choice(CITIES)
        places = [(depth, asked)]
    else:
        order = chance.sample(CITIES, len(CITIES))
        asked = order[int(depth * len(order))]
        places = [((i + 0.5) / len(order), city) for i, city in enumerate(order)]

    def ids(words: str) -> torch.Tensor:
        return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])

    question = ids(QUESTION.format(asked))
    answer = ids(QUESTION.format(asked) + f" {numbers[asked]}")[len(question) :]
    facts = [(depth, ids(FACT.format(city, numbers[city]))) for depth, city in places]
    room = tokens - len(question) - len(answer) - sum(len(fact) for _, fact in facts)
    if room < len(facts):
        raise BadOption(f"--context {tokens} has no room for {len(facts)} sentences; take a longer one")
    parts, start = [], 0
    for depth, fact in facts:
        end = int(depth * room)
        parts += [hay[start:end], fact]
        start = end
    return Sample(torch.cat([*parts, hay[start:room]]), question, answer)


@torch.no_grad()
def ask(
    model: PreTrainedModel, sample: Sample, token_filter: TokenFilter | None, kv_bits: int | None
) -> tuple[bool, float]:
    """Whether greedy decoding gives the answer, and the mean loss of its tokens."""
    cache: Any = DynamicCache(config=model.config) if kv_bits is None else quantized_cache(model.config, kv_bits)
    n = len(sample.answer)
    with nullcontext() if token_filter is None else token_filter(model):
        model(sample.context[None].to(model.device), logits_to_keep=1, **{CACHE: cache})
        rest = torch.cat((sample.question, sample.answer[:-1]))[None].to(model.device)
        logits = model(rest, logits_to_keep=n, **{CACHE: cache}).logits[0].float()
    answer = sample.answer.to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits, answer)
    return bool((logits.argmax(-1) == answer).all()), loss.item()


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG: a panel a task, a line a source and context, the share found against what is kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, task in zip(panels, TASKS, strict=True):
        number = 0
        for index, name in enumerate(report["sources"]):
            for n in report["contexts"]:
                wanted = (index, task, n)
                rows = [r for r in report["rows"] if (r["source"], r["task"], r["context"]) == wanted]
                rows.sort(key=lambda row: row["keep"])
                label = f"{Path(name).name}, {n:,} tokens"
                points = [r["keep"] for r in rows], [r["exact"] for r in rows]
                axes.plot(*points, "o-", color=COLOURS[number % len(COLOURS)], label=label)
                number += 1
        axes.set_title(task, fontsize=10)
        axes.set_xticks(report["keeps"], [f"{keep:.0%}" for keep in report["keeps"]])
        axes.set_xlabel("KV bytes kept")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].set_ylabel("answers found")
    panels[1].legend(fontsize=8, frameon=False)
    bits = "" if report["kv_bits"] is None else f", a cache of {report['kv_bits']} bits"
    figure.suptitle(f"Numbers hidden in a text, asked for at its end{bits}", fontsize=11)
    figure.savefig(path, dpi=150, format="png")
