"""What docs/security.md says: what is run, what is read, and what is found out."""

import ast
import builtins
import json
import pickle
import shutil
from pathlib import Path

import pytest

import kvprune
from kvprune.errors import BrokenCheckpoint, UnknownSource, UnsafeWeights
from kvprune.models.source import resolve

SOURCES = Path(kvprune.__file__).parent


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("/tmp") / "never",))


@pytest.fixture
def folder(pruned_half, tmp_path):
    return shutil.copytree(pruned_half, tmp_path / "half")


@pytest.fixture
def mark(tmp_path):
    """A file that appears where code was run, and that code."""
    return tmp_path / "ran", f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"


def test_no_source_file_unpickles_or_evaluates():
    """The calls by which data becomes code, wherever they stand in the package."""
    names = {"eval", "exec", "compile", "__import__", "system", "popen", "unsafe_load"}
    modules = {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess"}
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in names, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("os", "system"), ("np", "load")}, path
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not modules & {name.partition(".")[0] for name in imported}, path


@pytest.mark.parametrize("trust", [False, True])
def test_a_folders_own_code_is_not_run(trust, folder, mark):
    """Not even with trust_remote_code: kvprune's own is."""
    ran, code = mark
    (folder / "modeling.py").write_text("VERSION = 6\n" + code)
    kvprune.load(folder, trust_remote_code=trust)
    assert not ran.exists()


def test_code_of_a_tokenizer_is_run_where_it_is_trusted_alone(folder, mark, monkeypatch):
    """And nobody is asked: transformers would, and a pipe may say yes."""
    ran, code = mark
    (folder / "own.py").write_text(code + "from transformers import PreTrainedTokenizerFast as Own\n")
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    with pytest.raises(UnknownSource, match="--trust-remote-code"):
        kvprune.load_tokenizer(folder)
    assert not ran.exists()


def test_code_of_a_model_is_not_run(checkpoint, tmp_path, mark):
    """Of a known family without trust; of one that has no descriptor with trust neither."""
    ran, code = mark
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    (folder / "own.py").write_text(code)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    kvprune.load(folder)
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "own"}))
    for trust in (False, True):
        with pytest.raises(kvprune.errors.UnsupportedArchitecture):
            kvprune.load(folder, trust_remote_code=trust)
    assert not ran.exists()


def test_pickle_is_not_read(checkpoint, tmp_path):
    """Weights of that kind alone are refused; beside safetensors they are left alone."""
    folder, never = shutil.copytree(checkpoint, tmp_path / "dense"), Path("/tmp") / "never"
    never.unlink(missing_ok=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    kvprune.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeWeights, match="can run code"):
        kvprune.load(folder)
    assert not never.exists()


def test_every_file_has_a_checksum(pruned_half):
    """But the record that has them, and the model card, which people edit and nobody loads from."""
    record = kvprune.read_record(pruned_half)
    assert {*record["files"], "kvprune.json", "README.md"} == {path.name for path in pruned_half.iterdir()}


def test_what_is_loaded_and_was_changed_is_found_out(folder):
    """The plan is refused, weights are noted; doctor names every file that is not as it was written."""
    assert kvprune.doctor(folder, device="cpu")["checks"]["changed_files"] == []
    for name in ("config.json", "generation_config.json", "tokenizer.json", "modeling.py"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"\n")
        assert kvprune.doctor(folder, device="cpu")["checks"]["changed_files"] == [name]
        (folder / name).write_bytes(content)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    checks = kvprune.doctor(folder, device="cpu")["checks"]
    assert (checks["weights"], checks["changed_files"]) == ("changed", ["model.safetensors"])
    (folder / "plan.json").write_bytes((folder / "plan.json").read_bytes() + b"\n")
    with pytest.raises(BrokenCheckpoint, match="not what was saved"):
        kvprune.load(folder)


def test_no_file_outside_of_the_folder_is_read(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    names = {"model.norm.weight": "../model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(BrokenCheckpoint):
        resolve(folder)


def test_a_report_runs_nothing(folder):
    """Names and texts of a record are words on the page."""
    record = json.loads((folder / "kvprune.json").read_text())
    record["source"] = record["method"]["importance"] = "<script>alert(1)</script>"
    (folder / "kvprune.json").write_text(json.dumps(record))
    page = kvprune.report(folder).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
