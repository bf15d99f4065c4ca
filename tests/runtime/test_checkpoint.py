"""A save is whole or not there; what was damaged later is refused by name."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import errors
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime import checkpoint
from kvprune.runtime.files import verify_files
from tiny import make_plan, merged_plan, random_bases, random_layers, tiny_model, tiny_tokenizer


@pytest.fixture
def parts():
    dense = tiny_model("llama")
    plan = make_plan(dense, random_layers(dense, (8, 12)))
    return cut(ModelView(dense), plan), tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths}


def test_everything_is_there(parts, tmp_path):
    checkpoint.save(*parts, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    expected = {
        "README.md",
        "config.json",
        "generation_config.json",
        "kvprune.json",
        "model.safetensors",
        "modeling.py",
        "plan.json",
    }
    assert expected | {"tokenizer.json", "tokenizer_config.json"} <= names
    assert set(json.loads((tmp_path / "kvprune.json").read_text())["files"]) == names - {"kvprune.json", "README.md"}
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


def damage(path, how):
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "longer":
        path.write_bytes(data + b"x" * 8)
    else:
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


DAMAGE = [
    *[(name, how) for name in ("model.safetensors", "plan.json", "config.json") for how in ("cut", "gone", "longer")],
    *[("plan.json", "flip"), ("config.json", "flip"), ("tokenizer.json", "cut"), ("generation_config.json", "cut")],
    ("kvprune.json", "cut"),
]


@pytest.mark.parametrize(("name", "how"), DAMAGE)
def test_damage_is_named(parts, tmp_path, name, how):
    checkpoint.save(*parts, tmp_path)
    damage(tmp_path / name, how)
    with pytest.raises(errors.KVPruneError) as error:
        kvprune.load(tmp_path)
    assert "\n" not in str(error.value)
    assert how == "gone" or name in str(error.value)


@pytest.mark.parametrize("name", ["shard", "model.safetensors.index.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damage_of_shards_is_named(parts, tmp_path, monkeypatch, name, how):
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    checkpoint.save(*parts, tmp_path)
    damage(sorted(tmp_path.glob("model-*"))[1] if name == "shard" else tmp_path / name, how)
    with pytest.raises(errors.BrokenCheckpoint):
        kvprune.load(tmp_path)


def test_a_tensor_of_another_name_or_shape_is_damage(parts, tmp_path):
    for change in ("name", "shape"):
        checkpoint.save(*parts, tmp_path / change)
        path = tmp_path / change / "model.safetensors"
        tensors = load_file(path)
        tensor = tensors.pop("model.norm.weight")
        tensors |= {"model.norm.other": tensor} if change == "name" else {"model.norm.weight": tensor[:-1].clone()}
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(errors.BrokenCheckpoint):
            kvprune.load(tmp_path / change)


@pytest.mark.parametrize("change", ["none", "gone", "shape", "config"])
def test_a_folder_of_merged_heads_is_checked_too(tmp_path, change):
    """The matrices behind Q and before O are weights as all others."""
    dense = tiny_model("llama", kv_heads=4, groups=2)
    bases = random_bases(dense, 2)
    plan = merged_plan(dense, bases, (12, 28))
    pruned = cut(ModelView(dense), plan, bases)
    checkpoint.save(pruned, tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths}, tmp_path)
    if change == "none":
        ids = torch.arange(3, 12)[None]
        assert torch.equal(kvprune.load(tmp_path, device="cpu")(ids).logits, pruned(ids).logits)
        return
    path = tmp_path / ("config.json" if change == "config" else "model.safetensors")
    if change == "config":
        path.write_text(path.read_text().replace('"factored": true', '"factored": false'))
    else:
        tensors, name = load_file(path), "model.layers.1.self_attn.q_mix.weight"
        tensor = tensors.pop(name)
        save_file(tensors if change == "gone" else tensors | {name: tensor[:2].clone()}, path, {"format": "pt"})
    with pytest.raises(errors.BrokenCheckpoint, match="q_mix" if change == "gone" else "shape"):
        kvprune.load(tmp_path)


def test_what_people_edit_is_not_checked(parts, tmp_path, caplog):
    checkpoint.save(*parts, tmp_path)
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**settings, "a_note": "edited"}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "modeling.py").write_text((tmp_path / "modeling.py").read_text() + "# edited\n")
    kvprune.load(tmp_path)
    assert kvprune.load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    assert not [record for record in caplog.records if record.name == "kvprune"]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("how", ["trained", "flipped bit"])
def test_other_weights_load_with_a_note(parts, tmp_path, monkeypatch, caplog, how, shards):
    """Trained further and saved over the folder as transformers does it, or a bit that flipped: nobody can tell."""
    if shards:
        monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    checkpoint.save(*parts, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    if how == "trained":
        with torch.no_grad():
            model.lm_head.weight *= 1.5
        model.save_pretrained(tmp_path)
    else:
        damage(sorted(tmp_path.glob("*.safetensors"))[-1], "flip")
    for _ in range(2):
        loaded = kvprune.load(tmp_path)
    (note,) = [record.message for record in caplog.records if record.name == "kvprune"]
    assert str(tmp_path) in note
    assert "copy the folder again" in note
    assert "\n" not in note
    if how == "trained":
        ids = torch.arange(3, 12)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits)
