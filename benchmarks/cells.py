"""A benchmark's finished cells in a JSON file, so that an interrupted one goes on where it was."""

import json
import platform
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from kvprune.versions import versions


class Cells:
    """OUT.json. only: patterns of the names to run; none is all. settings: what all cells are made with; a file that
    was made with others, or of another model, is left alone."""

    def __init__(self, out: Path, model: str, only: list[str], settings: dict[str, Any] | None = None):
        self.out, self.only = out, only
        path = out.with_suffix(".json")
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
        made = {"model": Path(model).name, "settings": settings or {}}
        there = self.results.get("environment", made)
        if any(there.get(name, {}) != value for name, value in made.items()):
            sys.exit(f"{path} was made of {there['model']} with {there.get('settings', {})}; choose another --out")
        self.results["environment"] = {
            **made,
            "versions": versions(),
            "machine": platform.machine(),
        }

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return self.results["cells"]

    def run(self, name: str, work: Callable[[], dict[str, Any]], needed: bool = False) -> None:
        """Run and keep one cell, unless it is there already or neither asked for nor needed by the others."""
        asked = needed or not self.only or any(fnmatch(name, pattern) for pattern in self.only)
        if name in self.cells or not asked:
            return
        print(f"--- {name}", flush=True)
        started = time.monotonic()
        found = work()
        cost = {"total_seconds": round(time.monotonic() - started, 1), "threads": torch.get_num_threads()}
        self.cells[name] = {**names_only(found), **cost}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.with_suffix(".json").write_text(json.dumps(self.results, indent=1) + "\n")


def names_only(found: Any) -> Any:
    """The same with the last part of every absolute path: folders of one machine say nothing on another."""
    if isinstance(found, dict):
        return {key: names_only(value) for key, value in found.items()}
    if isinstance(found, list):
        return [names_only(value) for value in found]
    return Path(found).name if isinstance(found, str) and Path(found).is_absolute() else found
