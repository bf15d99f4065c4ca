"""What a model computes in where the CPU has no instructions for the dtype that it is stored in."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

import kvprune
from kvprune import errors
from kvprune.recovery import recover
from kvprune.runtime import dtype as dtypes
from tiny import COARSE, tiny_model, tiny_tokenizer

AVX2, ZEN4, SAPPHIRE, GRAVITON = ({"avx2", name} for name in ("fma", "avx512_bf16", "amx_bf16", "bf16"))
CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch):
    """Make this CPU one that can do so much."""

    def set_flags(flags):
        monkeypatch.setattr(dtypes, "cpu_flags", lambda: frozenset(flags))
        dtypes._say_once.cache_clear()

    return set_flags


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A tiny Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "tiny"
    tiny_model("llama", groups=2, head_dim=32, layers=3).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def lines():
    """What kvprune has said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("kvprune").addHandler(handler)
    yield said
    logging.getLogger("kvprune").removeHandler(handler)


@pytest.mark.parametrize(
    ("flags", "stored", "expected"),
    [
        (AVX2, torch.bfloat16, torch.float32),
        (ZEN4, torch.bfloat16, torch.bfloat16),
        (SAPPHIRE, torch.bfloat16, torch.bfloat16),
        (GRAVITON, torch.bfloat16, torch.bfloat16),
        (ZEN4, torch.float16, torch.float32),
        ({"avx512_fp16"}, torch.float16, torch.float16),
        (AVX2, torch.float32, torch.float32),
        (AVX2, torch.float64, torch.float64),
        (set(), torch.bfloat16, torch.bfloat16),  # a machine that does not say what it can do
    ],
)
def test_what_auto_computes_in(cpu, flags, stored, expected):
    cpu(flags)
    assert dtypes.computes_in(stored, CPU) == expected
    assert dtypes.computes_in(stored, torch.device("meta")) == stored


def test_this_machine_says_what_it_can_do():
    assert dtypes.cpu_flags()


def test_load_says_once_what_it_computes_in_and_why(cpu, half, lines):
    cpu(AVX2)
    model, again = kvprune.load(half, device="cpu"), kvprune.load(half, device="cpu")
    assert model.dtype == again.dtype == torch.float32
    assert dtypes.stored_dtype(model) == torch.bfloat16
    (line,) = lines
    assert "computing in float32" in line
    assert "no instructions for bfloat16" in line
    assert kvprune.load(half, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    cpu(ZEN4)
    exact = kvprune.load(half, device="cpu")
    assert exact.dtype == torch.bfloat16
    assert len(lines) == 1
    for name, weight in exact.state_dict().items():
        assert torch.equal(weight.float(), model.state_dict()[name]), name
    assert torch.equal(exact.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_prune_computes_in_float32_and_writes_bfloat16(cpu, half, texts, tmp_path):
    cpu(AVX2)
    result = kvprune.prune(half, tmp_path / "out", ratio=0.5, **COARSE)
    record = json.loads((tmp_path / "out" / "kvprune.json").read_text())
    assert (record["dtype"], record["compute_dtype"]) == ("bfloat16", "float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for name, weight in written.items() if "rope_index" not in name} == {torch.bfloat16}
    assert result.model.dtype == torch.float32  # in memory it goes on computing so
    for name, weight in result.model.state_dict().items():
        if name in written:
            assert torch.equal(weight, written[name].to(weight.dtype)), name
    # What was judged is what was written: the folder, judged again in float32, has the record's perplexity.
    rows = kvprune.evaluate(
        tmp_path / "out", texts=["wikitext2"], window_lengths=[32], tokens=512, device="cpu", dtype="float32"
    )["perplexity"]
    assert rows[0]["values"][0] == pytest.approx(record["perplexity"][0]["pruned"], rel=1e-6)
    assert record["kv_bytes_per_token"]["dense"] == 3 * 2 * 2 * 32 * 2


def test_recover_too(cpu, half, texts, tmp_path):
    cpu(AVX2)
    kvprune.prune(half, tmp_path / "out", ratio=0.5, **COARSE)
    quick = {"rank": 4, "tokens": 2048, "window": 64, "steps": 2, "batch": 2, "held_out": 256, "eval_tokens": 512}
    kvprune.recover(tmp_path / "out", tmp_path / "again", eval_windows=[64], device="cpu", **quick)
    record = kvprune.read_record(tmp_path / "again")
    assert (record["dtype"], record["compute_dtype"]) == ("bfloat16", "float32")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert {weight.dtype for name, weight in written.items() if "rope_index" not in name} == {torch.bfloat16}


def test_a_teacher_in_another_dtype_keeps_its_rotary_table(checkpoint, texts, tmp_path, monkeypatch):
    """The dense model is stored in float32, what was pruned of it in bfloat16."""
    kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, dtype="bfloat16", **COARSE)
    loaded = []
    load = recover.load_model
    monkeypatch.setattr(recover, "load_model", lambda *a: loaded.append(load(*a)) or loaded[-1])
    quick = {"rank": 4, "tokens": 2048, "window": 64, "steps": 1, "batch": 2, "held_out": 256, "eval_tokens": 512}
    kvprune.recover(tmp_path / "out", tmp_path / "again", eval_windows=[64], device="cpu", **quick)
    teacher = loaded[-1]
    exact = kvprune.load(checkpoint, device="cpu").model.rotary_emb.inv_freq
    assert teacher.dtype == loaded[0].dtype
    assert torch.equal(teacher.model.rotary_emb.inv_freq, exact)


def test_an_asked_dtype_is_computed_in_and_written(cpu, half, texts, tmp_path):
    cpu(AVX2)
    kvprune.prune(half, tmp_path / "out", ratio=0.5, dtype="float32", **COARSE)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for name, weight in written.items() if "rope_index" not in name} == {torch.float32}


def test_bench_compares_like_with_like(cpu, half, checkpoint):
    cpu(AVX2)
    quick = {"context": 8, "new_tokens": 2, "rounds": 1, "device": "cpu"}
    found = kvprune.bench(half, checkpoint, **quick)  # one is stored in bfloat16, the other in float32
    assert found["environment"]["dtype"] == "float32"
    cpu(ZEN4)
    with pytest.raises(errors.BadOption, match="give both one --dtype"):
        kvprune.bench(half, checkpoint, **quick)
