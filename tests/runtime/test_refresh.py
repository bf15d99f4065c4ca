"""Folders with an older or newer modeling.py: kvprune runs its own, says so, and puts today's in."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import kvprune
from kvprune import errors
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime import files, modeling
from kvprune.runtime.checkpoint import save
from kvprune.runtime.refresh import OWN, version_of
from tiny import VOCABULARY, make_plan, random_layers, tiny_model, tiny_tokenizer

OLD = Path(__file__).with_name("modeling_v1.txt").read_bytes()  # as kvprune wrote it before there were numbers
SECOND = OWN.read_bytes().replace(b"VERSION = %d" % modeling.VERSION, b"VERSION = 2")  # as a folder says it
NEWER = OWN.read_bytes().replace(b"VERSION = %d" % modeling.VERSION, b"VERSION = %d" % (modeling.VERSION + 1))
POISON = b'raise RuntimeError("this must not run")\n'


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(pruned, folder as it is written today)"""
    dense = tiny_model("llama", groups=2)
    plan = make_plan(dense, random_layers(dense, (8, 12)))
    pruned, folder = cut(ModelView(dense), plan), tmp_path_factory.mktemp("written") / "pruned"
    save(pruned, tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths, "layout": "per-layer"}, folder)
    return pruned, folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written[1], tmp_path / "pruned"))


def with_code(folder, code, recorded=True):
    """As kvprune wrote it then, before there were merged heads."""
    (folder / "modeling.py").write_bytes(code)
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("dense_kv_heads", None) is None
    assert not settings.pop("factored", False)
    assert not any("factored" in layer for layer in settings["per_layer_config"].values())
    (folder / "config.json").write_text(json.dumps(settings))
    record = json.loads((folder / "kvprune.json").read_text())
    if recorded:
        record["files"]["modeling.py"] = hashlib.sha256(code).hexdigest()
    (folder / "kvprune.json").write_text(json.dumps(record))
    return folder


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command line."""
    from kvprune import cli

    sys.argv = ["kvprune", *map(str, arguments)]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, *capsys.readouterr()


def test_versions(written):
    assert (version_of(OLD), version_of(OWN.read_bytes()), version_of(NEWER)) == (
        1,
        modeling.VERSION,
        modeling.VERSION + 1,
    )
    assert b"\nVERSION" not in OLD
    assert (written[1] / "modeling.py").read_bytes() == OWN.read_bytes()  # so whatever is written says its number
    assert b"\nVERSION = %d\n" % modeling.VERSION in OWN.read_bytes()


@pytest.mark.parametrize("trust", [None, True, False])
@pytest.mark.parametrize("code", [OLD, POISON], ids=["old", "poison"])
@torch.no_grad()
def test_kvprune_runs_its_own_code(written, folder, code, trust, monkeypatch, caplog):
    """By path, and by a relative path that looks like a hub id; cached decoding goes wrong with the old code."""
    pruned = written[0]
    with_code(folder, code)
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    ids = torch.randint(3, VOCABULARY, (1, 5))
    expected = pruned.generate(ids, max_new_tokens=8, do_sample=False)
    for source in (folder, name):
        assert type(AutoConfig.from_pretrained(source, trust_remote_code=trust)) is type(pruned.config)
        assert type(AutoModel.from_pretrained(source, trust_remote_code=trust)) is type(pruned.base_model)
        loaded = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust)
        ours = kvprune.load(source, device="cpu", trust_remote_code=bool(trust))
        for model in (loaded, ours):
            assert type(model) is type(pruned)
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    notes = [record.message for record in caplog.records if "refresh" in record.message]
    assert len(notes) == 1
    assert "version 1, which loses the KV cache with transformers 5.24 and newer" in notes[0]
    assert "\n" not in notes[0]


def test_no_note_for_version_2_which_is_right_for_its_own_folder(written, folder, caplog):
    with_code(folder, SECOND)
    ids = torch.randint(3, VOCABULARY, (1, 5))
    for model in (kvprune.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(model(ids).logits, written[0](ids).logits)
    assert not [record for record in caplog.records if record.name == "kvprune"]
    assert (kvprune.refresh(folder)["was"], version_of((folder / "modeling.py").read_bytes())) == (2, modeling.VERSION)


def test_code_that_a_folder_brought_before_is_replaced(folder):
    """In one process: trust_remote_code without kvprune, and then kvprune."""
    with_code(folder, OLD)
    code = """
import sys
from transformers import AutoModelForCausalLM
first = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(first).__module__.startswith("transformers_modules")
import kvprune
for _ in range(2):
    second = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(second).__module__ == "kvprune.runtime.modeling", type(second).__module__
"""
    environment = {**os.environ, "HF_HOME": str(folder.parent), "PYTHONPATH": str(OWN.parents[2])}
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kvprune refresh") == 1


@pytest.mark.parametrize("name", ["load", "auto", "refresh"])
def test_newer_code_is_refused(folder, name):
    with_code(folder, NEWER)
    calls = {
        "load": kvprune.load,
        "auto": lambda source: AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True),
        "refresh": kvprune.refresh,
    }
    with pytest.raises(errors.NewerFolder, match="upgrade kvprune") as error:
        calls[name](folder)
    assert "\n" not in str(error.value)
    assert (folder / "modeling.py").read_bytes() == NEWER


def test_refresh(folder, capsys):
    before = {p.name: p.read_bytes() for p in with_code(folder, OLD).iterdir()}
    assert run(capsys, "refresh", folder, "--json") == (
        0,
        json.dumps({"folder": str(folder), "was": 1, "is": modeling.VERSION, "changed": True, "card": False}) + "\n",
        "",
    )
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"modeling.py", "kvprune.json"}
    assert after["modeling.py"] == OWN.read_bytes()
    old, new = json.loads(before["kvprune.json"]), json.loads(after["kvprune.json"])
    old["files"]["modeling.py"] = hashlib.sha256(OWN.read_bytes()).hexdigest()
    assert old == new
    code, out, _ = run(capsys, "refresh", folder)
    assert (code, "up to date" in out) == (0, True)
    assert kvprune.refresh(folder)["changed"] is False
    (folder / "modeling.py").unlink()
    found = kvprune.refresh(folder)
    assert (found["was"], found["is"], found["changed"]) == (None, modeling.VERSION, True)


@pytest.mark.parametrize("moment", range(8))
def test_a_kill_at_any_moment_leaves_a_folder_that_loads(written, folder, monkeypatch, moment):
    """Before each step of the two writes; SIGKILL runs no handler, and neither does this."""
    with_code(folder, OLD)
    left = [moment]

    class Kill(BaseException):
        pass

    def step(real):
        def call(*arguments, **named):
            if left[0] == 0:
                raise Kill
            left[0] -= 1
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", step(os.replace))
        patch.setattr(files.os, "fsync", step(os.fsync))
        try:
            kvprune.refresh(folder)
        except Kill:
            assert moment < 6
        else:
            assert moment >= 6
    assert (folder / "modeling.py").read_bytes() in (OLD, OWN.read_bytes())
    json.loads((folder / "kvprune.json").read_text())
    ids = torch.randint(3, VOCABULARY, (1, 5))
    assert torch.equal(kvprune.load(folder, device="cpu", dtype="float32")(ids).logits, written[0](ids).logits)
    kvprune.refresh(folder)
    assert kvprune.refresh(folder)["changed"] is False


def test_a_portable_folder_has_no_code(tmp_path, capsys):
    dense = tiny_model("llama")
    plan = make_plan(dense, [([[*range(4), *range(8, 12)]] * 2, [[*range(8)]] * 2)] * 2)
    plan = plan.model_copy(update={"layout": "portable"})
    save(cut(ModelView(dense), plan), tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths}, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, out, _ = run(capsys, "refresh", tmp_path)
    assert (code, "nothing to do" in out) == (0, True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_cannot_be_refreshed(folder, checkpoint, capsys, monkeypatch):
    def read_only(*_arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "replace", read_only)
    with_code(folder, OLD)
    cases = {checkpoint: "not a folder that kvprune wrote", "some/hub-id": "no folder", folder: "writable"}
    for source, words in cases.items():
        code, out, err = run(capsys, "refresh", source)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
    assert (folder / "modeling.py").read_bytes() == OLD
    assert not list(folder.glob("*.partial"))


def test_no_note_for_a_folder_of_today(folder, caplog):
    with caplog.at_level(logging.WARNING, "kvprune"):
        kvprune.load(folder)
    assert not [record for record in caplog.records if record.name == "kvprune"]
