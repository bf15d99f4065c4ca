"""Out of memory in every phase, two runs into one folder, and a clock that jumps."""

import errno
import os
import random
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from test_disk import pruning, recovering, result, studying
from test_fuzz_commands import QUICK, TRAIN

import kvprune
from killing import processes
from kvprune import cli
from kvprune.errors import KVPruneError, OutputExists
from kvprune.progress import Progress
from kvprune.runtime.files import alone

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    ),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]


class Phases(Progress):
    """Notes the phases; raises `error` in the one that is named, at its first step, or at its end if it has none."""

    def __init__(self, failing=None, error=None):
        super().__init__()
        self.failing, self.error, self.names = failing, error, []

    def say(self, message):
        pass

    @contextmanager
    def _show(self, name, total):
        self.names.append(name)

        def advance(steps, note=""):
            if name == self.failing:
                raise self.error

        yield advance
        advance(0)


def commands(checkpoint, pruned_half):
    """By name: what goes before --out, and whether it writes."""
    return {
        "prune": (("prune", checkpoint, *QUICK, "--allocation", "sensitivity"), True),
        "recover": (("recover", pruned_half, *TRAIN), True),
        "generate": (("generate", pruned_half, "the words", "--max-new-tokens", 3, "--device", "cpu"), False),
    }


@pytest.mark.parametrize("name", ["prune", "recover", "generate"])
def test_out_of_memory_in_every_phase(name, checkpoint, pruned_half, texts, tmp_path, command, monkeypatch):
    arguments, writes = commands(checkpoint, pruned_half)[name]
    phases, whole = Phases(), tmp_path / "whole"
    monkeypatch.setattr(cli, "on_stderr", lambda: phases)
    code, _, err = command(*arguments, *(("--out", whole) if writes else ()))
    assert code == 0, err
    names = list(dict.fromkeys(phases.names))
    assert len(names) > (3 if writes else 1)
    for number, phase in enumerate(names):
        out = tmp_path / f"out-{number}"
        where = ("--out", out) if writes else ()
        error = OUT_OF_MEMORY[number % len(OUT_OF_MEMORY)]
        monkeypatch.setattr(cli, "on_stderr", lambda phase=phase, error=error: Phases(phase, error))
        code, shown, err = command(*arguments, *where)
        assert (code, shown, err.count("\n")) == (2, "", 1), (phase, err)
        assert "out of memory; give " in err
        if not writes:
            continue
        monkeypatch.setattr(cli, "on_stderr", Phases)
        if (out / "config.json").exists():  # at the end of the last phase
            assert phase == "save"
        else:
            assert not out.exists() or result(out) is None
            code, _, err = command(*arguments, *where, *(("--resume",) if out.exists() else ()))
            assert code == 0, err
        assert result(out) == result(whole)


def test_out_of_memory_in_a_cell_or_a_text(checkpoint, pruned_half, texts, command, monkeypatch):
    """`eval` and `bench` go on with what is left, and say what had no room."""

    def too_large(*_arguments, **_named):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("kvprune.measure.evaluate.perplexity", too_large)
    code, shown, err = command("eval", pruned_half, "--text", "ptb", "--tokens", 128, "--window", 64, "--device", "cpu")
    assert code == 0, err
    assert "out of memory" in shown
    monkeypatch.setattr("kvprune.models.source.AutoModelForCausalLM.from_pretrained", too_large)
    for one in (("eval",), ("bench", "--context", 64)):
        code, _, err = command(*one, pruned_half, "--device", "cpu")
        assert (code, err.count("\n")) == (2, 1)
        assert "out of memory; give a smaller --" in err


@pytest.mark.parametrize("work", [pruning, recovering, studying])
def test_a_second_run_into_a_folder_says_so(work, checkpoint, pruned_half, stock, texts, tmp_path):
    run, out = work(checkpoint, pruned_half, stock), tmp_path / "out"
    with alone(out), pytest.raises(OutputExists, match="another run is writing"):
        run(out)
    assert not out.exists()
    run(out)
    with alone(pruned_half), pytest.raises(OutputExists, match="another run is writing"):
        kvprune.refresh(pruned_half)
    with alone(tmp_path), pytest.raises(OutputExists, match="another run is writing"):
        kvprune.export(stock, gguf=tmp_path / "m.gguf")


def together(work, folders, out):
    """In a process of its own; exit code 2 for a KVPruneError."""
    torch.set_num_threads(1)
    try:
        work(*folders)(out, **({"resume": True} if out.exists() else {}))
    except KVPruneError:
        os._exit(2)


@pytest.mark.parametrize("works", [(pruning, pruning), (pruning, recovering), (recovering, recovering)])
def test_two_runs_at_once(works, checkpoint, pruned_half, stock, texts, tmp_path):
    """One of them at least ends, the other says that it cannot, and what is there is what one would have made."""
    folders, out = (checkpoint, pruned_half, stock), tmp_path / "out"
    expected = []
    for number, work in enumerate(works):
        whole = tmp_path / f"whole-{number}"
        work(*folders)(whole)
        expected.append(result(whole))
    moments = random.Random(str(works))
    for _ in range(6):
        both = [processes().Process(target=together, args=(work, folders, out)) for work in works]
        for process in both:
            process.start()
            time.sleep(moments.uniform(0, 0.3))
        for process in both:
            process.join()
        codes = [process.exitcode for process in both]
        assert set(codes) <= {0, 2}
        assert codes.count(0) == 1
        assert result(out) == expected[codes.index(0)]
        shutil.rmtree(out)


def test_load_while_it_is_refreshed(copied, pruned_half):
    folder, expected = copied(pruned_half), load_file(pruned_half / "model.safetensors")
    for _ in range(5):
        (folder / "modeling.py").write_bytes(b"# old\n")
        process = processes().Process(target=kvprune.refresh, args=(folder,))
        process.start()
        while process.is_alive():
            found = kvprune.load(folder).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        process.join()
        assert process.exitcode == 0


@pytest.mark.parametrize("work", [pruning, recovering, studying])
def test_a_clock_that_jumps(work, checkpoint, pruned_half, stock, texts, tmp_path, monkeypatch):
    """By years, both ways, at every look: nothing that is written depends on it."""
    run = work(checkpoint, pruned_half, stock)
    run(tmp_path / "whole")
    real, jumps = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-20, 20) * 365 * 86400)
    run(tmp_path / "out")
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    seconds = kvprune.read_record(tmp_path / "out")["seconds"].values() if work is not studying else [0.0]
    assert all(0 <= one < 600 for one in seconds)
