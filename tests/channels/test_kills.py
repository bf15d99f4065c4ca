"""kill -9 at random moments, again and again: what is on the disk never loads half-written, and --resume makes the very
same folder in the end. `KVPRUNE_KILLS=200` asks for more of them."""

import json
import multiprocessing
import os
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

import kvprune
from kvprune import errors
from kvprune.channels import room
from tiny import COARSE

KILLS = int(os.environ.get("KVPRUNE_KILLS", "12"))
OPTIONS = COARSE | {"ratio": 0.5, "allocation": "budget"}


def work(source, out, streamed):
    """In a process of its own."""
    torch.set_num_threads(1)
    if streamed:
        needs = room._needs
        room._needs = lambda *a, streamed: needs(*a, streamed=True) if streamed else {"weights": 2**62}
    kvprune.prune(source, out, resume=os.path.exists(out), **OPTIONS)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")  # imports once, and forks
    context.set_forkserver_preload(["kvprune.channels.prune", "transformers.models.llama.modeling_llama"])
    return context


def is_whole(out):
    """Whether the folder loads; if not, it must say that it is unfinished."""
    if (out / "config.json").exists():
        kvprune.load(out)
        return True
    with pytest.raises(errors.UnknownSource, match=r"unfinished|there is no folder|no config\.json"):
        kvprune.load(out)
    return False


@pytest.mark.parametrize("streamed", [False, True])
def test_any_number_of_kills_end_in_the_same_folder(streamed, processes, checkpoint, texts, tmp_path):
    moments = random.Random(int(streamed))
    imports = processes.Process(target=int)
    imports.start()
    imports.join()
    start = time.monotonic()
    first = processes.Process(target=work, args=(checkpoint, tmp_path / "whole", streamed))
    first.start()
    first.join()
    assert first.exitcode == 0
    takes, kills, whole = time.monotonic() - start, 0, 0
    out = tmp_path / "out"
    while kills < KILLS or not is_whole(out):
        if is_whole(out):
            whole += 1
            assert_same(tmp_path / "whole", out)
            shutil.rmtree(out)
        process = processes.Process(target=work, args=(checkpoint, out, streamed))
        process.start()
        if kills < KILLS:
            process.join(moments.uniform(0, takes))
            kills += process.exitcode is None
            process.kill()
        process.join()
        assert process.exitcode in (0, -9)
    assert_same(tmp_path / "whole", out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def assert_same(one, other):
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (one, other)]
    assert plans[0] == plans[1]
