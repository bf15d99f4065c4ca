"""GGUF files block by block: each number is what transformers loads, and the result is that of the whole model."""

import shutil
import weakref

import gguf
import numpy as np
import pytest
import torch
from every_family import family_model
from transformers import GPT2Config, GPT2LMHeadModel

import kvprune
from ggufs import as_gguf, write_family, write_gguf
from kvprune import errors
from kvprune.channels import room
from kvprune.models import unpacked
from kvprune.models.source import load_model, resolve, skeleton
from kvprune.models.unpacked import unpack
from kvprune.models.view import ModelView
from tiny import COARSE, stop, tiny_model, tiny_tokenizer, too_large_as_a_whole

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "nemotron", "starcoder2", "stablelm", "gpt2")


def model_of(family):
    if family != "gpt2":
        return family_model(family)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4))  # sizes that a file can say


def unpacked_of(path, folder, dtype="auto", advance=lambda blocks: None):
    source = resolve(path)
    return unpack(source, skeleton(source), dtype, folder, advance)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", [None, "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_what_transformers_loads(family, kind, dtype, tmp_path):
    path = write_family(model_of(family), tmp_path / "tiny.gguf", kind)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == ({"F32"} if kind is None else {"F32", kind})
    done = []
    source = unpacked_of(path, tmp_path / "folder", dtype, done.append)
    whole, found = load_model(resolve(path), "cpu", dtype), load_model(source, "cpu", dtype)
    assert len(done) == sum(done) == whole.config.num_hidden_layers
    expected = dict(whole.named_parameters())
    assert expected.keys() == dict(found.named_parameters()).keys()
    for name, tensor in found.named_parameters():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in found.named_buffers():
        assert torch.equal(tensor, whole.get_buffer(name)), name
    for what in ("config", "generation_config"):
        one, other = (getattr(model, what).to_dict() for model in (whole, found))
        assert one | {"_name_or_path": ""} == other | {"_name_or_path": ""}


@pytest.fixture
def little(monkeypatch):
    """Memory that is too little for the whole model, and enough for its blocks."""
    needs = too_large_as_a_whole(room.needs_of)
    return lambda: monkeypatch.setattr(room, "needs_of", needs)


def pruned(path, out, **options):
    return kvprune.prune(path, out, tokenizer=tiny_tokenizer(), **COARSE | options)


def assert_same(one, other):
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        if name != "kvprune.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def packed(tmp_path):
    """Llama, whose Q and K lie otherwise in the file; quantised."""
    return write_gguf(tiny_model("llama", groups=2, head_dim=32, layers=4, hidden=64), tmp_path / "t.gguf", kind="Q8_0")


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "drop_blocks": 1}], ids=str)
def test_the_result_is_that_of_the_whole_model(options, packed, texts, tmp_path, little):
    pruned(packed, tmp_path / "whole", **options)
    little()
    result = pruned(packed, tmp_path / "streamed", **options)
    assert result.record["streamed"]
    assert_same(tmp_path / "whole", tmp_path / "streamed")


def test_stored_in_bfloat16_and_computed_in_float32(packed, texts, tmp_path, little, monkeypatch):
    monkeypatch.setattr("kvprune.runtime.dtype.cpu_flags", lambda: frozenset({"avx2"}))
    pruned(packed, tmp_path / "whole")
    little()
    pruned(packed, tmp_path / "streamed")
    assert_same(tmp_path / "whole", tmp_path / "streamed")


def test_what_was_unpacked_before_a_kill_is_kept(packed, texts, tmp_path, monkeypatch, little):
    """kill -9 leaves what lies there: here it is put back behind a run that was stopped."""
    pruned(packed, tmp_path / "whole")
    little()
    left, out, save = tmp_path / "left", tmp_path / "out", unpacked._save

    def saved(tensors, path, most):
        if len(list(path.parent.glob("*.safetensors"))) == most:
            shutil.copytree(out / ".dense", left)
            (left / "gguf" / (path.name + ".partial")).write_bytes(b"cut short")
            stop()
        save(tensors, path)

    monkeypatch.setattr(unpacked, "_save", lambda tensors, path: saved(tensors, path, 3))
    with pytest.raises(RuntimeError, match="stopped"):
        pruned(packed, out)
    assert not out.exists()
    out.mkdir()
    shutil.move(left, out / ".dense")
    before = {file.name: file.stat().st_mtime_ns for file in (out / ".dense" / "gguf").glob("*.safetensors")}
    damaged, *kept = sorted(before)
    (out / ".dense" / "gguf" / damaged).write_bytes(b"not what was written")
    written = []
    monkeypatch.setattr(unpacked, "_save", lambda tensors, path: (written.append(path.name), save(tensors, path)))
    pruned(packed, out)
    assert damaged in written
    assert not set(kept) & set(written)
    assert len(written) == 4 + 3 - len(kept)  # blocks; embedding, norm and head
    assert_same(tmp_path / "whole", out)


def test_what_was_unpacked_of_another_file_is_not_used(packed, tmp_path):
    folder = tmp_path / "folder"
    source = unpacked_of(packed, folder)
    before = (folder / "blk.0.safetensors").read_bytes()
    assert unpacked_of(packed, folder) == source
    unpacked_of(packed, folder, "float32")
    assert (folder / "blk.0.safetensors").read_bytes() != before
    other = tiny_model("llama", groups=2, head_dim=32, layers=2, hidden=64, seed=1)
    found = load_model(unpacked_of(write_gguf(other, packed), folder, "float32"), "cpu")
    assert not (folder / "blk.2.safetensors").exists()
    assert torch.equal(found.model.layers[1].mlp.up_proj.weight, other.model.layers[1].mlp.up_proj.weight)


def test_what_a_kill_left_goes_when_the_model_fits_now(packed, texts, tmp_path):
    out = tmp_path / "out"
    unpacked_of(packed, out / ".dense" / "gguf")
    pruned(packed, out)
    assert (out / "config.json").exists()
    assert not (out / ".dense").exists()


def test_one_tensor_at_a_time(packed, tmp_path, monkeypatch):
    """When one is unpacked, nothing is left of those before it but what will be written of this block."""
    unpack_one, save, arrays, written, files = gguf.dequantize, unpacked._save, [], [], []

    def watched(data, kind):
        assert not [one for one in arrays + written if one() is not None]
        found = unpack_one(data, kind)
        arrays.append(weakref.ref(found))
        return found

    def saved(tensors, path):
        save(tensors, path)
        written.extend(map(weakref.ref, tensors.values()))
        files.append(len(tensors))

    monkeypatch.setattr(gguf, "dequantize", watched)
    monkeypatch.setattr(unpacked, "_save", saved)
    unpacked_of(packed, tmp_path / "folder")
    assert len(arrays) == len(written) == len(gguf.GGUFReader(packed).tensors)
    assert sorted(files) == [1, 1, 1, 9, 9, 9, 9]


def test_the_memory_and_the_disk_of_unpacking_are_counted(packed, tmp_path, texts, monkeypatch):
    source = resolve(packed)
    s, view = room.Settings(source=str(packed), ratio=0.5), ModelView(skeleton(source))
    whole, largest = sum(p.nbytes for p in view.lm.parameters()), 300 * 64  # the embedding

    def found(asked, device="cpu"):
        return room.find_room(s, view, 1, [torch.device(device)], asked, tmp_path / "out", source)

    monkeypatch.setattr(room, "needs_of", lambda s, view, merge, batch, streamed: {"weights": 2 if streamed else 2**62})
    monkeypatch.setattr(room, "_rate", lambda *a: 1e9)
    needed = sum(found(2**40).needs.values())
    assert needed == 10 * largest + max(sum(p.nbytes for p in block.parameters()) for block in view.blocks)
    assert found(needed).disk >= 2 * whole
    with pytest.raises(errors.TooLittleMemory, match=r"most is: the largest tensor of the \.gguf file, unpacked"):
        found(needed - 1)
    assert found(2, "cuda").needs == {"weights": 2}  # host memory is not the GPU's
    monkeypatch.setattr(room, "needs_of", lambda *a, streamed: {"weights": 2})  # whole, by transformers
    assert sum(found(2**40).needs.values()) == 10 * largest + whole
    disk = shutil._ntuple_diskusage(2**40, 0, found(needed).disk - 1)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: disk)
    with pytest.raises(errors.NoSpace, match=r"free some space or choose another --out"):
        pruned(packed, tmp_path / "out", memory=needed)
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_read(packed, texts, tmp_path, monkeypatch, little):
    little()
    save = unpacked._save

    def saved(tensors, path, act):
        save(tensors, path)
        act()

    for act, message in ((lambda: packed.touch(), "has changed"), (lambda: packed.unlink(missing_ok=True), "is gone")):
        monkeypatch.setattr(unpacked, "_save", lambda tensors, path, act=act: saved(tensors, path, act))
        with pytest.raises(errors.BrokenCheckpoint, match=message):
            pruned(packed, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_unpacked(texts, tmp_path, little):
    little()
    model = tiny_model("llama", groups=2, head_dim=32)
    path = write_gguf(model, tmp_path / "whole.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.BrokenCheckpoint, match=r"truncated.*fetch it again"):
        pruned(path, tmp_path / "out")
    tensors = as_gguf(model)
    strange = tensors | {"blk.1.ffn_up.weight": tensors["blk.1.ffn_up.weight"].astype(np.int8)}
    path = write_gguf(model, tmp_path / "strange.gguf", strange)
    with pytest.raises(errors.UnknownSource, match="of type I8, which gguf does not unpack; give the"):
        pruned(path, tmp_path / "out")
    path = write_gguf(model, tmp_path / "other.gguf", tensors | {"blk.0.attn_q.bias": np.zeros(4, np.float32)})
    with pytest.raises(errors.UnsupportedArchitecture, match=r"has blk\.0\.attn_q\.bias"):
        pruned(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
