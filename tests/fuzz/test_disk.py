"""A disk that is full or cannot be written, at every step of every command that writes; and one with room for half."""

import builtins
import contextlib
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kvprune
from ggufs import write_gguf
from kvprune.channels import journal, room
from kvprune.errors import KVPruneError, NoSpace
from kvprune.models import unpacked
from kvprune.models.source import resolve, skeleton
from kvprune.models.view import ModelView
from kvprune.recovery import checkpoints
from test_kills_of_others import GRID, OLD, TRAIN, figures
from tiny import COARSE, tiny_model

PRUNE = COARSE | {"ratio": 0.5, "allocation": "budget", "windows": (64,)}


@pytest.fixture
def full(monkeypatch):
    """full(folder, n, code): behind its n-th step nothing can be written below the folder; gives the steps taken."""
    steps = []

    def counted(real, path_of):
        def call(*arguments, **named):
            path = path_of(*arguments, **named)
            if path is not None and state and str(path).startswith(str(state["folder"])):
                steps.append(path)
                if len(steps) > state["n"]:
                    raise OSError(state["code"], os.strerror(state["code"]))
            return real(*arguments, **named)

        return call

    def opened(path, mode="r", *_, **__):
        return path if set(mode) & set("wax+") and not isinstance(path, int) else None

    state: dict = {}
    first = lambda path, *_, **__: path  # noqa: E731
    patched = [(Path, "mkdir", first), (builtins, "open", opened), (Path, "open", opened)]
    patched += [(os, "replace", lambda _, target: target), (Path, "write_bytes", first), (Path, "write_text", first)]
    patched += [(os, "fsync", lambda number: os.readlink(f"/proc/self/fd/{number}"))]
    saved = [(module, "save_file", lambda _, path, *__: path) for module in (journal, checkpoints, unpacked)]
    for where, name, path_of in (*patched, *saved):
        monkeypatch.setattr(where, name, counted(getattr(where, name), path_of))

    @contextlib.contextmanager
    def fails(folder, n, code=errno.ENOSPC):
        steps.clear()
        state.update(folder=folder, n=n, code=code)
        try:
            yield steps
        finally:
            state.clear()

    return fails


def pruning(checkpoint, pruned_half, _stock):
    def run(out, **resume):
        kvprune.prune(checkpoint, out, **PRUNE, **resume)

    return run


def pruning_a_gguf_file(checkpoint, pruned_half, _stock):
    """Block by block."""
    path = checkpoint.parent / "tiny.gguf"
    write_gguf(tiny_model("llama", groups=2, head_dim=32, layers=4, hidden=64), path, kind="Q8_0")
    source, options = resolve(path), PRUNE | {"merge": 1}
    s, view = room.Settings(source=str(path), **options), ModelView(skeleton(source))
    whole = sum(room.find_room(s, view, 1, [torch.device("cpu")], 2**60, None, source).needs.values())

    def run(out, **resume):
        tokenizer = kvprune.load_tokenizer(checkpoint)
        found = kvprune.prune(path, out, tokenizer=tokenizer, memory=whole - 1, **options, **resume)
        assert found.record["streamed"]

    return run


def recovering(checkpoint, pruned_half, _stock):
    def run(out, **resume):
        kvprune.recover(pruned_half, out, **TRAIN, **resume)

    return run


def studying(checkpoint, pruned_half, _stock):
    def run(out, **resume):
        kvprune.study_calibration(checkpoint, out, resume=out.exists(), **GRID)

    return run


def result(out):
    """What a run leaves, without what the clock said; None of one that did not finish, which must say so."""
    if (out / "study.json").exists():
        return figures(json.loads((out / "study.json").read_text()))
    if (out / "config.json").exists():
        kvprune.load(out)
        return {name: tensor.tolist() for name, tensor in load_file(out / "model.safetensors").items()}
    with pytest.raises(KVPruneError):
        kvprune.load(out)
    return None


@pytest.mark.parametrize("work", [pruning, pruning_a_gguf_file, recovering, studying])
def test_a_disk_that_is_full_at_the_nth_write(work, full, checkpoint, pruned_half, stock, texts, tmp_path):
    """At one step after another; what is there stays, and once there is room --resume ends as if nothing had been."""
    run, whole = work(checkpoint, pruned_half, stock), tmp_path / "whole"
    with full(whole, 10**9) as steps:
        run(whole)
        count = len(steps)
    assert count > 10
    expected = result(whole)
    every = max(count // int(os.environ.get("KVPRUNE_FULL", "12")), 1)
    for n in range(0, count, every):
        out = tmp_path / f"out-{n}"
        code = errno.EROFS if n == 0 else errno.ENOSPC
        with full(out, n, code), pytest.raises(NoSpace, match=r"cannot write to"):
            run(out)
        assert not out.exists() or result(out) in (None, expected)
        if not (out / "config.json").exists():
            run(out, **({"resume": True} if out.exists() else {}))
        assert result(out) == expected
        shutil.rmtree(out)


def test_refresh_and_report(full, copied, pruned_half):
    folder = copied(pruned_half)
    (folder / "modeling.py").write_bytes(OLD)
    for run in (kvprune.refresh, kvprune.report):
        n = 0
        while True:
            with full(folder, n):
                try:
                    run(folder)
                    break
                except NoSpace:
                    kvprune.load(folder)
                    assert not list(folder.glob("*.partial"))
            n += 1
        assert n > 2


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes): a folder on a disk of its own, which takes root to make."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*how):
        done = subprocess.run(["mount", *how, str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("kib", [4, 32, 100, 200, 300, 400, 600])
def test_a_small_disk(kib, small_disk, checkpoint, pruned_half, stock, texts, tmp_path):
    disk = small_disk("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs")
    for work in (pruning, recovering, studying):
        run, out = work(checkpoint, pruned_half, stock), disk / "out"
        try:
            run(out)
            assert result(out) is not None
            shutil.rmtree(out)
        except NoSpace:
            if out.exists():
                assert result(out) is None
                shutil.rmtree(out)
    try:
        kvprune.export(stock, gguf=disk / "m.gguf")
    except NoSpace:
        assert not list(disk.iterdir())


def test_a_disk_that_cannot_be_written(small_disk, checkpoint, pruned_half, stock, texts):
    disk = small_disk("-t", "tmpfs", "-o", "size=10m", "tmpfs")
    folder = shutil.copytree(pruned_half, disk / "half")
    (folder / "modeling.py").write_bytes(OLD)
    small_disk("-o", "remount,ro")
    for work in (pruning, recovering, studying):
        with pytest.raises(NoSpace, match="Read-only"):
            work(checkpoint, pruned_half, stock)(disk / "out")
    with pytest.raises(NoSpace, match="Read-only"):
        kvprune.export(stock, gguf=disk / "m.gguf")
    with pytest.raises(NoSpace, match="writable"):
        kvprune.refresh(folder)
    kvprune.load(folder)
