"""Fixtures: a tiny checkpoint on disk, texts for it, and hypothesis settings without deadlines."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

from tiny import tiny_model, tiny_tokenizer, words

hypothesis.settings.register_profile("kvprune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("kvprune")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny Llama (4 layers, 2 KV heads, 2 groups, head_dim 32) and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    tiny_model("llama", groups=2, head_dim=32, layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """$KVPRUNE_DATA with the splits of wikitext2 and ptb, of random words."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed, name in enumerate(("wikitext2-valid", "wikitext2-test", "ptb-valid", "ptb-test")):
        (folder / f"{name}.txt").write_text(words(20000, seed))
    monkeypatch.setenv("KVPRUNE_DATA", str(folder))
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
