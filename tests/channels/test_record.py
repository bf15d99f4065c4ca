"""The bytes that a record has, against those of the model that was written, of its cache and of a run's tensors."""

from dataclasses import fields

import pytest
import torch

import kvprune
from kvprune.channels import record
from kvprune.channels.choice.basis import slow_channels
from kvprune.channels.evidence.importance import IMPORTANCE
from kvprune.channels.evidence.moments import attention_moments
from kvprune.channels.evidence.statistics import measure_attention
from kvprune.measure.memory import cache_bytes
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from tiny import COARSE, batches, tiny_model, tiny_tokenizer

ONE = {**COARSE, "windows": (64,), "repair_tokens": 512}


def a_token(model):
    with torch.no_grad():
        return cache_bytes(model(torch.zeros(1, 10, dtype=torch.long))[CACHE]) // 10


def read_by_a_step(model):
    embedding = model.get_input_embeddings().weight
    own = 0 if model.get_output_embeddings().weight is embedding else embedding.nbytes
    return sum(p.nbytes for p in model.parameters()) - own


@pytest.mark.parametrize(("merge", "ratio", "tied"), [(1, 0.5, False), (2, 0.5, True), (4, 0.25, False)])
def test_bytes_are_those_of_what_was_written(tmp_path, texts, merge, ratio, tied):
    """In the dtype of the files, whatever it was computed in."""
    model = tiny_model("qwen2", kv_heads=4, groups=2, layers=3, tie_word_embeddings=tied)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    kvprune.prune(tmp_path / "dense", tmp_path / "out", ratio=ratio, merge=merge, **ONE)
    found = kvprune.read_record(tmp_path / "out")
    assert (found["merge"], found["kv_heads"]) == (merge, {"dense": 4, "pruned": 4 // merge})
    assert found["head_dim"] == 16
    assert sum(found["widths"]) == pytest.approx(3 * 16 * merge * (1 - ratio))
    for name, folder in (("dense", "dense"), ("pruned", "out")):
        written = kvprune.load(tmp_path / folder, dtype="bfloat16")
        assert found["kv_bytes_per_token"][name] == a_token(written)
        assert found["weights_read_bytes"][name] == read_by_a_step(written)
        assert found["parameters"][name] == sum(p.numel() for p in written.parameters())
    bases = "bases of all layers, with moments"
    assert bases in found["memory_formula_bytes"]
    asks_all = "one layer's Q, K and V of the calibration text"
    assert (asks_all in found["memory_formula_bytes"]) == (merge == 2)
    if merge == 2:
        numbers = 512 * (8 + 4 + 4) * 16
        assert found["memory_formula_bytes"][asks_all] in (2 * numbers, 4 * numbers)


@pytest.mark.parametrize("merge", [1, 2, 4])
@pytest.mark.parametrize("slow", [0, 6])
def test_what_the_statistics_take(merge, slow):
    view = ModelView(tiny_model("llama", kv_heads=4, groups=2))
    chosen = view.units[: slow // 2].flatten()
    for moments in attention_moments(view, batches(), [chosen] * 2, merge, lambda n: None):
        held = sum(getattr(moments, field.name).nbytes for field in fields(moments))
        assert record.moments_bytes(view.shape, merge, slow) == held


@pytest.mark.parametrize("merge", [1, 2])
def test_what_the_bases_take(merge):
    view = ModelView(tiny_model("llama", kv_heads=2, groups=2))
    _, bases = measure_attention(view, batches(), IMPORTANCE["variance"], merge, lambda n: None)
    slow = len(slow_channels(view.attention[0]))
    for basis in bases:
        own = sum(getattr(basis, name).nbytes for name in ("rope", "keys", "values"))
        assert record.basis_bytes(view.shape, merge) == own
        of_moments = sum(getattr(basis.moments, field.name).nbytes for field in fields(basis.moments))
        assert record.moments_bytes(view.shape, merge, slow) == of_moments
