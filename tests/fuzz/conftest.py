"""Folders that the fuzzed files lie in, and a summary."""

import json
import shutil

import pytest
from fuzzing import counts

import kvprune
from tiny import COARSE


def pytest_terminal_summary(terminalreporter):
    for name, count in sorted(counts.items()):
        inputs, taken, slowest = (count[key] for key in ("inputs", "taken", "slowest"))
        terminalreporter.write_line(
            f"{name}: {inputs:,} inputs, {taken:,} taken, {inputs - taken:,} refused, slowest {slowest:.1f} s"
        )


@pytest.fixture(scope="session")
def copied(tmp_path_factory):
    """Copies a folder, so that its files can be damaged."""

    def copy(folder):
        return shutil.copytree(folder, tmp_path_factory.mktemp("copy") / folder.name)

    return copy


@pytest.fixture(scope="session")
def record(pruned_half):
    return json.loads((pruned_half / "kvprune.json").read_text())


@pytest.fixture(scope="session")
def stock(checkpoint, written_texts, tmp_path_factory):
    """A folder of the stock layout, which can be exported."""
    folder = tmp_path_factory.mktemp("stock") / "stock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPRUNE_DATA", str(written_texts))
        kvprune.prune(checkpoint, folder, ratio=0.5, layout="stock", **{**COARSE, "windows": (64,)})
    return folder
