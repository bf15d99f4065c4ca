"""kill -9, a full disk and a loss that is not finite: what is on the disk stays whole, and --resume goes on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import kvprune
from kvprune import errors
from kvprune.models.source import load_model, resolve
from kvprune.recovery import checkpoints, train

RUN = """
import sys, json, time, kvprune, torch
from kvprune.recovery import train
torch.set_num_threads(1)
step = train.Training._step
def slow(self):
    time.sleep(0.05)
    return step(self)
train.Training._step = slow
kvprune.recover(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""


def weights(folder):
    return load_model(resolve(folder), "cpu").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("loss", ["next-token", "logits+attention"])
def test_kill_and_resume_gives_the_same_curve_and_weights(pruned, texts, tmp_path, quick, loss):
    options = {**quick, "steps": 24, "dropout": 0.1, "patience": 0, "loss": loss}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, "-c", RUN, str(pruned), str(cut), json.dumps(options)]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (cut / ".resume" / "step-00000008").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # into the steps behind the checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(errors.UnknownSource, match="unfinished"):
        kvprune.load(cut)
    with pytest.raises(errors.OutputExists, match="--resume"):
        kvprune.recover(pruned, cut, **options)
    with pytest.raises(errors.OutputExists, match="seed=0"):
        kvprune.recover(pruned, cut, resume=True, **{**options, "seed": 1})
    shutil.copytree(cut, tmp_path / "other")
    text = (texts / "wikitext2-valid.txt").read_text()
    (texts / "wikitext2-valid.txt").write_text(text[100:])
    with pytest.raises(errors.OutputExists, match="recovery_text"):
        kvprune.recover(pruned, tmp_path / "other", resume=True, **options)
    (texts / "wikitext2-valid.txt").write_text(text)
    resumed = kvprune.recover(pruned, cut, resume=True, **options).record["recovered"]
    assert "evaluate pruned" not in kvprune.read_record(cut)["seconds"]
    uninterrupted = kvprune.recover(pruned, whole, **options).record["recovered"]
    for name in ("curve", "held_out_curve", "best_step", "tokens", "steps"):
        assert resumed[name] == uninterrupted[name]
    assert len(resumed["curve"]) == 24
    assert same(weights(cut), weights(whole))
    assert kvprune.read_record(cut)["perplexity"] == kvprune.read_record(whole)["perplexity"]


def test_a_full_disk_keeps_the_checkpoint_before(pruned, texts, tmp_path, quick, monkeypatch):
    out, saves = tmp_path / "out", []
    real = checkpoints.save_file

    def full(tensors, path):
        saves.append(path)
        if len(saves) == 5:  # the second file of the second checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(errors.NoSpace, match="free some space"):
        kvprune.recover(pruned, out, **quick)
    steps = sorted(p.name for p in (out / ".resume").iterdir() if p.is_dir())
    assert steps == ["step-00000004"]
    monkeypatch.undo()
    monkeypatch.setenv("KVPRUNE_DATA", str(texts))
    resumed = kvprune.recover(pruned, out, resume=True, **quick)
    assert same(resumed.model.state_dict(), kvprune.recover(pruned, **quick).model.state_dict())


def test_a_full_disk_at_the_first_checkpoint_leaves_nothing(pruned, texts, tmp_path, quick, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(errors.NoSpace):
        kvprune.recover(pruned, tmp_path / "out", **quick)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["partial", "replace"])
def test_a_crash_while_a_checkpoint_is_written(pruned, texts, tmp_path, quick, monkeypatch, moment):
    out = tmp_path / "out"

    class Crash(BaseException):
        pass

    def crash(*args):
        if (out / ".resume" / "step-00000004").exists():
            raise Crash
        return real(*args)

    target = (checkpoints, "save_file") if moment == "partial" else (checkpoints.os, "replace")
    real = getattr(*target)
    monkeypatch.setattr(*target, crash)
    with pytest.raises(Crash):
        kvprune.recover(pruned, out, **quick)
    monkeypatch.setattr(*target, real)
    resumed = kvprune.recover(pruned, out, resume=True, **quick).record["recovered"]
    assert resumed["curve"] == kvprune.recover(pruned, **quick).record["recovered"]["curve"]


@pytest.mark.parametrize("after", [2, 6])
def test_nan_stops_and_keeps_the_last_good_checkpoint(pruned, texts, tmp_path, quick, monkeypatch, after):
    out = tmp_path / "out"
    real = train.Training._loss

    def broken(self, batch, held_out=False):
        return real(self, batch, held_out) * (float("nan") if self.state.step == after and not held_out else 1)

    monkeypatch.setattr(train.Training, "_loss", broken)
    with pytest.raises(errors.NotFinite, match=f"step {after + 1} is not finite") as error:
        kvprune.recover(pruned, out, **quick)
    monkeypatch.setattr(train.Training, "_loss", real)
    if after == 2:
        assert "no checkpoint" in str(error.value)
        assert not out.exists()
        return
    assert "checkpoint of step 4" in str(error.value)
    assert not (out / "config.json").exists()
    with pytest.raises(errors.OutputExists, match="seed"):
        kvprune.recover(pruned, out, resume=True, **{**quick, "seed": 2})

    def stopped_again(self, batch, held_out=False):
        if self.state.step == after + 1:
            raise KeyboardInterrupt
        return real(self, batch, held_out)

    monkeypatch.setattr(train.Training, "_loss", stopped_again)
    with pytest.raises(KeyboardInterrupt):
        kvprune.recover(pruned, out, resume=True, **{**quick, "lr": 1e-3})
    monkeypatch.setattr(train.Training, "_loss", real)
    with pytest.raises(errors.OutputExists, match=r"lr=0\.001"):  # the new one is what the run has now
        kvprune.recover(pruned, out, resume=True, **quick)
    record = kvprune.recover(pruned, out, resume=True, **{**quick, "lr": 1e-3}).record["recovered"]
    assert (record["steps"], record["settings"]["lr"]) == (12, 1e-3)
    assert len(record["curve"]) == 12


def test_a_damaged_checkpoint_is_named(pruned, texts, tmp_path, quick, monkeypatch):
    def stop(self):
        if self.state.step == 6:
            raise KeyboardInterrupt
        return real(self)

    real = train.Training._step
    monkeypatch.setattr(train.Training, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        kvprune.recover(pruned, tmp_path / "out", **quick)
    path = tmp_path / "out" / ".resume" / "step-00000004" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(errors.BrokenCheckpoint, match="step-00000004 is damaged"):
        kvprune.recover(pruned, tmp_path / "out", resume=True, **quick)
