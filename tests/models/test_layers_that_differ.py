"""Gemma 4: layers whose heads differ, and layers that attend to keys and values of others; what prune makes of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_family import HEADS, OPTIONS, VOCABULARY, changed, family_model, type_of
from safetensors.torch import load_file, save_file
from test_every_family import merged, without_channels
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kvprune
from kvprune.channels.evidence.importance import IMPORTANCE
from kvprune.channels.evidence.statistics import measure_attention
from kvprune.channels.journal import Journal
from kvprune.channels.plan import PruningPlan
from kvprune.channels.settings import DECIDED_BY_A_PLAN
from kvprune.errors import BadOption, PlanMismatch, UnreachableRatio
from kvprune.measure.memory import parameters
from kvprune.measure.shapes import pruned_config, random_model
from kvprune.measure.weights import Cut, Weights
from kvprune.models.view import ModelView
from kvprune.runtime.checkpoint import save
from tiny import COARSE, make_plan, tiny_tokenizer

pytestmark = pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers does not know it")
VARIANTS = [name for name in OPTIONS if type_of(name) == "gemma4_text"]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ALONE = """
import sys
from pathlib import Path
sys.modules["kvprune"] = None
import torch
from transformers import AutoModelForCausalLM
ids, new = torch.load(sys.argv[1]), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save((model(ids).logits, model.generate(ids, **new)), folder + "/found")
"""


def saved(name, folder):
    family_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_what_is_generated_with_a_folders_own_code(tmp_path):
    """Without kvprune, and past the window: the greedy text of the projected dense model, without a cache."""
    ids, expected = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5)), {}
    for name in VARIANTS:
        dense = family_model(name)
        change, pruned = merged(dense)
        with changed(dense, change):
            expected[name] = dense(ids).logits, dense.generate(ids, use_cache=False, **GREEDY)
        pruned.save_pretrained(tmp_path / name)
    torch.save(ids, tmp_path / "ids")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "ids"), *(str(tmp_path / name) for name in VARIANTS)]
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    for name, (logits, tokens) in expected.items():
        found, generated = torch.load(tmp_path / name / "found")
        torch.testing.assert_close(found, logits, rtol=0, atol=4e-5)
        assert generated.tolist() == tokens.tolist()


@pytest.mark.parametrize("options", [
    {"allocation": "budget"},
    {"allocation": "budget", "probes": "measured", "merge": 1},
    {"importance": "energy"},
    {"importance": "taylor", "repair": "none"},
    {"channels": "joint", "importance": "l2", "repair": "refit"},
    {"merge": 2, "ratio": 0.7},
    {"ratio": 0.0},
], ids=str)  # fmt: skip
def test_every_way_to_prune_layers_that_differ(options, texts, tmp_path):
    source = saved("gemma4_text", tmp_path / "dense")
    result = kvprune.prune(source, tmp_path / "out", **COARSE | {"ratio": 0.5} | options)
    shape, ratio = ModelView(family_model("gemma4_text")).shape, options.get("ratio", 0.5)
    assert abs(result.record["ratio_achieved"] - ratio) < 0.01
    kept = sum(width * heads for width, (heads, _) in zip(result.plan.widths, shape.per_layer, strict=True))
    heads = sum(heads * channels for heads, channels in shape.per_layer)
    assert kept / result.plan.merge == pytest.approx(heads * (1 - result.record["ratio_achieved"]))
    ids = torch.randint(3, VOCABULARY, (1, 11))
    with torch.no_grad():
        loaded = kvprune.load(tmp_path / "out")
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"repair": "none"}, {"repair": "rotate"}, {"merge": 1}], ids=str)
def test_layers_that_share_keys_keep_the_same(options, texts, tmp_path):
    source = saved("gemma4_text:shared", tmp_path / "dense")
    result = kvprune.prune(source, tmp_path / "out", ratio=0.5, **COARSE | options)
    layers = result.plan.layers
    assert [layers[0], layers[1]] == [layers[2], layers[3]]
    tensors = result.model.state_dict()
    own = {name.split(".")[4] for name in tensors if name.startswith("model.layers.2.self_attn.")}
    assert own == {"q_proj", "q_norm", "q_mix", "o_proj", "rope_index"}
    left = {name: value for name, value in COARSE.items() if name not in DECIDED_BY_A_PLAN}
    again = kvprune.prune(source, tmp_path / "again", plan=tmp_path / "out" / "plan.json", **left)
    assert all(torch.equal(value, tensors[name]) for name, value in again.model.state_dict().items())


def test_a_plan_that_keeps_other_channels_of_shared_keys_is_refused(tmp_path):
    model = family_model("gemma4_text:shared")
    shape, layers = ModelView(model).shape, []
    for own in shape.each:
        every = [list(range(own.head_dim))] * own.kv_heads
        layers.append((every, every))
    plan = json.loads(make_plan(model, layers).to_json())
    assert plan["model"]["sources"] == [0, 1, 0, 1] == list(shape.sources)
    PruningPlan.model_validate(plan).check("gemma4_text", shape)
    for name in ("qk", "vo"):
        plan["layers"][2][name] = [[0, 1, 8, 9]] * 2
    with pytest.raises(PlanMismatch, match="layer 2 of the plan keeps other channels than the layer that has its keys"):
        PruningPlan.model_validate(plan).check("gemma4_text", shape)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("gemma4_text", {"layout": "uniform"}, "wants layers that are alike; this model's have 2 KV heads of 24"),
    ("gemma4_text", {"depth": 1}, "--depth 1 wants layers that are alike"),
    ("gemma4_text", {"drop_blocks": 1}, "--drop-blocks 1 wants layers that are alike"),
    ("gemma4_text", {"allocation": "sensitivity"}, "--allocation sensitivity wants layers that are alike"),
    ("gemma4_text", {"merge": 4}, "--merge 4 does not divide the 2 KV heads"),
    ("gemma4_text:shared", {"allocation": "budget"}, "--allocation budget takes layers alone"),
    ("gemma4_text:shared", {"importance": "taylor"}, "--importance taylor takes layers alone"),
])  # fmt: skip
def test_what_wants_other_layers_is_refused_in_one_line(name, options, message, texts, tmp_path):
    source = saved(name, tmp_path / "dense")
    with pytest.raises((BadOption, UnreachableRatio), match=message):
        kvprune.prune(source, tmp_path / "out", ratio=0.5, **COARSE | options)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_what_stays_does_not_depend_on_sizes_that_norms_take_away():
    """Behind O a norm stands: the model is the same with ten times its matrix, and so must be what is kept."""
    text, found = list(torch.randint(3, VOCABULARY, (8, 32)).split(4)), []
    for scale in (1.0, 10.0):
        model = family_model("gemma4_text:shared")
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(scale)
        view = ModelView(model)
        found.append(measure_attention(view, text, IMPORTANCE["variance"], 1, lambda layers: None))
    (scores, bases), (other_scores, other_bases) = found
    for layer, own in enumerate(scores):
        torch.testing.assert_close(other_scores[layer].qk, own.qk, rtol=1e-3, atol=1e-3 * float(own.qk.max()))
        for head in range(2):  # directions of values may change their sign
            first, second = (b[layer].values[head, :4] for b in (bases, other_bases))
            torch.testing.assert_close((first @ second.T).abs().diagonal(), first.square().sum(1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("merge", ["1", "all"])
@pytest.mark.parametrize("name", VARIANTS)
def test_fit_counts_the_numbers_that_there_are(name, merge):
    config = family_model(name).config
    shape = ModelView(family_model(name)).shape
    number = 1 if merge == "1" else shape.shared_heads
    pruned = random_model(pruned_config(config, 0.5, 2, number), torch.device("meta"), torch.float32)
    cut = Cut(0.5, number, shape.head_dims[0] * number / 2)
    assert Weights.of(config, is_portable=False).kept(cut) == parameters(pruned)


@torch.no_grad()
def test_tensors_that_checkpoints_have_for_shared_layers_are_left_out(texts, tmp_path):
    """Published ones hold projections that no layer uses."""
    source = saved("gemma4_text:shared", tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    for name in ("k_proj", "v_proj"):
        tensors[f"model.layers.2.self_attn.{name}.weight"] = torch.randn(HEADS * 8, HEADS * 16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(3, VOCABULARY, (1, 9))
    assert torch.equal(kvprune.load(source)(ids).logits, AutoModelForCausalLM.from_pretrained(source)(ids).logits)
    kvprune.prune(source, tmp_path / "out", ratio=0.5, **COARSE)


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_finds_layers_that_share_keys_together(after, texts, tmp_path, monkeypatch):
    source, keep, kept = saved("gemma4_text:shared", tmp_path / "dense"), Journal.keep_layer, []

    def interrupted(journal, *layer):
        if len(kept) == after:
            raise KeyboardInterrupt
        kept.append(layer[0])
        return keep(journal, *layer)

    options = COARSE | {"ratio": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kvprune.prune(source, tmp_path / "out", **options)
    assert kept == [0, 2, 1][:after]
    resumed = kvprune.prune(source, tmp_path / "out", resume=True, **options)
    whole = kvprune.prune(source, tmp_path / "whole", **options)
    assert resumed.plan.layers == whole.plan.layers
    tensors = whole.model.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in resumed.model.state_dict().items())


def test_two_ranks_by_transformers_plan(tmp_path):
    pytest.importorskip("transformers.distributed.parallel_utils", reason="the DTensor plans of newer transformers")
    _, pruned = without_channels(family_model("gemma4_text:shared", "sdpa"))
    save(pruned, tiny_tokenizer(), "{}", dict, tmp_path / "pruned")
    script = Path(__file__).parents[1] / "runtime" / "two_ranks.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    subprocess.run([*launch, tmp_path / "pruned"], check=True, timeout=240)
