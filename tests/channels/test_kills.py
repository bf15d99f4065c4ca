"""kill -9 at random moments, again and again: what is on the disk never loads half-written, and --resume makes the very
same folder in the end."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import kvprune
from ggufs import write_gguf
from killing import disturb, kills, seconds
from kvprune import errors
from kvprune.channels import room
from tiny import COARSE, tiny_model

OPTIONS = COARSE | {"ratio": 0.5, "allocation": "budget"}


def work(source, out, streamed):
    """In a process of its own; a .gguf file has its tokenizer's folder beside it."""
    torch.set_num_threads(1)
    if streamed:
        needs = room.needs_of
        room.needs_of = lambda *a, streamed: needs(*a, streamed=True) if streamed else {"weights": 2**62}
    given = {"tokenizer": kvprune.load_tokenizer(source.with_suffix(""))} if source.suffix == ".gguf" else {}
    kvprune.prune(source, out, resume=os.path.exists(out), **given, **OPTIONS)


def is_whole(out):
    """Whether the folder loads; if not, it must say that it is unfinished."""
    if (out / "config.json").exists():
        kvprune.load(out)
        return True
    with pytest.raises(errors.UnknownSource, match=r"unfinished|there is no folder|no config\.json"):
        kvprune.load(out)
    return False


@pytest.mark.parametrize("kind", ["whole", "streamed", "a streamed .gguf file"])
def test_any_number_of_kills_end_in_the_same_folder(kind, checkpoint, texts, tmp_path):
    whole, out, source, streamed = tmp_path / "whole", tmp_path / "out", checkpoint, kind != "whole"
    if "gguf" in kind:
        model = tiny_model("llama", groups=2, head_dim=32, layers=4, hidden=64)
        source = write_gguf(model, tmp_path / "tiny.gguf", kind="Q8_0")
        shutil.copytree(checkpoint, tmp_path / "tiny")
    takes = seconds(work, source, whole, streamed)
    for ended in disturb(f"prune, {kind}", kills(12), takes, work, source, out, streamed):
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
