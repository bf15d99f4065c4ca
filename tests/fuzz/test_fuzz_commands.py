"""Commands that write, with damaged input: exit code 0 and something whole, or 2, one line, and nothing written."""

import contextlib
import io
import json
import logging
import shutil
import sys
from unittest.mock import patch

import pytest
from fuzzing import fuzz
from mutations import damaged_bytes, damaged_json
from test_fuzz_json import BENCH, but
from test_fuzz_models import EXAMPLES

import kvprune
from kvprune import cli
from kvprune.errors import KVPruneError

FEW = ("--calibration-tokens", 512, "--eval-tokens", 128, "--window", 64, "--device", "cpu")
QUICK = (*FEW, "--repair-tokens", 1024, "--align", 2, "--min-width", 4)
TRAIN = ("--steps", 2, "--window", 256, "--batch", 2, "--rank", 2, "--warmup", 1, "--held-out", 64, "--device", "cpu")
TRAIN += ("--eval", "ptb", "--eval-tokens", 128, "--eval-window", 64, "--loss", "next-token")


class Refused(KVPruneError):
    """Exit code 2."""


def run(*arguments):
    """The command line's main. Raises Refused, and whatever would be a traceback."""
    said = io.StringIO()
    with patch.object(sys, "argv", ["kvprune", *map(str, arguments)]), contextlib.redirect_stdout(io.StringIO()):
        try:
            with contextlib.redirect_stderr(said):
                cli.main()
        except SystemExit as stop:
            code = stop.code
    if code:
        last = said.getvalue().splitlines()[-1]
        assert (code, last[:9]) == (2, "kvprune: ")
        raise Refused(last)


def contents(folder):
    """Of every file of a folder; None where there is none."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.exists() else None


@pytest.fixture(autouse=True)
def quiet(monkeypatch, written_texts):
    monkeypatch.setenv("KVPRUNE_DATA", str(written_texts))
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def writes(folder, *arguments):
    """Run a command that writes a model to `folder`."""
    try:
        run(*arguments, "--out", folder)
        kvprune.load(folder)
        shutil.rmtree(folder)
    except Refused:
        assert contents(folder) is None
        raise


def test_prune_by_a_plan(checkpoint, pruned_half, tmp_path):
    path = tmp_path / "plan.json"
    valid = (pruned_half / "plan.json").read_bytes()
    plain = json.loads(valid)

    def check(content):
        path.write_bytes(content)
        writes(tmp_path / "out", "prune", checkpoint, "--plan", path, *FEW)

    faults = [but(plain, "method", "repair_tokens", "x"), but(plain, "method", {}), but(plain, "ratio", float("nan"))]
    faults += [but(plain, "layout", "x"), but(plain, "method", "importance", [1]), but(plain, "method", "repair", 3)]
    fuzz("prune --plan", check, valid, damaged_json(plain), faults, share=10)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_prune_of_a_damaged_model(name, copied, checkpoint, tmp_path):
    folder = copied(checkpoint)
    valid = (folder / name).read_bytes()

    def check(content):
        (folder / name).write_bytes(content)
        writes(tmp_path / "out", "prune", folder, *QUICK)

    damaged = damaged_json(json.loads(valid)) if name.endswith(".json") else damaged_bytes(valid)
    fuzz(f"prune, {name}", check, valid, damaged, share=40)


@pytest.mark.parametrize("name", ["list.json", "kvprune.json"])
def test_recover(name, copied, pruned_half, tmp_path):
    folder, text = copied(pruned_half), tmp_path / "list.json"
    text.write_text(json.dumps(EXAMPLES))
    path = text if name == "list.json" else folder / name
    valid = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        writes(tmp_path / "out", "recover", folder, "--text", text, *TRAIN)

    fuzz(f"recover, {name}", check, valid, damaged_json(json.loads(valid)), share=40)


@pytest.mark.parametrize(
    "name", ["config.json", "kvprune.json", "plan.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_export(name, copied, stock, tmp_path):
    folder, file = copied(stock), tmp_path / "model.gguf"
    valid = (folder / name).read_bytes()

    def check(content):
        (folder / name).write_bytes(content)
        try:
            run("export", folder, "--gguf", file)
            assert [*tmp_path.iterdir()] == [file]
            file.unlink()
        except Refused:
            assert not list(tmp_path.iterdir())
            raise

    damaged = damaged_json(json.loads(valid)) if name.endswith(".json") else damaged_bytes(valid)
    fuzz(f"export, {name}", check, valid, damaged, share=40)


@pytest.mark.parametrize("command", ["show", "refresh", "doctor", "report"])
@pytest.mark.parametrize("name", ["kvprune.json", "config.json"])
def test_commands_that_read(command, name, copied, pruned_half):
    folder = copied(pruned_half)
    valid = (folder / name).read_bytes()

    def check(content):
        (folder / name).write_bytes(content)
        before = contents(folder)
        more = {"report": ("--bench", BENCH), "doctor": ("--no-check",)}.get(command, ())
        try:
            run(command, folder, *more)
        except Refused:
            assert contents(folder) == before
            raise

    share = 200 if command == "report" else 20
    fuzz(f"{command}, {name}", check, valid, damaged_json(json.loads(valid)), share=share)
