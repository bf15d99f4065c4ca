"""The whole way on a GPU, where there is one: pruned whole and block by block, recovered, judged, timed."""

import json

import pytest
import torch

import kvprune
from kvprune.channels import room
from tiny import COARSE, tensors_of, too_large_as_a_whole

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PRUNE = {**COARSE, "ratio": 0.5, "windows": (64,), "dtype": "float32"}


def perplexity_of(folder):
    return json.loads((folder / "kvprune.json").read_text())["perplexity"]


@pytest.mark.parametrize("options", [{}, {"importance": "taylor", "channels": "joint"}, {"drop_blocks": 1}], ids=str)
def test_whole_streamed_and_on_the_cpu(options, checkpoint, texts, tmp_path, monkeypatch):
    for device in ("cpu", "cuda"):
        kvprune.prune(checkpoint, tmp_path / device, **PRUNE | options | {"device": device})
    monkeypatch.setattr(room, "needs_of", too_large_as_a_whole(room.needs_of))
    kvprune.prune(checkpoint, tmp_path / "streamed", **PRUNE | options | {"device": "cuda"})
    for host, other in zip(perplexity_of(tmp_path / "cpu"), perplexity_of(tmp_path / "cuda"), strict=True):
        assert host["dense"] == pytest.approx(other["dense"], rel=1e-4)
        assert host["pruned"] == pytest.approx(other["pruned"], rel=2e-2)
    whole, streamed = tensors_of(tmp_path / "cuda"), tensors_of(tmp_path / "streamed")
    assert whole.keys() == streamed.keys()
    for name, tensor in whole.items():  # to the last bit on a CPU; a GPU's products depend on where numbers stand
        torch.testing.assert_close(streamed[name], tensor, rtol=0, atol=1e-5)
    plans = [(tmp_path / name / "plan.json").read_text() for name in ("cuda", "streamed")]
    assert plans[0].split('"layers": [')[-1] == plans[1].split('"layers": [')[-1]
    for one, other in zip(perplexity_of(tmp_path / "cuda"), perplexity_of(tmp_path / "streamed"), strict=True):
        assert one["pruned"] == pytest.approx(other["pruned"], rel=1e-4)


def test_what_one_does_with_a_folder(checkpoint, pruned_half, texts, tmp_path, command):
    out = tmp_path / "recovered"
    training = ["--text", "wikitext2", "--window", 64, "--steps", 4, "--batch", 4]
    code, _, err = command("recover", pruned_half, "--out", out, "--device", "cuda", *training)
    assert code == 0, err
    for words in (
        ["eval", checkpoint, "--against", out, "--text", "ptb", "--window", 64, "--tokens", 512],
        ["bench", checkpoint, "--against", out, "--context", 32, "--new-tokens", 4, "--rounds", 1],
        ["bench", checkpoint, "--skip", 0.25, "--context", 32, "--new-tokens", 4, "--rounds", 1],
        ["generate", out, "the cat", "--skip", 0.25, "--max-new-tokens", 8],
        ["doctor", out],
    ):
        code, found, err = command(*words, "--device", "cuda", "--json")
        assert code == 0, (words, err)
        assert isinstance(json.loads(found), dict)
