"""Which tokens a cache keeps: late admission beside the presses of kvpress, on the same contexts.

    KVPRUNE_DATA=DIR python benchmarks/kv_peers.py MODEL [--contexts 12] [--only PATTERN ...] [--out OUT]

A context is 1,024 tokens of the test splits of WikiText-2 and PTB, and the next 128 are scored: perplexity over that of
the dense model, with an interval of 95 % over the contexts (the mean difference of the losses, by Student's t). A press
reads the context densely, evicts, and reads the 128 behind it with all queries computed; late admission (`ours`) reads
context and what is scored as it would while decoding. "while decoding" scores the second half of 1,024 tokens.
Everything runs in float32. kvpress is a requirement of this script alone, and of its peers' cells alone: where it is
not installed, they are left out, and an environment that has it (and whatever transformers it wants) adds them to the
same OUT.json. Cells that are there are not run again.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

TEXTS, CONTEXT, SCORED = ("wikitext2", "ptb"), 1024, 128
KEEPS = (0.75, 0.5, 0.25)
PRESSES = {  # name -> the press, given the share that goes
    "StreamingLLM": lambda k, gone: k.StreamingLLMPress(gone),
    "Knorm": lambda k, gone: k.KnormPress(gone),
    "SnapKV": lambda k, gone: k.SnapKVPress(gone),
    "KeyDiff": lambda k, gone: k.BlockPress(k.KeyDiffPress(gone), block_size=64),
    "ExpectedAttention": lambda k, gone: k.ExpectedAttentionPress(gone),
    "CriticalKV(Expected)": lambda k, gone: k.CriticalKVPress(k.ExpectedAttentionPress(gone, use_vnorm=False)),
    "Compactor": lambda k, gone: k.CompactorPress(gone),
}
T95 = {11: 2.201, 12: 2.179, 15: 2.131, 23: 2.069}  # Student's, by degrees of freedom


def load(model: str) -> tuple[Any, Any]:
    path = Path(model)
    files = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent if files else path)
    lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **files).eval()
    return lm, AutoTokenizer.from_pretrained(source, **files)


def contexts_of(text: str, tokenizer: Any, number: int) -> torch.Tensor:
    """(number, CONTEXT + SCORED) token ids, evenly spread over the test split."""
    from kvprune.text.corpus import read_text

    ids = tokenizer(read_text(text, "test"), return_tensors="pt")["input_ids"][0]
    length = CONTEXT + SCORED
    step = (len(ids) - length) // (number - 1)
    return torch.stack([ids[start : start + length] for start in range(0, step * number, step)])


@torch.no_grad()
def losses(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """Mean loss of every context; logits (n, scored, vocabulary) of the tokens before ids (n, scored)."""
    found = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none")
    return found.mean(1).tolist()


@torch.no_grad()
def read(model: Any, contexts: torch.Tensor, around: Callable[[], Any], scored: int = SCORED) -> list[float]:
    """Each context by itself, all of it under `around()`."""
    found = []
    for ids in contexts.split(1):
        with around():
            logits = model(ids[:, :-1], logits_to_keep=scored, use_cache=False).logits
        found += losses(logits, ids[:, -scored:])
    return found


@torch.no_grad()
def pressed(model: Any, contexts: torch.Tensor, press: Any) -> list[float]:
    """The context densely under the press, which evicts; then what is scored, without it."""
    found = []
    for ids in contexts.split(1):
        cache = DynamicCache()
        with press(model):
            first = model(ids[:, :CONTEXT], past_key_values=cache, logits_to_keep=1).logits
        positions = torch.arange(CONTEXT, ids.shape[1] - 1).unsqueeze(0)
        rest = model(ids[:, CONTEXT:-1], past_key_values=cache, position_ids=positions).logits
        found += losses(torch.cat((first, rest), 1), ids[:, CONTEXT:])
    return found


def run(cells: Cells, name: str, number: int, signals: list[str]) -> None:
    model, tokenizer = load(name)
    texts = {text: contexts_of(text, tokenizer, number) for text in TEXTS}
    half = {text: ids[:, :CONTEXT] for text, ids in texts.items()}

    def cell(label: str, what: Callable[[torch.Tensor], list[float]], of: dict[str, torch.Tensor] = texts) -> None:
        cells.run(label, lambda: {text: what(ids) for text, ids in of.items()}, needed=label.startswith("dense"))

    cell("dense", lambda ids: read(model, ids, nullcontext))
    cell("dense while decoding", lambda ids: read(model, ids, nullcontext, CONTEXT // 2), half)
    try:
        import kvpress
    except ImportError:
        import kvprune

        for keep in KEEPS:
            for signal in signals:

                def around(keep: float = keep, signal: str = signal) -> Any:
                    return kvprune.TokenFilter(keep=keep, signal=signal)(model)

                cell(f"ours, {signal}: {keep:g}", lambda ids, a=around: read(model, ids, a))
                label = f"ours, {signal}, while decoding: {keep:g}"
                cell(label, lambda ids, a=around: read(model, ids, a, CONTEXT // 2), half)
        return
    for keep in KEEPS:
        for label, make in PRESSES.items():
            press = make(kvpress, 1 - keep)
            cell(f"{label}: {keep:g}", lambda ids, p=press: pressed(model, ids, p))


def ratio(cells: Cells, name: str, text: str) -> tuple[float, float, float]:
    """Perplexity over dense, and its interval."""
    dense = cells.cells["dense while decoding" if "while decoding" in name else "dense"][text]
    lost = [a - b for a, b in zip(cells.cells[name][text], dense, strict=True)]
    mean = statistics.mean(lost)
    half = T95.get(len(lost) - 1, 1.96) * statistics.stdev(lost) / math.sqrt(len(lost))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def table(cells: Cells) -> str:
    rows = ["| what decides | KV bytes | WikiText-2 / dense | PTB / dense |", "| --- | ---: | ---: | ---: |"]
    names = [name for name in cells.cells if ": " in name]
    names.sort(key=lambda name: ("while decoding" in name, -float(name.split(": ")[1]), name.startswith("ours")))
    for name in names:
        label, keep = name.split(": ")
        columns = [
            f"{found:.3f} ({low:.3f} to {high:.3f})"
            for found, low, high in (ratio(cells, name, text) for text in TEXTS)
        ]
        rows.append(f"| {label} | {float(keep):.0%} | " + " | ".join(columns) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--signals", nargs="*", default=["key-distance", "random"])
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kv_peers"))
    arguments = parser.parse_args()
    cells = Cells(arguments.out, arguments.model, arguments.only, {"contexts": arguments.contexts})
    run(cells, arguments.model, arguments.contexts, arguments.signals)
    arguments.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
