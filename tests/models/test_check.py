"""What of a checkpoint is refused, or not needed, before anything large is read."""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import errors
from kvprune.errors import BrokenCheckpoint
from kvprune.models.check import MOST, check_settings
from tiny import QUICK


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A folder with nothing but a LoRA adapter for the checkpoint, that changes what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def beside(checkpoint, adapter, tmp_path):
    """The checkpoint and the adapter in one folder."""
    folder = tmp_path / "beside"
    shutil.copytree(checkpoint, folder)
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, folder)
    return folder


@torch.no_grad()
def test_an_adapter_is_refused_and_merged_as_told_it_loads(checkpoint, adapter, beside, tmp_path):
    ids = torch.randint(3, 300, (1, 7))
    for folder in (adapter, beside):
        for use in (kvprune.load, lambda source: kvprune.prune(source, tmp_path / "out", **QUICK)):
            with pytest.raises(errors.BadOption, match=r"merge_and_unload\(\).save_pretrained") as caught:
                use(folder)
            assert "\n" not in str(caught.value)
            assert str(folder) in str(caught.value)
        merged = tmp_path / f"merged-{folder.name}"
        AutoPeftModelForCausalLM.from_pretrained(str(folder)).merge_and_unload().save_pretrained(merged)
        expected = AutoModelForCausalLM.from_pretrained(beside)(ids).logits
        assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits, atol=1e-3)
        torch.testing.assert_close(kvprune.load(merged)(ids).logits, expected, rtol=0, atol=1e-5)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_the_hub_is_refused(adapter, tmp_path, monkeypatch):
    """As the hub's cache has it, offline."""
    snapshot = tmp_path / "models--some--adapter" / "snapshots" / ("0" * 40)
    shutil.copytree(adapter, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(errors.BadOption, match="some/adapter has an adapter"):
        kvprune.load("some/adapter")


def test_arithmetic_needs_no_weights(checkpoint, beside, tmp_path):
    """A folder with nothing but config.json is enough for fit and for random weights of its shape, and for no other."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    options = {"memory": "1MB", "context": 64}
    expected = kvprune.fit(checkpoint, **options)
    for folder in (bare, beside):
        assert kvprune.fit(folder, **options) == expected | {"source": str(folder)}
    cell = {"batch": 1, "context": 8, "new_tokens": 1, "rounds": 1, "device": "cpu", "dtype": "float32"}
    (found,) = kvprune.bench(bare, pruned_shape=True, ratio=0.25, **cell)["cells"]
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters()) * 4
    assert found["memory_bytes"]["dense"]["weights"] == weights
    for use in (
        kvprune.load,
        kvprune.evaluate,
        lambda source: kvprune.bench(source, **cell),
        lambda source: kvprune.generate(source, "the"),
        lambda source: kvprune.prune(source, tmp_path / "out", **QUICK),
        kvprune.study_layers,
    ):
        with pytest.raises(errors.BrokenCheckpoint, match=r"no \.safetensors"):
            use(bare)


def test_arithmetic_still_refuses_what_it_would_count_wrong(checkpoint, tmp_path):
    """Quantised weights have other bytes; a folder without a config says nothing."""
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(errors.BadOption, match="unquantised"):
        kvprune.fit(tmp_path, memory="1MB", context=64)
    (tmp_path / "config.json").unlink()
    with pytest.raises(errors.UnknownSource, match=r"config\.json"):
        kvprune.fit(tmp_path, memory="1MB", context=64)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_key_value_heads", "head_dim", "num_experts"])
def test_what_a_model_has_of_each_can_be_counted(name):
    """A model is made of them before any weight is read; matrices may be as large as they like."""
    large = {
        "model_type": "llama",
        "shared_expert_intermediate_size": 20480,
        "hidden_size": 10**6,
        "layer_norm_eps": 1e9,
    }
    assert check_settings("m", large | {name: MOST})
    for value in (MOST + 1, 10**30, float("nan")):
        with pytest.raises(BrokenCheckpoint, match=f"{name} is"):
            check_settings("m", large | {name: value})
        with pytest.raises(BrokenCheckpoint, match=f"{name} is"):
            check_settings("m", {"text_config": {name: value}})
