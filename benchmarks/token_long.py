"""100,000 tokens in one run under a token filter: what must stay flat, stays flat.

    python benchmarks/token_long.py [--tokens 100000] [--ways WAY ...] [--out benchmarks/results/token_long]

A Llama of a small shape with random weights decodes one token after the other: half of the tokens kept ("kept"), a
quarter of attention skipped ("filtered"), and "dense"; ways that are left out stay as OUT.json has them. Written down
at every tenth: the share kept, or the ratio of attention skipped since the tenth before, milliseconds a token, the
cache's bytes with its free room, and the process's memory beside them. Attention to a growing cache takes longer and
longer; beside it stands the dense model at the same lengths.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvprune
from kvprune.measure.memory import held_bytes, release
from kvprune.runtime.modeling import CACHE
from kvprune.versions import versions

POINTS = 10
WAYS: dict[str, Any] = {"kept": {"keep": 0.5}, "filtered": {"ratio": 0.25}, "dense": None}


def model_of(tokens: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=tokens + 1,
    )
    return LlamaForCausalLM(config).eval()


def resident() -> int:
    """Bytes of memory that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@torch.no_grad()
def decode(model, tokens: int, token_filter: kvprune.TokenFilter | None) -> list[dict[str, Any]]:
    cache = kvprune.GrowingCache(model.config)
    ids = torch.randint(3, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    rows, skipped, late = [], 0.0, 0
    start = time.perf_counter()
    for t in range(tokens):
        model(ids[:, t : t + 1], logits_to_keep=1, **{CACHE: cache})
        if (t + 1) % (tokens // POINTS) == 0:
            row: dict[str, Any] = {"tokens": t + 1}
            row["ms_per_token"] = 1000 * (time.perf_counter() - start) / (tokens // POINTS)
            row["cache_bytes"] = sum(held_bytes(layer) for layer in cache.layers)
            row["memory_beside_the_cache"] = resident() - row["cache_bytes"]
            report = {} if token_filter is None else token_filter.report
            if "keep_achieved" in report:
                row["keep_achieved"] = report["keep_achieved"]
            elif report:
                now = report["ratio_achieved"] * report["tokens_after_warmup"]
                row["ratio_achieved"] = (now - skipped) / (report["tokens_after_warmup"] - late)
                skipped, late = now, report["tokens_after_warmup"]
            if report:
                row["kv_bytes"], row["kv_bytes_dense"] = report["kv_bytes"], report["kv_bytes_dense"]
            rows.append(row)
            print(row, flush=True)
            start = time.perf_counter()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_long"))
    arguments = parser.parse_args()
    path = arguments.out.with_suffix(".json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model = model_of(arguments.tokens)
    for way in arguments.ways:
        with nullcontext() if WAYS[way] is None else kvprune.TokenFilter(**WAYS[way])(model) as f:
            found[way] = decode(model, arguments.tokens, f)
        release()
    found["environment"] = {"versions": versions(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
