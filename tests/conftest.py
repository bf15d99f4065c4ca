"""Fixtures: a tiny checkpoint on disk, texts for it, the command line; how the tests run, and on what."""

import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on several threads

import hypothesis
import pytest
import torch
from transformers.utils import logging as hf_logging

import kvprune
from killing import killed
from kvprune import cli
from tiny import COARSE, tiny_model, tiny_tokenizer, words

hypothesis.settings.register_profile("kvprune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("kvprune")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Folders of tests are run by two processes, unless -n says otherwise; files, and all with -s or --pdb, by one."""
    asked = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    watched = asked.capture == "no" or asked.usepdb
    if asked.numprocesses is None and not watched and any(map(os.path.isdir, config.args)):
        asked.numprocesses, asked.dist = 2, "worksteal"


def pytest_terminal_summary(terminalreporter):
    for name, times in killed.items():
        terminalreporter.write_line(f"{name}: killed {times} times")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny Llama (4 layers, 2 KV heads, 2 groups, head_dim 32) and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    tiny_model("llama", groups=2, head_dim=32, layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def written_texts(tmp_path_factory):
    """A folder with the splits of wikitext2 and ptb, of random words."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("wikitext2-valid", "wikitext2-test", "ptb-valid", "ptb-test")):
        (folder / f"{name}.txt").write_text(words(20000, seed))
    return folder


@pytest.fixture
def texts(written_texts, tmp_path, monkeypatch):
    """$KVPRUNE_DATA with the splits of wikitext2 and ptb, the test's own."""
    folder = tmp_path / "texts"
    shutil.copytree(written_texts, folder)
    monkeypatch.setenv("KVPRUNE_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def pruned_half(checkpoint, written_texts, tmp_path_factory):
    """A folder that `prune` wrote from `checkpoint`, and is not to be changed."""
    folder = tmp_path_factory.mktemp("pruned") / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPRUNE_DATA", str(written_texts))
        kvprune.prune(checkpoint, folder, ratio=0.5, **{**COARSE, "windows": (64,)})
    return folder


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the command line's own `main`, without a new process: (exit code, stdout, stderr), all that is written
    to either."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvprune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capfd.readouterr()

    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    yield run
    hf_logging.set_verbosity(verbosity)
    if bars:
        hf_logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
