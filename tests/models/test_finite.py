"""Whoever meets NaN or infinity says where it comes from."""

import pytest
import torch

import kvprune
from kvprune.errors import NotFinite
from kvprune.models.finite import not_finite
from tiny import tiny_model, tiny_tokenizer

NAME = "model.layers.1.mlp.down_proj.weight"


def said(model, dtype=torch.float32):
    return str(not_finite("the loss", model.to(dtype)))


def test_a_weight_is_named_and_another_dtype_only_advised_where_it_helps():
    model = tiny_model("llama")
    overflowing = said(model)
    assert "activations overflow" in overflowing
    assert "--dtype" not in overflowing
    assert "not finite in bfloat16; try --dtype float32" in said(model, torch.bfloat16)
    model = tiny_model("llama")
    model.get_parameter(NAME).data[0, 0] = 1e5  # float16 ends at 65504
    assert f"{NAME} is too large for float16; try --dtype float32" in said(model, torch.float16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny_model("llama")
        model.get_parameter(NAME).data[0, 0] = float("nan")
        assert f"{NAME} holds NaN or infinity; fetch or make the checkpoint again" in said(model, dtype)
        assert "--dtype" not in said(model, dtype)


@pytest.mark.parametrize("use", ["evaluate", "study_layers"])
def test_a_checkpoint_with_nan_is_told_by_name(texts, tmp_path, use):
    model = tiny_model("llama", layers=3)
    model.get_parameter(NAME).data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    if use == "evaluate":
        (message,) = kvprune.evaluate(tmp_path / "nan", window_lengths=(32,), tokens=64)["errors"]
    else:
        with pytest.raises(NotFinite, match="layer ") as caught:
            kvprune.study_layers(tmp_path / "nan", tokens=128, window=128)
        message = str(caught.value)
    assert NAME in message
    assert "--dtype" not in message
