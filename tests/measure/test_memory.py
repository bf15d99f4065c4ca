"""Peak memory is the process's own."""

import subprocess
import sys

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
