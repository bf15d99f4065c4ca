"""How much longer `import kvprune` takes than `import transformers`: alternating fresh processes, medians.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 7


def seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


for module in ("transformers", "kvprune"):
    seconds(module)  # warm the file cache
pairs = [(seconds("transformers"), seconds("kvprune")) for _ in range(RUNS)]
theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
print(f"import transformers {theirs:.2f} s, import kvprune {ours:.2f} s, difference {ours - theirs:.2f} s")
