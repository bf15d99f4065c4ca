"""Prefill and decoding on a GPU: dense, half the width, half the tokens, and both, for a model's shape.

    python benchmarks/graph_speed.py [llama-3-8b] [--cells 1x512 8x512 8x4096 16x4096] [--out OUT]

Random weights, bfloat16, alternating runs. "graph": a step of decoding is one CUDA graph, with every cache in rooms of
a fixed size (transformers' StaticCache; TokenFilter(keep=0.5, length=N)), so what is timed is the GPU's work. "eager":
as transformers runs it, where a step of a small batch is as long as Python needs to start its kernels. Query heads of a
group are packed side by side in all of them. Without a GPU "graph" is the same step, run as it is. The limit is what
the bytes that a step reads would allow, dense / other. Finished cells are kept in OUT.json; OUT.md is drawn from it.
"""

import argparse
import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cells import Cells
from transformers import DynamicCache, PreTrainedModel, StaticCache

import kvprune
from kvprune.channels.choice.merging import AUTO
from kvprune.measure import memory
from kvprune.measure.shapes import dense_config, pruned_config, random_model
from kvprune.measure.speed import Side, Timing, alternate
from kvprune.models.places import find_device
from kvprune.runtime import attention
from kvprune.runtime.attention import pack_groups
from kvprune.runtime.modeling import CACHE
from kvprune.tokens import rooms

STEPS, WARM = 16, 3
KEEP = 0.5
WAYS = {  # how many heads became one (0: the dense model), and what is kept
    "half the width": (AUTO, None),
    "half the width, two heads in one": (2, None),
    "half the tokens": (0, KEEP),
    "half the width, two heads in one, and half the tokens": (2, KEEP),
}


class Step(Side):
    """A Side whose cache has room for all that will be timed, and whose step is a graph."""

    room = 0

    def prefill(self, ids: torch.Tensor) -> None:
        config = self.model.config
        static = self.token_filter is None
        self.cache = StaticCache(config=config, max_cache_len=self.room) if static else DynamicCache(config=config)
        self.token = self.feed(ids)
        self.position = torch.full_like(self.token, ids.shape[1])

    def once(self) -> None:
        found = self.model(self.token, position_ids=self.position, logits_to_keep=1, **{CACHE: self.cache})
        self.token.copy_(found.logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def capture(self) -> None:
        """Behind WARM steps."""
        self.replay: Callable[[], None] = self.once
        if self.model.device.type != "cuda":
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self.once()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.once()
        self.replay = graph.replay

    def held_bytes(self) -> int:
        """Of the keys and values that a step reads, with the room in them."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def sides(models: dict[Any, PreTrainedModel], way: str, kind: type[Side], room: int) -> tuple[Any, Any]:
    merge, keep = WAYS[way]
    length = {"length": room} if kind is Step else {}
    token_filter = None if keep is None else kvprune.TokenFilter(keep=keep, **length)
    both = kind(models[0]), kind(models[merge], token_filter)
    for side in both:
        side.room = room  # type: ignore[attr-defined]
    return both


def summary(timing: Timing, steps: int, limit: float | None = None) -> dict[str, Any]:
    times = dict(zip(("dense", "other"), (1000 * t / steps for t in timing.seconds), strict=True))
    return {"ms": times, "ratio": timing.ratio, "spread": [timing.ratios[0], timing.ratios[-1]], "limit": limit}


def eager(models, way: str, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    both = sides(models, way, Side, 0)
    prefill = alternate(both, lambda side: side.prefill(ids), min(rounds, 2))
    steps = alternate(both, lambda side: side.decode(ids[:, -1:], STEPS), rounds)
    dense, other = (side.bytes_read() for side in both)
    return {"prefill": summary(prefill, 1), "eager": summary(steps, STEPS, dense / other)}


def graph(models, way: str, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    needed = ids.shape[1] + 2 * WARM + (rounds + 1) * STEPS
    both = sides(models, way, Step, math.ceil(needed / 64) * 64)
    with ExitStack() as stack:
        for place in (attention, rooms):  # shapes stay: as where torch.compile makes the graph
            stack.enter_context(patch.object(place, "for_any_shape", lambda device: nullcontext()))
        for side in both:
            with side.running():
                side.prefill(ids)
                side.capture()
    steps = alternate(both, lambda side: [side.replay() for _ in range(STEPS)], rounds)
    dense, other = (side.weight_bytes_read() + side.held_bytes() for side in both)
    return summary(steps, STEPS, dense / other)


def cell(models, way: str, batch: int, context: int, rounds: int) -> dict[str, Any]:
    device, vocabulary = models[0].device, models[0].config.vocab_size
    ids = torch.randint(3, vocabulary, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)
    found = eager(models, way, ids, rounds)
    memory.release()
    return found | {"graph": graph(models, way, ids, rounds)}


def table(cells: Cells) -> str:
    head = ["batch x context, against dense", "prefill", "decode, eager", "its limit", "decode, graph", "its limit"]
    head += ["ms a step: dense, other (graph)"]
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, one in cells.cells.items():
        columns = [name]
        for part in ("prefill", "eager", "graph"):
            low, high = one[part]["spread"]
            columns.append(f"{one[part]['ratio']:.2f} ({low:.2f} to {high:.2f})")
            if one[part]["limit"] is not None:
                columns.append(f"{one[part]['limit']:.2f}")
        columns.append(" / ".join(f"{one['graph']['ms'][side]:.2f}" for side in ("dense", "other")))
        rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="llama-3-8b", help="a name, or a checkpoint")
    parser.add_argument("--cells", nargs="*", default=["1x512", "8x512", "8x4096", "16x4096"], help="batch x context")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/graph_speed"))
    a = parser.parse_args()
    device, dtype = find_device(a.device), getattr(torch, a.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    cells = Cells(a.out, a.shape, a.only, {"device": name, "dtype": a.dtype, "rounds": a.rounds, "steps": STEPS})
    dense, _ = dense_config(a.shape)
    models: dict[Any, PreTrainedModel] = {0: random_model(dense, device, dtype)}
    for merge, _ in WAYS.values():
        if merge not in models:
            models[merge] = random_model(pruned_config(dense, 0.5, merge=merge), device, dtype)
    for model in models.values():
        pack_groups(model)
    for asked in a.cells:
        batch, context = map(int, asked.split("x"))
        for way in WAYS:
            cells.run(f"{batch} x {context}: {way}", lambda b=batch, c=context, w=way: cell(models, w, b, c, a.rounds))
            memory.release()
    a.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
