"""Peak memory is the process's own; bytes of weights against plain sums."""

import subprocess
import sys

import pytest
import torch

from kvprune.measure import memory
from kvprune.measure.evaluate import bytes_per_token
from kvprune.measure.memory import (
    _left_to_container,
    cache_bytes,
    is_out_of_memory,
    kv_bytes_per_token,
    weights_read_bytes,
)
from kvprune.measure.shapes import random_model
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.twin import twin_config
from tiny import merged_model, tiny_model

CHILD = """
import torch
from kvprune.measure.memory import PeakMemory
peak = PeakMemory(torch.device("cpu"))
held = bytearray(100 * 2**20)
held[::4096] = b"x" * len(held[::4096])
print(peak.bytes())
"""


def test_peak_is_not_that_of_the_parent():
    """getrusage would count a large parent: an honest figure must not depend on who started the process."""
    parent = bytearray(10**9)
    parent[::4096] = b"x" * len(parent[::4096])
    result = subprocess.run([sys.executable, "-c", CHILD], check=True, stdout=subprocess.PIPE, text=True)
    assert 100 * 2**20 <= int(result.stdout) < 150 * 2**20


def test_what_is_left_to_a_container(tmp_path):
    assert _left_to_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    assert _left_to_container(tmp_path) == [450]
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_to_container(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_out_of_memory_is(error, expected):
    assert is_out_of_memory(error) is expected


def of_modules(model, itemsize):
    """Of all modules with weights, one by one: which kinds there are is written down here."""
    known, total = {"Linear", "LlamaRMSNorm", "Qwen2RMSNorm", "HeadMix"}, 0
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False)]
        kind = type(module).__name__
        assert not own or kind in known or kind == "Embedding"
        if kind in known:
            total += sum(p.numel() for p in own) * itemsize
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_a_step_reads_of_the_weights(family, tied):
    dense = tiny_model(family, kv_heads=4, groups=2, layers=3, tie_word_embeddings=tied)
    config = twin_config(dense.config, 16, [16, 24, 32], 2, [False, True, True])
    merged = random_model(config, torch.device("cpu"), torch.bfloat16)
    for model, itemsize in ((dense, 4), (merged, 2)):
        everything = sum(p.nbytes for p in model.parameters())
        read = weights_read_bytes(model)
        assert read == of_modules(model, itemsize)
        assert everything - read == (0 if tied else model.get_input_embeddings().weight.nbytes)
        assert weights_read_bytes(model, torch.float16) == read * 2 // itemsize
    mixes = sum(2 * 4 * 16 * width for width in (24, 32))  # 4 dense KV heads of 16 channels, for Q and for O
    shrunk = sum(2 * (4 - 2 * width / 16) * 16 * 96 for width in (16, 24, 32))  # K and V
    biases = (4 * 16 + 4 * 16) * 3 - 2 * 2 * (16 + 24 + 32) - 96 * 3 if family == "qwen2" else 0  # and O gained one
    assert weights_read_bytes(merged) / 2 == weights_read_bytes(dense) / 4 + mixes - shrunk - biases


@torch.no_grad()
def test_kv_bytes_of_merged_heads():
    """Four KV heads of 16 channels that became two of 12 and 28: counted by hand, from a cache, and by the formula."""
    dense = tiny_model("llama", kv_heads=4, groups=2)
    _, pruned = merged_model(dense, (12, 28), merge=2)
    a_token = 2 * 2 * (12 + 28) * 4
    assert kv_bytes_per_token([12, 28], pruned.config.num_key_value_heads, torch.float32) == a_token
    assert bytes_per_token(pruned) == a_token
    assert bytes_per_token(dense) == kv_bytes_per_token([16, 16], 4, torch.float32) == 2 * 2 * 4 * 16 * 4
    cache = GrowingCache(pruned.config)
    pruned(torch.zeros(3, 7, dtype=torch.long), **{CACHE: cache})
    assert cache_bytes(cache) == 3 * 7 * a_token


def test_a_peak_that_lags_behind_is_none(monkeypatch):
    """Linux counts what is held per thread, and the peak from time to time: a peak may be some pages below."""
    peak = memory.PeakMemory(torch.device("cpu"))
    monkeypatch.setattr(memory, "_peak_resident", lambda: peak.baseline - 4096)
    assert peak.bytes() == 0
    monkeypatch.setattr(memory, "_peak_resident", lambda: peak.baseline + 4096)
    assert peak.bytes() == 4096
