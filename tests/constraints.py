"""Prints what this environment holds as pip constraints: all but kvprune, and PyTorch, which is the platform's.

They hold for Python 3.11 and newer: an older one gets the newest releases that still support it.
"""

import sys
from importlib.metadata import distributions

LEFT_OUT = ("torch", "nvidia-", "cuda-", "triton", "kvprune", "pip", "setuptools", "wheel", "vllm")


def main() -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"# What the tests passed with, on Python {python}; made by: make constraints")
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
    for name, version in sorted(found.items()):
        if not name.startswith(LEFT_OUT):
            print(f'{name}=={version}; python_version >= "3.11"')


if __name__ == "__main__":
    main()
