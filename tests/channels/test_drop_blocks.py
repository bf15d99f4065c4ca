"""Whole blocks that go: the ones that cost least in truth, a constant in their place, and what cannot be."""

import copy
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.channels.journal import Journal
from kvprune.channels.plan import PruningPlan
from kvprune.channels.repair.refit import refit
from kvprune.channels.widths import blocks as module
from kvprune.channels.widths.asked import ratio_left
from kvprune.channels.widths.blocks import choose_blocks
from kvprune.errors import BadOption, KVPruneError, PlanMismatch, UnreachableRatio
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from tiny import COARSE, VOCABULARY, Counted, make_plan, stop, tiny_model, tiny_tokenizer

IDS = torch.randint(3, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(1))
LAYERS = 5


class Replaced(torch.nn.Module):
    """In the list of blocks, in place of one."""

    def __init__(self, constant):
        super().__init__()
        self.constant = constant

    def forward(self, hidden_states, **_kwargs):
        return hidden_states + self.constant


def model_of(family="llama"):
    model = tiny_model(family, layers=LAYERS, groups=2)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):  # not all alike
            layer.mlp.down_proj.weight *= 1 + (number * 3) % LAYERS
            layer.mlp.gate_proj.weight *= 3
    return model


@torch.no_grad()
def streams(model):
    """Hidden states behind every block, the embedding's first."""
    found = []
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda _m, args: found.append(args[0]))]
    hooks += [layer.register_forward_hook(lambda _m, _a, out: found.append(out)) for layer in model.model.layers]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def loss_of(model):
    return model(IDS, labels=IDS).loss.item()


def slowly(model, number, has_constants):
    """(blocks, losses) the plain way: one model for each candidate."""
    gone, rises, dense = [], [], loss_of(model)
    shrunk = copy.deepcopy(model)
    for _ in range(number):
        tried = {}
        means = [(b - a).mean((0, 1)) for a, b in itertools.pairwise(streams(shrunk))]
        for block in set(range(LAYERS)) - set(gone):
            candidate = copy.deepcopy(shrunk)
            candidate.model.layers[block] = Replaced(means[block] if has_constants else 0.0)
            tried[block] = loss_of(candidate), candidate
        best = min(tried, key=lambda block: tried[block][0])
        gone.append(best)
        rises.append(tried[best][0] - dense)
        shrunk = tried[best][1]
    return gone, rises


@pytest.mark.parametrize("has_constants", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding"])
def test_greedy_as_the_plain_way_does_it(family, has_constants):
    model = model_of(family)
    counted = Counted()
    with counted.phase("blocks", 15) as advance:
        found = choose_blocks(ModelView(model), list(IDS.split(2)), 3, has_constants, Journal(), advance)
    assert counted.phases == [["blocks", 15, 15]]
    gone, rises = slowly(model, 3, has_constants)
    assert list(found.layers) == gone
    assert found.losses == pytest.approx(rises, abs=2e-6)
    assert len(found.alone) == LAYERS
    assert min(found.alone) == found.losses[0]
    assert all(constant.abs().max() > 0 for constant in found.constants) == has_constants
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_an_interrupted_choice_goes_on(tmp_path, monkeypatch):
    model = model_of()
    journal = Journal.open(tmp_path / "out", {}, False)
    steps = iter(range(7))  # into the second round
    with pytest.raises(StopIteration):
        choose_blocks(ModelView(model), [IDS], 2, True, journal, lambda n: next(steps))
    again = Journal.open(tmp_path / "out", {}, True)
    assert len(again.losses) == 1 + LAYERS
    measured = []
    own = module.next_token_loss
    monkeypatch.setattr(module, "next_token_loss", lambda *args: measured.append(1) or own(*args))
    found = choose_blocks(ModelView(model), [IDS], 2, True, again, lambda n: None)
    assert len(measured) == 1 + LAYERS - 1  # the first round is there
    known = choose_blocks(ModelView(model), [IDS], 2, True, again, lambda n: None)
    assert len(measured) == LAYERS
    assert known.layers == found.layers
    assert all(map(torch.equal, known.constants, found.constants))
    assert list(found.layers) == slowly(model, 2, True)[0]


@torch.no_grad()
def test_refit_of_a_constant():
    """What is added to the stream is what the block added in the mean, each token counted by its size."""
    dense = tiny_model("llama-bias", layers=4, groups=2)
    every, none = [list(range(16))] * 2, [[], []]
    plan = make_plan(dense, [(every, every), (every, every), (none, none, None, False), (every, every)])
    pruned = cut(ModelView(dense), plan)
    text = list(torch.randint(3, VOCABULARY, (16, 20), generator=torch.Generator().manual_seed(2)).split(4))
    rows = refit(ModelView(dense), pruned, text, lambda n: None)
    (row,) = [row for row in rows if row.layer == 2]
    assert row.after < row.before
    fitted = torch.cat(text)[[i for i in range(16) if i % 8 != 7]]
    states = dense(fitted, output_hidden_states=True).hidden_states
    weights = states[3].square().mean(-1, keepdim=True).reciprocal()
    expected = ((states[3] - states[2]) * weights).sum((0, 1)) / weights.sum((0, 1)) / (1 + row.ridge)
    torch.testing.assert_close(pruned.model.layers[2].self_attn.o_proj.bias, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("depth", "repair"), [(0, "rotate+refit"), (1, "rotate+refit"), ("auto", "rotate")])
def test_from_the_command_line_to_a_folder(checkpoint, texts, tmp_path, depth, repair, command):
    small = ["--calibration-tokens", "512", "--repair-tokens", "4096", "--eval-tokens", "512", "--window", "64"]
    small += ["--align", "2", "--min-width", "4", "--depth", depth, "--repair", repair]
    code, _, err = command("prune", checkpoint, "--out", tmp_path / "out", "--ratio", "0.5", "--drop-blocks", 1, *small)
    assert code == 0, err
    assert "blocks dropped" in err
    record = json.loads((tmp_path / "out" / "kvprune.json").read_text())
    plan = PruningPlan.read(tmp_path / "out")
    (gone,) = record["dropped_blocks"]
    assert plan.dropped_blocks == [gone]
    assert record["widths"][gone] == 0
    assert record["widths"].count(0) == (1 + depth if depth != "auto" else record["widths"].count(0))
    assert record["kv_bytes_per_token"]["dense"] == 2 * record["kv_bytes_per_token"]["pruned"]
    assert record["method"]["drop_blocks"] == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entries = config["per_layer_config"]
    of_layer = {int(i): entry for i, entry in (entries.items() if isinstance(entries, dict) else enumerate(entries))}
    assert [i for i, entry in of_layer.items() if entry.get("block") is False] == [gone]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in loaded.parameters()) == record["parameters"]["pruned"]
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    of_block = sum(p.numel() for p in dense.model.layers[gone].parameters())
    assert sum(p.numel() for p in loaded.model.layers[gone].parameters()) == dense.config.hidden_size < of_block
    constant = loaded.model.layers[gone].self_attn.o_proj.bias.abs().max()
    assert (constant > 0) == ("refit" in repair)
    assert {row["matrix"] for row in record["refit"] if row["layer"] == gone} == ({"o"} if "refit" in repair else set())
    ids = torch.randint(3, VOCABULARY, (1, 9))
    with torch.no_grad():
        cache = loaded(ids, use_cache=True)[CACHE]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 9 * record["kv_bytes_per_token"]["pruned"]
    code, out, _ = command("show", tmp_path / "out")
    assert code == 0
    assert "block dropped" in out
    again = kvprune.prune(checkpoint, plan=tmp_path / "out" / "plan.json", device="cpu", eval_tokens=512,
                          windows=(64,), calibration_tokens=512, calibration_window=64)  # fmt: skip
    assert again.plan.dropped_blocks == [gone]
    assert again.record["widths"] == record["widths"]


def test_an_interrupted_prune_goes_on(checkpoint, texts, tmp_path, monkeypatch):
    whole = kvprune.prune(checkpoint, tmp_path / "whole", ratio=0.5, drop_blocks=1, **COARSE)
    monkeypatch.setattr("kvprune.channels.prune.cut", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, drop_blocks=1, **COARSE)
    monkeypatch.undo()
    monkeypatch.setenv("KVPRUNE_DATA", str(texts))
    monkeypatch.setattr(module, "next_token_loss", stop)  # all is in the journal
    again = kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, drop_blocks=1, resume=True, **COARSE)
    assert again.plan.layers == whole.plan.layers
    assert again.record["perplexity"] == whole.record["perplexity"]


def test_only_blocks_go(tmp_path, texts):
    """Where the ratio is what the blocks take, the others keep all that they had, each head for itself."""
    tiny_model("llama", layers=4, groups=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    result = kvprune.prune(tmp_path / "dense", ratio=0.25, drop_blocks=1, **COARSE)
    assert sorted(result.record["widths"]) == [0, 16, 16, 16]
    assert result.record["merge"] == 1


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"drop_blocks": -1}, BadOption, "--drop-blocks -1 must be how many whole blocks go"),
    ({"drop_blocks": 1.5}, BadOption, "must be how many"),
    ({"drop_blocks": 4}, BadOption, "--drop-blocks 4 leaves none of the 4 layers"),
    ({"drop_blocks": 2, "depth": 2}, BadOption, "--depth 2 and --drop-blocks 2 leaves none"),
    ({"drop_blocks": 3}, UnreachableRatio, "--drop-blocks 3 takes more than --ratio 0.5 of 4 layers; at most 2"),
    ({"drop_blocks": 2, "depth": 1}, UnreachableRatio, "--depth 1 and --drop-blocks 2 takes more"),
    ({"drop_blocks": 1, "ratio": 0.0}, UnreachableRatio, "at most 0"),
    ({"drop_blocks": 1, "layout": "uniform"}, BadOption, "wants --layout per-layer, not uniform"),
    ({"drop_blocks": 1, "layout": "portable"}, BadOption, "wants --layout per-layer"),
    ({"drop_blocks": 1, "layout": "stock"}, BadOption, "wants --layout per-layer"),
    ({"drop_blocks": 1, "allocation": "budget"}, BadOption, "leave out --allocation"),
    ({"drop_blocks": 1, "plan": "plan.json"}, BadOption, "has decided --drop-blocks"),
])  # fmt: skip
def test_what_cannot_be(checkpoint, texts, tmp_path, options, error, message):
    given = {} if "plan" in options else {"ratio": 0.5, **COARSE}
    with pytest.raises(error, match=message):
        kvprune.prune(checkpoint, tmp_path / "out", **given | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "message"), [("-1", "how many whole blocks"), ("9", "leaves none"), ("3", "at most 2")]
)
def test_the_command_says_it_in_a_line(checkpoint, texts, tmp_path, number, message, command):
    code, _, err = command("prune", checkpoint, "--out", tmp_path / "out", "--ratio", "0.5", "--drop-blocks", number)
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert message in err


def test_a_plan_says_it_only_where_it_is_so(tmp_path):
    dense = tiny_model("llama", layers=2)
    every = [list(range(16))] * 2
    plan = make_plan(dense, [(every, every)] * 2)
    assert '"block"' not in plan.to_json()  # an older kvprune reads it
    dropped = make_plan(dense, [(every, every), ([[], []], [[], []], None, False)])
    (tmp_path / "plan.json").write_text(dropped.to_json())
    assert PruningPlan.read(tmp_path / "plan.json") == dropped
    (tmp_path / "plan.json").write_text(dropped.to_json().replace('"qk":[[],[]],"vo":[[],[]]', '"qk":[[1]],"vo":[[1]]'))
    with pytest.raises(PlanMismatch, match="keeps no channels"):
        PruningPlan.read(tmp_path / "plan.json")


def test_what_is_left_to_the_others():
    assert ratio_left(0.5, 30, 0) == 0.5
    assert ratio_left(0.5, 30, 0, "auto") == 0.5
    assert ratio_left(0.5, 10, 1, 1) == pytest.approx(0.375)
    assert ratio_left(0.25, 4, 1) == pytest.approx(0)
    with pytest.raises(KVPruneError, match="--depth 6 takes more"):
        ratio_left(0.5, 10, 0, 6)
