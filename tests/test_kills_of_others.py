"""kill -9 at random moments of recover, a study, refresh and export; tests/channels/test_kills.py is prune's."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import kvprune
from killing import disturb, kills, seconds
from kvprune import errors
from kvprune.runtime.refresh import OWN
from tiny import COARSE

TRAIN = {"steps": 8, "window": 32, "batch": 2, "rank": 2, "warmup": 1, "checkpoint_every": 2, "held_out": 64}
TRAIN |= {"eval_tokens": 128, "eval_windows": (32,), "device": "cpu", "loss": "next-token", "patience": 0}
GRID = {"texts": ("ptb",), "tokens": (512, 256), "seeds": 2, "eval": ("wikitext2",), "eval_tokens": 128, "window": 32}
GRID |= {"ratio": 0.5, "calibration_window": 64, "align": 2, "min_width": 4, "device": "cpu"}
OLD = b"# the code of an older kvprune\n"


def recover(folder, out):
    torch.set_num_threads(1)
    kvprune.recover(folder, out, resume=os.path.exists(out), **TRAIN)


def study(source, out):
    torch.set_num_threads(1)
    kvprune.study_calibration(source, out, resume=os.path.exists(out), **GRID)


def refresh(folder, _out):
    kvprune.refresh(folder)


def export(folder, out):
    kvprune.export(folder, gguf=out)


def figures(report):
    """A study's without what the clock said."""
    cells = [{name: value for name, value in cell.items() if name != "seconds"} for cell in report["cells"]]
    return cells, report["summary"], report["overall"]


def test_recover(pruned_half, texts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    takes = seconds(recover, pruned_half, whole)
    for ended in disturb("recover", kills(6), takes, recover, pruned_half, out):
        if not (out / "config.json").exists():
            assert not ended
            with pytest.raises(errors.UnknownSource):
                kvprune.load(out)
            continue
        kvprune.load(out)
        weights = [load_file(folder / "model.safetensors") for folder in (whole, out)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        curves = [kvprune.read_record(folder)["recovered"]["curve"] for folder in (whole, out)]
        assert curves[0] == curves[1]
        assert len(curves[0]) == 8
        shutil.rmtree(out)


def test_study(checkpoint, texts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    takes = seconds(study, checkpoint, whole)
    expected = figures(json.loads((whole / "study.json").read_text()))
    for ended in disturb("study", kills(6), takes, study, checkpoint, out):
        if (out / "study.json").exists():
            assert figures(json.loads((out / "study.json").read_text())) == expected
            shutil.rmtree(out)
        else:
            assert not ended


def test_refresh(pruned_half, tmp_path):
    folder = shutil.copytree(pruned_half, tmp_path / "half")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(whole["kvprune.json"])
    record["files"]["modeling.py"] = "0" * 64
    takes = seconds(refresh, folder, None)
    for ended in disturb("refresh", kills(6), takes, refresh, folder, None):
        assert (folder / "modeling.py").read_bytes() in (OLD, OWN.read_bytes())
        kvprune.load(folder)  # whatever happened
        if ended:
            kvprune.refresh(folder)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
        (folder / "modeling.py").write_bytes(OLD)
        (folder / "kvprune.json").write_text(json.dumps(record))


def test_export(checkpoint, texts, tmp_path):
    folder, whole, out = tmp_path / "stock", tmp_path / "whole.gguf", tmp_path / "out.gguf"
    kvprune.prune(checkpoint, folder, ratio=0.5, layout="stock", **{**COARSE, "windows": (64,)})
    takes = seconds(export, folder, whole)
    for ended in disturb("export", kills(6), takes, export, folder, out):
        assert out.exists() or not ended
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
            assert not ended or not list(tmp_path.glob("*.partial"))
