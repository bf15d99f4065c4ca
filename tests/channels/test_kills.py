"""kill -9 at random moments, again and again: what is on the disk never loads half-written, and --resume makes the very
same folder in the end."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import kvprune
from killing import disturb, kills, seconds
from kvprune import errors
from kvprune.channels import room
from tiny import COARSE

OPTIONS = COARSE | {"ratio": 0.5, "allocation": "budget"}


def work(source, out, streamed):
    """In a process of its own."""
    torch.set_num_threads(1)
    if streamed:
        needs = room._needs
        room._needs = lambda *a, streamed: needs(*a, streamed=True) if streamed else {"weights": 2**62}
    kvprune.prune(source, out, resume=os.path.exists(out), **OPTIONS)


def is_whole(out):
    """Whether the folder loads; if not, it must say that it is unfinished."""
    if (out / "config.json").exists():
        kvprune.load(out)
        return True
    with pytest.raises(errors.UnknownSource, match=r"unfinished|there is no folder|no config\.json"):
        kvprune.load(out)
    return False


@pytest.mark.parametrize("streamed", [False, True])
def test_any_number_of_kills_end_in_the_same_folder(streamed, checkpoint, texts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    takes = seconds(work, checkpoint, whole, streamed)
    for ended in disturb(f"prune, streamed={streamed}", kills(12), takes, work, checkpoint, out, streamed):
        assert is_whole(out) or not ended
        if is_whole(out):
            assert_same(whole, out)
            shutil.rmtree(out)


def assert_same(one, other):
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (one, other)]
    assert plans[0] == plans[1]
    # A run that was killed when all was in place leaves what it would have tidied up, and nothing reads
    names = [{p.name for p in folder.iterdir()} - {".resume", ".dense", ".partial"} for folder in (one, other)]
    assert names[0] == names[1]
