"""plan.json, kvprune.json, the weights' index, a bench, and what --resume reads."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import fuzz
from mutations import damaged_bytes, damaged_json, damaged_lines
from rich.console import Console

import kvprune
from kvprune.channels.journal import Journal
from kvprune.channels.plan import PruningPlan
from kvprune.measure.table import pruned_table
from kvprune.models.source import resolve, skeleton
from kvprune.models.view import ModelView
from kvprune.pages.report import report
from kvprune.recovery.checkpoints import Checkpoint, Checkpoints, State
from kvprune.runtime.files import SHOWN, read_shown, verify_files, weight_files
from kvprune.studies.journal import StudyJournal

DEEP = b"[" * 100_000
HALF = rb'{"files": {}, "source": "\ud800"}'  # of a character of two
BENCH = Path(__file__).parents[2] / "benchmarks" / "results" / "bench_half_8x1024.json"


def but(document, *path):
    """`document`, in which the last of the path stands in the place that the others name."""
    *path, last, value = path
    changed = here = copy.deepcopy(document)
    for key in path:
        here = here[key]
    here[last] = value
    return json.dumps(changed).encode()


def test_plan(checkpoint, pruned_half, tmp_path):
    path, shape = tmp_path / "plan.json", ModelView(skeleton(resolve(checkpoint))).shape
    valid = (pruned_half / "plan.json").read_bytes()

    def check(content):
        path.write_bytes(content)
        plan = PruningPlan.read(path)
        plan.check("llama", shape)
        assert PruningPlan.model_validate_json(plan.to_json()).to_json() == plan.to_json()

    fuzz(
        "plan.json",
        check,
        valid,
        damaged_json(json.loads(valid)),
        [DEEP, b"\xef\xbb\xbf", but(json.loads(valid), "ratio", float("nan"))],
    )


def test_shown(copied, pruned_half, record):
    folder, console = copied(pruned_half), Console(file=open("/dev/null", "w"))  # noqa: SIM115

    def check(content):
        (folder / "kvprune.json").write_bytes(content)
        console.print(pruned_table(read_shown(folder)))

    faults = [
        DEEP,
        HALF,
        but(record, "head_dim", "32"),
        but(record, "parameters", False),
        but(record, "widths", [1e308]),
    ]
    faults += [
        but(record, "kv_bytes_per_token", {}),
        but(record, "perplexity", 0, "dense", 0.0),
        but(record, "merge", 2),
    ]
    faults += [but(record, "widths", [10**9] * 4), but(record, "memory_formula_bytes", []), but(record, "seconds", [1])]
    faults += [
        json.dumps({name: record[name] for name in ("files", *SHOWN) if name != gone}).encode() for gone in SHOWN
    ]
    fuzz("kvprune.json, show", check, json.dumps(record).encode(), damaged_json(record), faults)


def test_verified(copied, pruned_half, record):
    folder = copied(pruned_half)

    def check(content):
        (folder / "kvprune.json").write_bytes(content)
        verify_files(folder)

    faults = [DEEP, but(record, "files", "../../../etc/passwd", "0" * 64), but(record, "files", "plan.json", None)]
    fuzz("kvprune.json, load", check, json.dumps(record).encode(), damaged_json(record), faults)


def test_refreshed(copied, pruned_half, record):
    folder = copied(pruned_half)

    def check(content):
        (folder / "kvprune.json").write_bytes(content)
        try:
            kvprune.refresh(folder)
        finally:  # as it was, or whole
            assert (folder / "kvprune.json").read_bytes() == content or kvprune.read_record(folder)
            assert not list(folder.glob("*.partial"))

    fuzz("kvprune.json, refresh", check, json.dumps(record).encode(), damaged_json(record), [DEEP], share=5)


def test_doctor(copied, stock):
    folder = copied(stock)
    record = json.loads((stock / "kvprune.json").read_text())

    def check(content):
        (folder / "kvprune.json").write_bytes(content)
        kvprune.doctor(folder, check=False)

    faults = [but(record, "kv_heads", "2"), but(record, "kv_heads", {}), but(record, "widths", [[1]]), HALF]
    fuzz("kvprune.json, doctor", check, json.dumps(record).encode(), damaged_json(record), faults, share=20)


def test_report(copied, pruned_half, record):
    folder = copied(pruned_half)

    def check(content):
        (folder / "kvprune.json").write_bytes(content)
        report(folder, bench=BENCH)

    fuzz("kvprune.json, report", check, json.dumps(record).encode(), damaged_json(record), [HALF], share=200)


def test_bench(copied, pruned_half, tmp_path):
    path, bench, folder = tmp_path / "bench.json", json.loads(BENCH.read_text()), copied(pruned_half)

    def check(content):
        path.write_bytes(content)
        report(folder, bench=path)

    faults = [DEEP, but(bench, "cells", 0, "spread", "decode", [1]), but(bench, "cells", 0, "spread", {"decode": {}})]
    faults += [but(bench, "cells", 0, "decode_ratio", 9.0), but(bench, "cells", 0, "error", "")]
    fuzz("a bench, report", check, json.dumps(bench).encode(), damaged_json(bench), faults, share=200)


def test_index(copied, pruned_half):
    folder = copied(pruned_half)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.safetensors", "a": "part.safetensors"}}

    def check(content):
        (folder / "model.safetensors.index.json").write_bytes(content)
        assert all("/" not in name for name in weight_files(folder))

    faults = [
        but(index, "weight_map", {"a": 1, "b": "x"}),
        but(index, "weight_map", {"a": "../part.safetensors"}),
        DEEP,
    ]
    fuzz("the weights' index", check, json.dumps(index).encode(), damaged_json(index), faults)


SETTINGS = {"source": "x", "ratio": 0.5, "eval": ["a"], "seed": 0}


@pytest.fixture
def journal(tmp_path):
    Journal.open(tmp_path / "out", SETTINGS, False)
    return tmp_path / "out" / ".resume"


def test_journal_settings(journal):
    def check(content):
        (journal / "settings.json").write_bytes(content)
        Journal.open(journal.parent, SETTINGS, True)

    valid = json.dumps(SETTINGS).encode()
    fuzz("settings.json of an unfinished run", check, valid, damaged_json(SETTINGS), [DEEP, b"5", b"[]"])


@pytest.mark.parametrize("name", ["losses", "estimates"])
def test_journal_lines(journal, name):
    lines = {"losses": [[0, 1, 2.5], [1, 0, 3.5]], "estimates": [[0, [1.0, 2.0]], [1, [0.5, 3.0]]]}[name]

    def check(content):
        (journal / f"{name}.jsonl").write_bytes(content)
        Journal.open(journal.parent, SETTINGS, True).load_estimates()

    faults = [b"\xff\n", b"5\n", b"[0]\n", b"[[], 0, 1.0]\n", DEEP + b"\n", b"[0, 1, \n"]
    valid = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    fuzz(f"{name}.jsonl of an unfinished run", check, valid, damaged_lines(lines), faults)


def test_journal_tensors(checkpoint, tmp_path):
    journal = Journal.open(tmp_path / "out", SETTINGS, False)
    journal.save_refit(0, {"a": torch.zeros(2, 3)}, [{"layer": 0}])
    path = journal.refit_file(0)

    def check(content):
        path.write_bytes(content)
        Journal.open(tmp_path / "out", SETTINGS, True).load_refit(0)

    valid = path.read_bytes()
    fuzz("tensors of an unfinished run", check, valid, damaged_bytes(valid), [b"", valid[:50]])


CELLS = [SETTINGS, {"text": "a", "tokens": 5, "perplexity": [{"dense": 1.0, "pruned": 2.5e-7}]}]


def test_study(tmp_path):
    with StudyJournal(tmp_path, SETTINGS, False).running():
        pass
    whole = StudyJournal(tmp_path, SETTINGS, True)
    whole.add(CELLS[1])
    valid = (tmp_path / "study.jsonl").read_bytes()
    lines = [json.loads(line) for line in valid.splitlines()]

    def check(content):  # a cell that was changed is not taken for one that was measured
        (tmp_path / "study.jsonl").write_bytes(content)
        assert StudyJournal(tmp_path, SETTINGS, True).cells in ([], CELLS[1:])

    fuzz(
        "study.jsonl", check, valid, damaged_lines(lines), [b"5\n", DEEP + b"\n", valid.replace(b"2.5e-07", b"2.4e-07")]
    )


def test_checkpoint_of_a_recovery(tmp_path):
    tensors = {"a.weight": torch.zeros(2, 3)}
    checkpoints = Checkpoints(tmp_path / "out")
    checkpoints.open(SETTINGS, False)
    state = State(4, [(1, 2.0)], [(4, 3.0)], 4, 0, 9, 1.0)
    checkpoints.save(Checkpoint(state, tensors, tensors, tensors))
    folder = tmp_path / "out" / ".resume" / "step-00000004"

    def load(name):
        def check(content):
            (folder / name).write_bytes(content)
            found = Checkpoints(tmp_path / "out")
            found.open(SETTINGS, True)
            found.load()

        return check

    valid = {name: (folder / name).read_bytes() for name in ("state.json", "adapter.safetensors")}
    plain = json.loads(valid["state.json"])
    faults = [DEEP, but(plain, "curve", [[1]]), but(plain, "held_out", [5]), but(plain, "step", "4")]
    fuzz("state.json of a recovery", load("state.json"), valid["state.json"], damaged_json(plain), faults)
    (folder / "state.json").write_bytes(valid["state.json"])
    weights = valid["adapter.safetensors"]
    fuzz("tensors of a recovery", load("adapter.safetensors"), weights, damaged_bytes(weights))
    shutil.rmtree(tmp_path / "out")
