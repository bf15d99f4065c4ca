"""Every kind of source loads, and what cannot be read is said in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import errors
from kvprune.models.attention import rope_pairs
from kvprune.models.stream import BlockRunner
from kvprune.models.view import ModelView
from tiny import tiny_model


def test_folder(checkpoint):
    ids = torch.randint(3, 300, (1, 7))
    assert torch.equal(
        kvprune.load(checkpoint)(ids).logits, AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits
    )
    assert kvprune.load(checkpoint, dtype="bfloat16").dtype == torch.bfloat16
    assert kvprune.load_tokenizer(checkpoint)("the cat")["input_ids"]


def bad_sources(tmp_path, checkpoint):
    """name -> (source, error)"""
    empty = tmp_path / "empty"
    empty.mkdir()
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    shutil.copy(checkpoint / "config.json", pickle)
    torch.save({}, pickle / "pytorch_model.bin")
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    no_weights = tmp_path / "no-weights"
    no_weights.mkdir()
    shutil.copy(checkpoint / "config.json", no_weights)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"not a gguf")
    return {
        "missing folder": (tmp_path / "nosuch", errors.UnknownSource),
        "missing gguf": (tmp_path / "nosuch.gguf", errors.UnknownSource),
        "empty": (empty, errors.UnknownSource),
        "pickle": (pickle, errors.UnsafeWeights),
        "cut": (cut, errors.BrokenCheckpoint),
        "no weights": (no_weights, errors.BrokenCheckpoint),
        "text file": (text, errors.UnknownSource),
        "fake gguf": (fake, errors.BrokenCheckpoint),
        "hub, offline": ("nobody/nothing", errors.UnknownSource),
    }


KINDS = [
    "missing folder",
    "missing gguf",
    "empty",
    "pickle",
    "cut",
    "no weights",
    "text file",
    "fake gguf",
    "hub, offline",
]


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_sources(tmp_path, checkpoint, kind):
    source, error = bad_sources(tmp_path, checkpoint)[kind]
    with pytest.raises(error) as caught:
        kvprune.load(source)
    assert "\n" not in str(caught.value)


def rewritten(checkpoint, target, change):
    """A copy of the checkpoint with its tensors changed."""
    shutil.copytree(checkpoint, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_and_misshapen_tensors_are_named(tmp_path, checkpoint):
    name = "model.layers.1.self_attn.q_proj.weight"
    missing = rewritten(checkpoint, tmp_path / "missing", lambda t: t.pop(name))
    with pytest.raises(errors.BrokenCheckpoint, match=name):
        kvprune.load(missing)
    misshapen = rewritten(checkpoint, tmp_path / "misshapen", lambda t: t.update({name: t[name][:5].contiguous()}))
    with pytest.raises(errors.BrokenCheckpoint, match="wrong shape"):
        kvprune.load(misshapen)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "nosuch"}, errors.UnsupportedArchitecture, "supported are: apertus"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, errors.BadOption, "give the unquantised model"),
    ],
)
def test_what_the_config_already_rules_out(tmp_path, checkpoint, change, error, message):
    shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | change))
    for use in (kvprune.load, kvprune.evaluate, kvprune.bench, lambda source: kvprune.generate(source, "the cat")):
        with pytest.raises(error, match=message) as caught:
            use(tmp_path / "copy")
        assert "cut" not in str(caught.value)  # which only prune does


def test_view_is_live_and_right_side_up():
    model = tiny_model("qwen2", kv_heads=2, groups=3, head_dim=8)
    weights = ModelView(model).attention[1].weights()
    linear = model.model.layers[1].self_attn
    assert torch.equal(weights.q[1, 2, 5], linear.q_proj.weight[(1 * 3 + 2) * 8 + 5])
    assert torch.equal(weights.q_bias[1, 2, 5], linear.q_proj.bias[(1 * 3 + 2) * 8 + 5])
    assert torch.equal(weights.k[1, 5], linear.k_proj.weight[8 + 5])
    assert torch.equal(weights.o[1, 2, 5], linear.o_proj.weight[:, (1 * 3 + 2) * 8 + 5])
    with torch.no_grad():
        weights.o[1, 2, 5] = 7
    assert (linear.o_proj.weight[:, (1 * 3 + 2) * 8 + 5] == 7).all()


def test_units_are_rope_pairs():
    assert rope_pairs(8).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding"])
@torch.no_grad()
def test_a_rerun_from_any_block_gives_the_model_output(family):
    model = tiny_model(family, layers=3)
    ids = torch.randint(3, 300, (2, 12))
    runner = BlockRunner(ModelView(model), ids)
    expected = model.model(ids).last_hidden_state
    assert torch.equal(runner.output, expected)
    for start in range(3):
        assert torch.equal(runner.rerun(start), expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model."])
def test_weights_saved_from_a_wrapper_are_named(checkpoint, tmp_path, prefix):
    """As a compiled or a peft model is saved."""
    folder = tmp_path / "wrapped"
    shutil.copytree(checkpoint, folder)
    weights = {prefix + name: w for name, w in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(errors.BrokenCheckpoint, match=rf"has {prefix}.* saved from a model that wraps another"):
        kvprune.load(folder)


def test_what_is_no_hub_id_is_one_line():
    for use in (kvprune.load, kvprune.evaluate):
        with pytest.raises(errors.UnknownSource, match="foo bar"):
            use("foo bar")
