"""vLLM's tensor parallelism, by processes on this CPU: the heads of a pruned model split among ranks, or repeated where
there are more ranks than KV heads."""

import json
import os
from pathlib import Path

import pytest
from served import ask, gaps

FOLDERS = Path(os.environ.get("KVPRUNE_TEST_TINY", "missing"))
CASES = [  # folder, ranks, KV heads of the dense model and of this
    ("qwen2-alone", 2, (2, 2)),
    ("qwen2-alone", 4, (2, 2)),
    ("olmo2-merged", 2, (4, 2)),  # a norm over all heads
    ("qwen3-merged", 4, (4, 1)),  # a norm over each head; factored
    ("gpt_oss", 2, (2, 1)),  # sinks, one for each query head
]


@pytest.mark.parametrize(("name", "ranks", "heads"), CASES)
def test_the_ranks_give_what_transformers_gives(name, ranks, heads, tmp_path):
    folder = FOLDERS / name
    config = json.loads((folder / "config.json").read_text())
    assert (config["dense_kv_heads"] or heads[0], config["num_key_value_heads"]) == heads
    difference, gap = gaps(folder, ask(folder, tmp_path, "folder", str(ranks), VLLM_CPU_OMP_THREADS_BIND="nobind"))
    print(f"\n{name} on {ranks} ranks: log-probabilities differ by {difference:.1e} at most")
    assert difference < 1e-4
    assert gap < 1e-4
