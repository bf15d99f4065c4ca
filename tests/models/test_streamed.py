"""Block by block from disk: the same plan and weights as with the whole model in memory, to the last bit."""

import json
import os
import shutil

import pytest
import torch
from every_family import family_model
from safetensors.torch import load_file, save_file

import kvprune
from kvprune import errors
from kvprune.channels import room
from kvprune.channels.settings import DECIDED_BY_A_PLAN
from kvprune.models import held, shelf
from kvprune.models.places import Place
from kvprune.models.source import load_model, resolve, skeleton
from kvprune.models.stream import input_of
from kvprune.models.view import ModelView
from tiny import COARSE, tensors_of, tiny_tokenizer, too_large_as_a_whole

FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt2", "opt", "gpt_neox", "phi3", "olmo2", "mixtral", "gpt_oss")
FAMILIES += ("gemma4_text", "gemma4_text:experts", "gemma4_text:shared")
FAMILIES += ("lfm2", "qwen3_5_text")


@pytest.fixture
def little(monkeypatch):
    """Memory that is too little for the whole model and enough for its blocks, of which every other one stays."""

    def every_other(sizes, devices, left):
        return [Place(devices[0], bool(number % 2)) for number in range(len(sizes))]

    monkeypatch.setattr(room, "needs_of", too_large_as_a_whole(room.needs_of))
    monkeypatch.setattr(room, "place", every_other)


def layers_of(folder):
    return (folder / "plan.json").read_text().split('"layers": [')[-1]


def assert_same(one, other):
    assert layers_of(one) == layers_of(other)
    expected, found = tensors_of(one), tensors_of(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    records = [json.loads((folder / "kvprune.json").read_text()) for folder in (one, other)]
    for name in ("perplexity", "refit", "sensitivity", "parameters", "kv_bytes_per_token", "widths"):
        assert records[0][name] == records[1][name]
    assert [record["streamed"] for record in records] == [False, True]


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def both(source, tmp_path, monkeypatch, request, **options):
    kvprune.prune(source, tmp_path / "whole", **options)
    request.getfixturevalue("little")
    result = kvprune.prune(source, tmp_path / "streamed", **options)
    assert result.model is None
    assert_same(tmp_path / "whole", tmp_path / "streamed")
    assert not (tmp_path / "streamed" / ".resume").exists()
    assert not (tmp_path / "streamed" / ".dense").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_family(family, texts, tmp_path, monkeypatch, request):
    source = saved(family_model(family), tmp_path / "dense")
    both(source, tmp_path, monkeypatch, request, **COARSE)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "mixtral"])
def test_dropped_blocks_of_other_families(family, texts, tmp_path, monkeypatch, request):
    source = saved(family_model(family), tmp_path / "dense")
    both(source, tmp_path, monkeypatch, request, **COARSE | {"ratio": 0.5, "drop_blocks": 2})


@pytest.mark.parametrize(
    "options",
    [
        {"importance": "taylor", "channels": "joint", "allocation": "sensitivity"},
        {"importance": "energy", "repair": "refit"},
        {"importance": "l2", "repair": "none"},
        {"allocation": "budget", "merge": 1},
        {"allocation": "sensitivity", "probes": "measured"},
        {"depth": 1},
        {"depth": "auto"},
        {"drop_blocks": 1, "repair": "rotate"},
        {"drop_blocks": 1, "depth": "auto"},
        {"layout": "portable"},
        {"layout": "stock"},
        {"layout": "uniform", "dtype": "bfloat16"},
        {"ratio": 0.0},
    ],
    ids=str,
)
def test_every_way_to_prune(options, checkpoint, texts, tmp_path, monkeypatch, request):
    both(checkpoint, tmp_path, monkeypatch, request, **COARSE | {"ratio": 0.5} | options)


def test_stored_in_bfloat16_and_computed_in_float32(texts, tmp_path, monkeypatch, request):
    source = saved(family_model("llama").to(torch.bfloat16), tmp_path / "dense")
    monkeypatch.setattr("kvprune.runtime.dtype.cpu_flags", lambda: frozenset({"avx2"}))
    both(source, tmp_path, monkeypatch, request, **COARSE)
    assert {t.dtype for t in tensors_of(tmp_path / "streamed").values()} == {torch.bfloat16, torch.int64}


def test_shards_and_a_plan(checkpoint, texts, tmp_path, monkeypatch, request):
    model = kvprune.load(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    both(tmp_path / "shards", tmp_path, monkeypatch, request, **COARSE)
    kvprune.prune(tmp_path / "shards", tmp_path / "again", plan=tmp_path / "whole" / "plan.json", **QUICK_PLAN)
    assert layers_of(tmp_path / "again") == layers_of(tmp_path / "whole")


QUICK_PLAN = {name: value for name, value in COARSE.items() if name not in DECIDED_BY_A_PLAN}


def test_only_held_blocks_have_weights(checkpoint, tmp_path):
    lm = load_model(resolve(checkpoint), "cpu", "auto", tmp_path / "aside")
    whole = load_model(resolve(checkpoint), "cpu")
    blocks = lm.model.layers

    def there():
        return [not any(p.is_meta for p in block.parameters()) for block in blocks]

    assert not any(there())
    with held.held(blocks[1]):
        assert there() == [index == 1 for index in range(len(blocks))]
        with held.held(blocks[1], blocks[2]):
            assert sum(there()) == 2
        assert there() == [index == 1 for index in range(len(blocks))]
    assert not any(there())
    with held.held(blocks[0]):  # as refit asks what reaches O, which ends the call
        reached = input_of(blocks[0].self_attn.o_proj, lambda: lm.model(torch.arange(3, 9).view(1, -1)))
    assert reached.shape[1] == 6
    assert not any(there())
    ids = torch.randint(3, 300, (2, 9))
    assert torch.equal(lm(ids).logits, whole(ids).logits)
    assert not any(there())
    for (name, found), (other, expected) in zip(held.each_parameter(lm), whole.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(found, expected)
    assert not any(there())


def test_buffers_of_a_checkpoint_are_read_whatever_accelerate_calls_the_device(tmp_path, monkeypatch):
    """A torch.device, as it does a GPU, in which safetensors reads nothing. Gemma 4 has such a buffer in each block."""
    family_model("gemma4_text").save_pretrained(tmp_path / "dense")
    source, came, devices = resolve(tmp_path / "dense"), shelf.as_it_came, []

    def with_a_device(lm):
        (loader,) = {id(m._hf_hook.weights_map.dataset): m._hf_hook.weights_map.dataset for m in hooked(lm)}.values()
        devices.append(loader.device)
        loader.device = torch.device("cpu")
        return came(lm)

    def hooked(lm):
        return [m for m in lm.modules() if getattr(getattr(m, "_hf_hook", None), "weights_map", None) is not None]

    monkeypatch.setattr(shelf, "as_it_came", with_a_device)
    lm, whole = load_model(source, "cpu", "auto", tmp_path / "aside"), load_model(source, "cpu")
    assert devices
    ids = torch.randint(3, 90, (2, 9))
    assert torch.equal(lm(ids).logits, whole(ids).logits)


def test_a_shard_that_changes_while_it_runs(checkpoint, texts, tmp_path, monkeypatch, little):
    source = tmp_path / "dense"
    shutil.copytree(checkpoint, source)
    (file,) = source.glob("*.safetensors")

    def change(*_args, **_kwargs):
        save_file(load_file(file), file, {"format": "pt"})
        os.utime(file, ns=(1, 1))

    monkeypatch.setattr("kvprune.channels.prune.round_as_stored", change)
    with pytest.raises(errors.BrokenCheckpoint, match=r"model\.safetensors has changed while it was read"):
        kvprune.prune(source, tmp_path / "out", **COARSE)
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr("kvprune.channels.prune.round_as_stored", lambda *_: file.unlink())
    with pytest.raises(errors.BrokenCheckpoint, match=r"model\.safetensors is gone"):
        kvprune.prune(source, tmp_path / "other", **COARSE)


def test_too_little_memory_or_disk(checkpoint, texts, tmp_path, monkeypatch, command):
    with pytest.raises(errors.TooLittleMemory, match=r"one block at a time still takes .* more --memory"):
        kvprune.prune(checkpoint, tmp_path / "out", memory="1KiB", **COARSE)
    with pytest.raises(errors.BadOption, match="no amount of memory"):
        kvprune.prune(checkpoint, tmp_path / "out", memory="much", **COARSE)
    with pytest.raises(errors.BadOption, match="needs --out"):
        kvprune.prune(checkpoint, memory="1KiB", **COARSE)
    monkeypatch.setattr(room, "needs_of", lambda *a, streamed: {"weights": 2**10 if streamed else 2**62})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**30, 2**30, 2**10))
    with pytest.raises(errors.NoSpace, match=r"free some space or choose another --out"):
        kvprune.prune(checkpoint, tmp_path / "out", memory="1GiB", **COARSE)
    assert not (tmp_path / "out").exists()


def test_what_it_needs_is_counted_by_the_model(checkpoint):
    source = resolve(checkpoint)
    view, whole = ModelView(skeleton(source)), load_model(source)
    assert room.outside_of(view) == sum(p.nbytes for n, p in whole.named_parameters() if ".layers." not in n)
    assert room.largest_block(view) == sum(p.nbytes for p in whole.model.layers[0].parameters())
    assert room._refitted(view) == [
        whole.model.layers[0].self_attn.o_proj.in_features,
        whole.model.layers[0].mlp.down_proj.in_features,
    ]
    assert torch.equal(view.frequencies, ModelView(whole).frequencies)
