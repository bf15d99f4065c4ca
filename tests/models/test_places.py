"""Where the blocks of a model that is larger than the memory come, and which stay."""

import json
from itertools import combinations_with_replacement

import pytest
import torch
from every_family import family_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

import kvprune
from kvprune import errors
from kvprune.channels import prune as pruning
from kvprune.channels import room
from kvprune.channels.repair.refit import refit
from kvprune.channels.settings import Settings
from kvprune.measure.memory import weight_bytes
from kvprune.models.held import held
from kvprune.models.places import Place, find_devices, place
from kvprune.models.source import load_model, resolve, skeleton
from kvprune.models.view import ModelView
from tiny import COARSE, Heard, tensors_of, tiny_model, tiny_tokenizer, too_large_as_a_whole

CPU = torch.device("cpu")
FAMILIES = ("llama", "gemma3_text", "gpt2", "phi3", "mixtral", "gpt_oss", "lfm2", "qwen3_5_text")
FAMILIES += ("gemma4_text", "gemma4_text:shared")
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def the_most(sizes, left):
    """By trying every way to give the first blocks to the devices in turn: how many can stay."""
    best = 0
    for ends in combinations_with_replacement(range(len(sizes) + 1), len(left)):
        starts = (0, *ends[:-1])
        if all(sum(sizes[a:b]) <= max(there, 0) for a, b, there in zip(starts, ends, left, strict=True)):
            best = max(best, ends[-1])
    return best


@given(SIZES, st.lists(st.integers(-5, 20), min_size=1, max_size=3))
def test_as_many_stay_as_have_room_in_the_models_order(sizes, left):
    devices = [torch.device("cuda", number) for number in range(len(left))]
    found = place(sizes, devices, left)
    assert len(found) == len(sizes)
    for device, room_there in zip(devices, left, strict=True):
        kept = sum(size for size, one in zip(sizes, found, strict=True) if one == Place(device, True))
        assert kept <= max(room_there, 0)
    stay = sum(one.stays for one in found)
    assert [one.stays for one in found] == [True] * stay + [False] * (len(sizes) - stay)
    assert [one.device.index for one in found[:stay]] == sorted(one.device.index for one in found[:stay])
    assert all(one.device == devices[0] for one in found[stay:])
    assert stay == the_most(sizes, left)


@pytest.fixture
def dense(tmp_path):
    tiny_model("qwen2", kv_heads=4, groups=2, layers=4).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def there(blocks):
    return [not any(p.is_meta for p in block.parameters()) for block in blocks]


def test_blocks_that_stay_and_blocks_that_go(dense, tmp_path):
    stays = [True, False, True, False]
    places = [Place(CPU, one) for one in stays]
    lm = load_model(resolve(dense), "cpu", "auto", tmp_path / "aside", places=places)
    whole, ids = load_model(resolve(dense), "cpu"), torch.arange(3, 21).view(2, 9)
    assert not any(there(lm.model.layers))
    for _ in range(2):
        assert torch.equal(lm(ids).logits, whole(ids).logits)
        assert there(lm.model.layers) == stays
    first = lm.model.layers[0].mlp.up_proj.weight
    with held(lm.model.layers[0], lm.model.layers[1]):
        assert lm.model.layers[0].mlp.up_proj.weight is first  # not brought again
    assert there(lm.model.layers) == stays


WINDOW = COARSE["calibration_window"]
OPTIONS = COARSE | {"ratio": 0.5, "merge": 2}


@pytest.fixture
def enough_for(dense, monkeypatch):
    """Blocks -> bytes with which so many blocks stay on a device, where the text passes a window at a time."""
    monkeypatch.setattr(room, "BATCH_TOKENS", WINDOW)
    view = ModelView(skeleton(resolve(dense), "cpu"))
    needs = room.needs_of(Settings(source=str(dense), **OPTIONS), view, 2, WINDOW, streamed=True)
    block = weight_bytes(view.blocks[0])
    assert all(weight_bytes(one) == block for one in view.blocks)
    return lambda blocks: sum(needs.values()) + int((blocks + 0.5) * block)


@pytest.mark.parametrize(
    ("blocks", "devices", "line"),
    [(0, 1, "at a time; "), (1, 1, "of 4 blocks 1 on cpu ("), (1, 2, "of 4 blocks 2 on cpu ("), (9, 1, "4 on cpu (")],
)
def test_as_many_as_the_memory_holds(blocks, devices, line, dense, enough_for, texts, tmp_path, monkeypatch):
    """One device, or the same one twice, of which each has the memory: the result is the whole model's."""
    whole = kvprune.prune(dense, tmp_path / "whole", **OPTIONS)
    monkeypatch.setattr(room, "needs_of", too_large_as_a_whole(room.needs_of))
    monkeypatch.setattr(pruning, "find_devices", lambda names: [CPU] * devices)
    progress = Heard()
    result = kvprune.prune(dense, tmp_path / "parts", memory=enough_for(blocks), progress=progress, **OPTIONS)
    assert result.record["streamed"]
    assert line in progress.said[0]
    assert ("stay; beside that" in progress.said[0]) == (blocks > 0)
    assert result.plan.layers == whole.plan.layers
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_a_pruned_block_shares_with_a_dense_one_that_is_there(dense, texts, tmp_path, monkeypatch):
    """Its MLP's first matrices are those; what was cut or fitted is its own."""
    seen = {}

    def spied(view, pruned, *rest):
        found = refit(view, pruned, *rest)
        block, own = view.blocks[1], pruned.model.layers[1]
        with held(block, own):
            for name in ("mlp.up_proj.weight", "mlp.down_proj.weight", "self_attn.v_proj.weight"):
                seen[name] = own.get_parameter(name).data_ptr() == block.get_parameter(name).data_ptr()
        return found

    monkeypatch.setattr(room, "needs_of", too_large_as_a_whole(room.needs_of))
    monkeypatch.setattr(pruning, "refit", spied)
    kvprune.prune(dense, tmp_path / "out", **OPTIONS)
    assert seen == {"mlp.up_proj.weight": True, "mlp.down_proj.weight": False, "self_attn.v_proj.weight": False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name.partition(":")[0] in CONFIG_MAPPING])
def test_a_gpu_and_the_cpu_in_turn(family, texts, tmp_path, monkeypatch):
    """Of other families, with blocks on the one and on the other, some of which stay."""
    family_model(family).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    options = COARSE | {"ratio": 0.25, "dtype": "float32"}
    kvprune.prune(tmp_path / "dense", tmp_path / "cpu", **options)

    def in_turn(sizes, devices, left):
        return [Place(devices[number % 2], bool(number % 3)) for number in range(len(sizes))]

    monkeypatch.setattr(room, "needs_of", too_large_as_a_whole(room.needs_of))
    monkeypatch.setattr(room, "place", in_turn)
    result = kvprune.prune(tmp_path / "dense", tmp_path / "spread", **options | {"device": "cuda:0,cpu"})
    assert result.plan.widths == kvprune.PruningPlan.read(tmp_path / "cpu").widths
    rows = [json.loads((tmp_path / name / "kvprune.json").read_text())["perplexity"] for name in ("cpu", "spread")]
    for one, other in zip(*rows, strict=True):
        assert other["dense"] == pytest.approx(one["dense"], rel=1e-4)
        assert other["pruned"] == pytest.approx(one["pruned"], rel=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"importance": "taylor", "channels": "joint"}, {"drop_blocks": 1}], ids=str)
def test_a_gpu_and_the_cpu(options, dense, enough_for, texts, tmp_path, monkeypatch):
    """Some blocks stay on the one, the others on the other."""
    options = OPTIONS | {"dtype": "float32"} | options
    options |= {"merge": 1} if "channels" in options else {}
    kvprune.prune(dense, tmp_path / "cpu", **options)
    monkeypatch.setattr(room, "needs_of", too_large_as_a_whole(room.needs_of))
    progress, memory = Heard(), enough_for(2)
    options |= {"device": "cuda:0,cpu", "memory": memory}
    result = kvprune.prune(dense, tmp_path / "spread", progress=progress, **options)
    assert "on cuda:0 (" in progress.said[0]
    assert "on cpu (" in progress.said[0]
    assert result.plan.layers == kvprune.PruningPlan.read(tmp_path / "cpu").layers
    rows = [json.loads((tmp_path / name / "kvprune.json").read_text())["perplexity"] for name in ("cpu", "spread")]
    for one, other in zip(*rows, strict=True):
        assert other["dense"] == pytest.approx(one["dense"], rel=1e-4)
        assert other["pruned"] == pytest.approx(one["pruned"], rel=2e-2)


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(room.memory, "free", lambda device: 1000)
    assert [room._free(torch.device(name)) for name in ("cpu", "cuda")] == [900, 900]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [room._free(torch.device(name)) for name in ("cpu", "cuda")] == [225, 900]


def test_devices_that_cannot_be(dense, texts, tmp_path, command, monkeypatch):
    assert find_devices("cpu") == [CPU]
    with pytest.raises(errors.BadOption, match="names cpu twice"):
        find_devices("cpu, cpu")
    with pytest.raises(errors.BadOption, match="device 'nosuch' cannot be used"):
        find_devices("cpu,nosuch")
    monkeypatch.setattr("kvprune.processes.count", lambda: 2)
    with pytest.raises(errors.BadOption, match="cpu,cuda:0: each of several processes has a device of its own"):
        find_devices("cpu,cuda:0")
    monkeypatch.undo()
    code, _, err = command("prune", dense, "--out", tmp_path / "out", "--device", "cpu,cpu")
    assert (code, "names cpu twice" in err) == (2, True)
    code, _, err = command("generate", dense, "the cat", "--device", "cpu,cuda:0")
    assert (code, "takes one here" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_model_that_fits_on_the_first_is_not_spread(dense, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "find_devices", lambda names: [CPU, CPU])
    progress = Heard()
    assert not kvprune.prune(dense, tmp_path / "out", progress=progress, **OPTIONS).record["streamed"]
    assert "the model fits on cpu whole: the other devices are not used" in progress.said
