"""A save is whole or not there; what was damaged later is refused by name."""

import errno
import json
import os

import pytest

import kvprune
from kvprune import errors
from kvprune.channels.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime import checkpoint
from kvprune.runtime.files import verify_files
from tiny import make_plan, random_layers, tiny_model, tiny_tokenizer


@pytest.fixture
def parts():
    dense = tiny_model("llama")
    plan = make_plan(dense, random_layers(dense, (8, 12)))
    return cut(ModelView(dense), plan), tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths}


def test_everything_is_there(parts, tmp_path):
    checkpoint.save(*parts, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "kvprune.json",
        "model.safetensors",
        "modeling.py",
        "plan.json",
    }
    assert expected | {"tokenizer.json", "tokenizer_config.json"} <= names
    assert set(json.loads((tmp_path / "kvprune.json").read_text())["files"]) == names - {"kvprune.json"}
    verify_files(tmp_path)


def test_shards(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    checkpoint.save(*parts, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    kvprune.load(tmp_path)


@pytest.mark.parametrize("moment", range(1, 12))
def test_a_crash_at_any_move_leaves_nothing_that_loads(parts, tmp_path, monkeypatch, moment):
    real, calls = os.replace, []

    class Crash(BaseException):
        pass

    def replace(source, target):
        calls.append(target)
        if len(calls) == moment:
            raise Crash
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    try:
        checkpoint.save(*parts, tmp_path / "out")
    except Crash:
        assert not (tmp_path / "out" / "config.json").exists()
        with pytest.raises(errors.KVPruneError):
            kvprune.load(tmp_path / "out")
    else:
        assert len(calls) < moment
        kvprune.load(tmp_path / "out")


def test_a_full_disk_is_a_users_matter_and_spares_what_was_there(parts, tmp_path, monkeypatch):
    (tmp_path / "journal").write_text("precious")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(parts[1]), "save_pretrained", full)
    with pytest.raises(errors.NoSpace, match="free some space"):
        checkpoint.save(*parts, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]


def test_a_full_disk_as_tokenizers_says_it(parts, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(parts[1]), "save_pretrained", full)
    with pytest.raises(errors.NoSpace):
        checkpoint.save(*parts, tmp_path / "out")


def test_a_generation_config_is_kept_as_it_came(parts, tmp_path):
    """Many checkpoints have a temperature without do_sample; some versions of transformers refuse to write that."""
    parts[0].generation_config.temperature = 0.9
    parts[0].generation_config.top_p = 0.6
    checkpoint.save(*parts, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"], written["eos_token_id"]) == (0.9, 0.6, 2)
    assert kvprune.load(tmp_path).generation_config.temperature == 0.9


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "config.json", "kvprune.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_named(parts, tmp_path, name, damage):
    checkpoint.save(*parts, tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        broken = data[: len(data) // 2] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        path.write_bytes(broken)
    if name == "kvprune.json" and damage != "cut":
        return  # gone: an ordinary checkpoint with code; flipped: may still be valid JSON
    with pytest.raises(errors.KVPruneError) as error:
        kvprune.load(tmp_path)
    assert "\n" not in str(error.value)
    assert damage == "gone" or name in str(error.value)
