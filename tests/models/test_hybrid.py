"""Models in which not every block has attention: the others are run and stay as they are, in every part of prune."""

import json
import re

import pytest
import torch
from every_family import LAYERS, OPTIONS, VOCABULARY, changed, family_model
from test_every_family import without_channels
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

import kvprune
from kvprune.channels.choice.basis import Kept, identity
from kvprune.channels.journal import Journal
from kvprune.channels.plan import PruningPlan
from kvprune.channels.widths.blocks import choose_blocks
from kvprune.channels.widths.estimate import estimate_sensitivity
from kvprune.channels.widths.sensitivity import Probe, measure_sensitivity
from kvprune.errors import BadOption, PlanMismatch
from kvprune.measure.context import held_tokens
from kvprune.measure.fit import fit
from kvprune.measure.memory import cache_bytes, weights_read_bytes
from kvprune.measure.shapes import pruned_config, random_model
from kvprune.models.view import ModelView
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import quantized_cache, quantizer
from tiny import COARSE, QUICK, tiny_tokenizer

HYBRID = [name for name in ("lfm2", "qwen3_5_text") if name in CONFIG_MAPPING]
IDS = torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=HYBRID)
def name(request):
    return request.param


@pytest.fixture
def source(name, texts, tmp_path):
    family_model(name).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def numbers_of(name):
    """The blocks that have attention."""
    return [number for number, kind in enumerate(OPTIONS[name]["layer_types"]) if kind == "full_attention"]


@torch.no_grad()
def loss_of(model):
    return model(IDS, labels=IDS).loss.item()


@torch.no_grad()
def test_what_has_no_attention_stays_as_it_is(name):
    dense, (_, pruned), numbers = family_model(name), without_channels(family_model(name)), numbers_of(name)
    assert ModelView(dense).attention_layers == numbers
    before, after = dense.state_dict(), pruned.state_dict()
    for number in range(dense.config.num_hidden_layers):
        mine, theirs = (
            {key: tensor for key, tensor in state.items() if f".{number}." in key} for state in (after, before)
        )
        assert (mine.keys() == theirs.keys()) == (number not in numbers)
        for key in mine.keys() & theirs.keys() if number not in numbers else ():
            assert torch.equal(mine[key], theirs[key])
    cache = DynamicCache(config=pruned.config)
    assert [type(layer) for layer in cache.layers] == [
        type(layer) for layer in DynamicCache(config=dense.config).layers
    ]


def expected_estimate(dense, number, change):
    """By the formula, on the whole model at once: g . delta + (g . delta)^2 / 2 of every token, in the mean."""
    attention, seen = dense.model.layers[number].self_attn, []

    def keep(_module, _args, kwargs, output):
        output[0].retain_grad()
        seen.append((kwargs, output[0]))

    hook = attention.register_forward_hook(keep, with_kwargs=True)
    scored = IDS[:, 1:].numel()
    (dense(IDS, labels=IDS, use_cache=False).loss * scored).backward()
    hook.remove()
    ((kwargs, output),) = seen
    with torch.no_grad(), changed(dense, change):
        along = (output.grad * (attention(**kwargs)[0] - output)).sum(-1)
    return float(along.sum() + along.square().sum() / 2) / scored


def test_probes_see_one_layer_with_attention(name):
    """Against the dense model whose keys and values of that layer alone lose the channels."""
    dense = family_model(name)
    view = ModelView(dense)
    kept = torch.tensor([[0, 1, 2, 8, 9, 10]] * view.shape.kv_heads)
    plain = identity(view.shape.kv_heads, view.shape.head_dim)
    probes = [Probe(layer, Kept(kept, kept), plain) for layer in range(LAYERS)]
    counted = []
    found = measure_sensitivity(view, [IDS], probes, Journal(), counted.append)
    estimated = estimate_sensitivity(view, [IDS], probes, counted.append)
    assert sum(counted) == 2 * LAYERS
    masks = torch.zeros(2, view.shape.head_dim)
    masks[0, view.attention[0].order[kept[0]]] = 1  # the family's own numbers
    masks[1, kept[0]] = 1
    for layer, number in enumerate(numbers_of(name)):

        def change(at, key, value, number=number):
            return (key * masks[0], value * masks[1]) if at == number else (key, value)

        with changed(dense, change):
            cut = loss_of(dense)
        assert found[layer] == pytest.approx(cut - loss_of(dense), abs=2e-6)
        assert estimated[layer] == pytest.approx(expected_estimate(dense, number, change), rel=1e-3)


@torch.no_grad()
def test_only_blocks_with_attention_are_dropped(name):
    dense = family_model(name)
    found = choose_blocks(ModelView(dense), [IDS], 1, False, Journal(), lambda n: None)
    losses = []
    for number in numbers_of(name):
        block = dense.model.layers[number]
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
        losses.append(loss_of(dense))
        del block.forward
    assert found.layers == (min(range(LAYERS), key=losses.__getitem__),)
    assert found.alone == pytest.approx([loss - loss_of(dense) for loss in losses], abs=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "budget", "probes": "measured", "probe_tokens": 512},
        {"allocation": "budget", "probe_tokens": 512},
        {"importance": "taylor", "channels": "joint", "repair": "none"},
        {"importance": "energy", "repair": "none"},
        {"importance": "l2", "repair": "none"},
        {"layout": "uniform"},
        {"depth": 1},
        {"depth": "auto", "drop_blocks": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_prune_and_what_it_says(name, source, tmp_path, options, command):
    result = kvprune.prune(source, tmp_path / "out", ratio=0.5, **COARSE | options)
    record, plan, numbers = result.record, PruningPlan.read(tmp_path / "out"), numbers_of(name)
    assert record["attention_layers"] == numbers
    assert plan.model.attention_layers == tuple(numbers)
    assert len(record["widths"]) == LAYERS == len(plan.layers)
    assert set(record["dropped_blocks"]) <= set(numbers)
    assert {row["layer"] for row in record["refit"]} == (set() if options.get("repair") else set(numbers))
    assert record["kv_bytes_per_token"]["dense"] == 2 * record["kv_bytes_per_token"]["pruned"]
    loaded = kvprune.load(tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, result.model(IDS).logits, rtol=0, atol=1e-5)
    cache = loaded(IDS, use_cache=True)[CACHE]
    assert cache_bytes(cache) == IDS.numel() * record["kv_bytes_per_token"]["pruned"]
    code, out, _ = command("show", tmp_path / "out")
    assert code == 0
    shown = []
    for first, last, others in re.findall(r"^ *layers? (\d+)(?: to (\d+))?((?:, \d+)*)", out, re.MULTILINE):
        shown += range(int(first), int(last or first) + 1)
        shown += map(int, re.findall(r"\d+", others))
    assert shown == numbers
    report = kvprune.doctor(tmp_path / "out")
    assert report["checks"]["passed"]
    assert [name for name, engine in report["engines"].items() if engine["takes"]] == ["transformers"]
    again = kvprune.prune(source, plan=tmp_path / "out" / "plan.json", **QUICK)
    assert again.plan.layers == plan.layers


@torch.no_grad()
def test_a_plan_is_for_the_blocks_that_it_names(name, source, tmp_path):
    kvprune.prune(source, tmp_path / "out", ratio=0.5, **COARSE)
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"].reverse()
    turned = AutoConfig.for_model(**config)
    AutoModelForCausalLM.from_config(turned).save_pretrained(tmp_path / "turned")
    tiny_tokenizer().save_pretrained(tmp_path / "turned")
    with pytest.raises(PlanMismatch, match="attention_layers"):
        kvprune.prune(tmp_path / "turned", plan=tmp_path / "out" / "plan.json", **QUICK)


@torch.no_grad()
def test_caches(name):
    """A growing one says the same; a quantised one rounds keys and values alone; bytes are those of keys and values."""
    _, pruned = without_channels(family_model(name))
    expected = pruned(IDS).logits
    assert held_tokens(pruned.config, 20) == 20 * LAYERS
    found = {}
    for kind, cache in (("growing", GrowingCache(config=pruned.config)), ("bits", _quantized(pruned.config))):
        if cache is None:
            continue
        pieces = [pruned(IDS[:, :12], **{CACHE: cache}, use_cache=True).logits]
        pieces += [pruned(IDS[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(12, 20)]
        found[kind] = torch.cat(pieces, 1)
        own = 2 * 2 * sum(pruned.config.widths()) * 4 * IDS.numel()  # K and V, two KV heads, four bytes
        assert cache_bytes(cache) == own or kind == "bits"
    torch.testing.assert_close(found["growing"], expected, rtol=0, atol=1e-5)
    if "bits" in found:
        assert (found["bits"] - expected).abs().max() < 0.2


def _quantized(config):
    try:
        quantizer(8)
    except BadOption:
        return None
    return quantized_cache(config, 8)


@pytest.mark.parametrize("target", ["vllm", "vllm-cpu", "llama.cpp"])
def test_engines_that_run_no_such_model_are_refused(source, target):
    with pytest.raises(BadOption):
        kvprune.prune(source, ratio=0.5, target=target, **QUICK)


def test_fit_counts_layers_with_attention(name, source):
    found = fit(source, memory="1MiB", context=16, align=2, min_width=4)
    assert found["kv_bytes_per_token"] == 2 * 2 * 16 * 4 * LAYERS
    assert found["dense"]["kv_cache"] == 16 * found["kv_bytes_per_token"]


@pytest.mark.parametrize("merge", [1, 2])
def test_fit_counts_the_weights_of_what_is_cut(name, source, merge):
    dense = fit(source, memory="1GiB", context=128, reserve=0, layout="uniform", align=2, min_width=4)
    enough = dense["dense"]["weights"] + dense["dense"]["kv_cache"] - 100
    found = fit(source, memory=enough, context=128, reserve=0, layout="uniform", align=2, min_width=4, merge=merge)
    config = pruned_config(AutoConfig.from_pretrained(source), found["ratio"], 2, found["merge"])
    model = random_model(config, torch.device("cpu"), torch.float32)
    assert found["merge"] == merge
    assert found["weights_read_bytes"]["pruned"] == weights_read_bytes(model)


@pytest.mark.parametrize("second", ["against", "keep"])
def test_bench(name, source, tmp_path, second):
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (source / "config.json").write_text(json.dumps(config))
    kvprune.prune(source, tmp_path / "out", ratio=0.5, **COARSE)
    options = {"against": tmp_path / "out"} if second == "against" else {"keep": 0.5}
    found = kvprune.bench(source, batch=1, context=256, new_tokens=4, rounds=1, device="cpu", **options)
    (cell,) = found["cells"]
    held = {side: cell["memory_bytes"][side]["kv_cache"] for side in ("dense", "pruned")}
    assert held["dense"] == 256 * 2 * 2 * 16 * 4 * LAYERS
    if second == "against":
        assert held["pruned"] == held["dense"] / 2
    else:
        assert 0.5 * held["dense"] < held["pruned"] < 0.9 * held["dense"]
