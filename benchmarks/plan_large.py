"""What pruning a large model takes, by the formula of channels/room.py: memory, disk, and hours by phase.

    python benchmarks/plan_large.py --flops 150e12 --double 30e12 --stream 10e9 [--shape llama-3-70b] [--processes 1]
        [--repair-tokens 32768]

flops, double: operations a second of products in the model's dtype and in float64, of one device; stream: bytes a
second at which blocks come from disk or host memory. Processes share the windows, and each reads all blocks; the
solver's work is done by all of them alike. Nothing is measured here: the rates are what you say.
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvprune.channels.choice.merging import merge_of
from kvprune.channels.room import BATCH_TOKENS, disk_of, largest_block, needs_of, outside_of, work
from kvprune.channels.settings import Settings
from kvprune.measure.memory import weight_bytes
from kvprune.measure.shapes import SHAPES
from kvprune.models.view import ModelView

LARGE = {
    "llama-3-70b": SHAPES["llama-3-8b"]
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
}


def view_of(shape: str) -> ModelView:
    """Without weights."""
    settings = dict((SHAPES | LARGE)[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.base_model.rotary_emb = type(lm.base_model.rotary_emb)(config)
    return ModelView(lm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-70b", choices=[*SHAPES, *LARGE])
    for name in ("flops", "double", "stream"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repair-tokens", type=int, default=32768)
    given = parser.parse_args()
    view, s = view_of(given.shape), Settings(source=given.shape, ratio=0.5, repair_tokens=given.repair_tokens)
    merge = merge_of("auto", view.shape.kv_heads, view.shape.head_dim, s.ratio)
    gib = 2**30
    print(
        f"{given.shape}, {merge} KV heads in one, half of the bytes; {weight_bytes(view.lm) / gib:.0f} GiB of weights, "
    )
    print(f"a block {largest_block(view) / gib:.2f} GiB, outside of the blocks {outside_of(view) / gib:.1f} GiB\n")
    print("| working memory, block by block | GiB |\n| --- | ---: |")
    needs = needs_of(s, view, merge, BATCH_TOKENS, streamed=True)
    for name, size in needs.items():
        print(f"| {name} | {size / gib:.1f} |")
    print(f"| together | {sum(needs.values()) / gib:.1f} |\n")
    print(f"Disk, result and what is kept on the way: {disk_of(s, view, merge) / gib:.0f} GiB\n")
    print("| phase | tokens through all blocks | blocks read | hours |\n| --- | ---: | ---: | ---: |")
    blocks = sum(p.numel() for block in view.blocks for p in block.parameters())
    total = 0.0
    for name, part in work(s, view).items():
        computing = 2 * blocks * part.tokens / given.flops / given.processes + part.double / given.double
        reading = 2 * blocks * part.reads / given.stream
        hours = max(computing, reading) / 3600  # one goes on while the other does
        total += hours
        print(f"| {name} | {part.tokens:,} | {part.reads} | {hours:.2f} |")
    print(f"| all | | | {total:.2f} |")


if __name__ == "__main__":
    main()
