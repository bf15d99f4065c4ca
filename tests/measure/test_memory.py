"""Peak memory is the process's own."""

import subprocess
import sys

import pytest
import torch

from kvprune.measure.evaluate import bytes_per_token
from kvprune.measure.memory import _left_to_container, cache_bytes, is_out_of_memory, kv_bytes_per_token
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE
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
