"""Several processes make the plan that one makes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import kvprune
from ggufs import write_gguf
from kvprune import processes
from kvprune.channels.room import find_room
from kvprune.channels.settings import Settings
from kvprune.models.source import resolve, skeleton
from kvprune.models.view import ModelView
from tiny import COARSE, tiny_model, tiny_tokenizer

SCRIPT = """
import json, sys
import kvprune
from kvprune import processes
options = json.loads(sys.argv[1])
if "tokenizer" in options:
    options["tokenizer"] = kvprune.load_tokenizer(options["tokenizer"])
try:
    result = kvprune.prune(options.pop("source"), options.pop("out"), **options)
except kvprune.errors.KVPruneError as error:
    sys.exit(f"told: {error}")
if processes.is_main():
    print(json.dumps(result.record))
"""


def launched(count, folder, source, out, **options):
    (folder / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    given = json.dumps(options | {"source": str(source), "out": str(out)})
    return subprocess.run(
        [*command, str(folder / "run.py"), given],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def source(tmp_path):
    tiny_model("qwen2", kv_heads=4, groups=2, layers=3).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def too_little(source, options):
    """Bytes: one too few for the whole model."""
    found, s = resolve(source), Settings(source=str(source), **options)
    room = find_room(s, ModelView(skeleton(found)), 2, [torch.device("cpu")], 2**60, None, found)
    return sum(room.needs.values()) - 1


@pytest.mark.parametrize(
    ("options", "streamed"),
    [
        ({"merge": 2, "allocation": "budget"}, True),
        ({"merge": 2, "depth": "auto"}, False),
        ({"merge": 2, "drop_blocks": 1}, True),
        ({"importance": "taylor", "allocation": "sensitivity", "probes": "measured", "repair": "refit"}, False),
    ],
    ids=str,
)
def test_two_processes_make_the_plan_of_one(options, streamed, source, texts, tmp_path):
    options = COARSE | {"ratio": 0.5} | options
    one = kvprune.prune(source, tmp_path / "one", **options)
    memory = {"memory": too_little(source, options)} if streamed else {}
    result = launched(2, tmp_path, source, tmp_path / "two", **options, **memory)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)  # of the main process alone
    assert record["streamed"] == streamed
    assert kvprune.PruningPlan.read(tmp_path / "two").layers == one.plan.layers
    if one.plan.sensitivity:
        assert record["sensitivity"] == pytest.approx(one.plan.sensitivity, rel=1e-3, abs=1e-7)
    for row, expected in zip(record["perplexity"], one.record["perplexity"], strict=True):
        assert row["tokens"] == expected["tokens"]
        for name in ("dense", "pruned"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4, msg=name)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_two_processes_and_a_gguf_file(source, texts, tmp_path):
    """It is unpacked once, by the main one."""
    path = write_gguf(tiny_model("qwen2", kv_heads=4, groups=2, layers=3), tmp_path / "tiny.gguf")
    options = COARSE | {"ratio": 0.5, "merge": 2, "dtype": "float32"}
    one = kvprune.prune(path, tmp_path / "one", tokenizer=kvprune.load_tokenizer(source), **options)
    memory = too_little(path, options)
    result = launched(2, tmp_path, path, tmp_path / "two", tokenizer=str(source), memory=memory, **options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["streamed"]
    assert kvprune.PruningPlan.read(tmp_path / "two").layers == one.plan.layers
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_processes_that_cannot_work_together(source, texts, tmp_path):
    options = COARSE | {"ratio": 0.5}
    few = options | {"calibration_tokens": 64, "repair_tokens": 128}
    result = launched(2, tmp_path, source, tmp_path / "out", **few)
    assert result.returncode != 0
    assert "2 processes cannot share 1 windows of text; start fewer, or give more tokens" in result.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    result = launched(2, tmp_path, source, tmp_path / "full", **options)
    assert result.returncode != 0
    assert "is not empty; choose another --out" in result.stderr


def test_processes_that_disagree(monkeypatch):
    monkeypatch.setattr(processes, "gathered", lambda what: [what, what | {"versions": {"torch": "1"}}])
    with pytest.raises(kvprune.errors.BadOption, match=r"processes 0 and 1 disagree about versions: .*same files"):
        processes.check_same({"weights": "a", "versions": {"torch": "2"}})


def test_one_process_does_nothing():
    batches = [torch.arange(6).view(2, 3), torch.arange(3).view(1, 3)]
    assert all(a is b for a, b in zip(processes.mine(batches), batches, strict=True))
    x = torch.ones(2)
    assert processes.summed(x) is x
    assert torch.equal(x, torch.ones(2))
    assert processes.gathered(3) == [3]
    assert processes.after_main(lambda: 5) == 5
