"""Layout stock: a stock model of fewer KV heads, equal to the projected dense one, with kvprune nowhere near."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import kvprune
from kvprune.channels.choice.basis import identity
from kvprune.channels.choice.selection import one_of_each
from kvprune.channels.cut.surgery import cut
from kvprune.channels.plan import PruningPlan
from kvprune.channels.planning import choose_merge
from kvprune.channels.settings import Settings
from kvprune.errors import BadOption, PlanMismatch, UnreachableRatio
from kvprune.models.attention import AttentionShape
from kvprune.models.view import ModelView
from kvprune.progress import Progress
from kvprune.runtime.modeling import CACHE
from tiny import (
    COARSE,
    FAMILIES,
    QUICK,
    STILL,
    VOCABULARY,
    make_plan,
    measured_bases,
    project_dense,
    random_bases,
    tiny_model,
)

KV = 4
TEXT = QUICK | {"windows": (64,)}
# Runs where kvprune cannot be imported: logits, and that what is generated with a cache is what is without.
ALONE = """
import sys
sys.modules["kvprune"] = None
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

with torch.no_grad():
    for folder in map(Path, sys.argv[1:]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = load_file(folder / "ids")
        found = {name: model(x).logits for name, x in ids.items()}
        how = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        for name, use_cache in (("cached", True), ("uncached", False)):
            out = model.generate(ids["short"], use_cache=use_cache, **how)
            found[name] = torch.stack(out.logits, 1)
        save_file(found, folder / "found")
"""


def stock_plan(model, bases) -> PruningPlan:
    """As `prune` makes it: the same coordinates in all groups and layers."""
    kept = one_of_each(bases[0]).qk.tolist()
    layers = [(kept, None, basis.heads.tolist()) for basis in bases]
    plan = make_plan(model, layers, merge=bases[0].heads.shape[1])
    return plan.model_copy(update={"layout": "stock"})


def text(*sizes):
    return torch.randint(3, VOCABULARY, sizes, generator=torch.Generator().manual_seed(1))


CASES = [
    (family, groups, merge)
    for family in sorted(FAMILIES)
    if family != "qwen2-sliding"
    for groups, merge in ((1, 2), (3, 2), (3, KV))
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of every case, and what plain transformers makes of them in a process of its own."""
    place = tmp_path_factory.mktemp("stock")
    expected, folders = {}, {}
    # Longer than the model takes, and than longrope's short factors: RoPE that changes with the context then does.
    ids = {"short": text(2, 30), "long": text(1, 140)}
    for case in CASES:
        family, groups, merge = case
        dense = tiny_model(family, kv_heads=KV, groups=groups)
        bases = random_bases(dense, merge)
        plan = stock_plan(dense, bases)
        folder = folders[case] = place / "-".join(map(str, case))
        cut(ModelView(dense), plan, bases).save_pretrained(folder)
        dense.config.save_pretrained(folder / "dense")
        save_file(ids, folder / "ids")
        projected = project_dense(dense, plan, bases)
        with torch.no_grad():
            expected[case] = {name: projected(x).logits for name, x in ids.items()}
            expected[case]["dense"] = dense(ids["short"]).logits
    subprocess.run([sys.executable, "-c", ALONE, *map(str, folders.values())], check=True)
    return {case: (folders[case], expected[case], load_file(folders[case] / "found")) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_plain_transformers_equals_the_projected_dense_model(alone, case):
    _, expected, found = alone[case]
    for name in ("short", "long"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)  # of up to 6, in float32
    assert (expected["dense"] - expected["short"]).abs().max() > 1e-3
    torch.testing.assert_close(found["cached"], found["uncached"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_config_is_the_dense_one_with_fewer_kv_heads(alone, case):
    family, _, merge = case
    folder, _, _ = alone[case]
    assert not list(folder.glob("*.py"))
    own, dense = (json.loads((place / "config.json").read_text()) for place in (folder, folder / "dense"))
    changed = {name for name in own if name not in dense or own[name] != dense[name]}
    own_to_llama = {"model_type", "attention_bias", "mlp_bias", "pretraining_tp"} if family == "qwen2" else set()
    # a dense model that was never saved has no class and no dtype
    assert changed - {"architectures", "dtype"} == {"num_key_value_heads", *own_to_llama}
    assert own["num_key_value_heads"] == KV // merge
    assert own["head_dim"] == 16
    assert own["rope_parameters"] == dense["rope_parameters"]
    assert own["model_type"] == ("mistral" if family == "mistral" else "llama")


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2"])
@pytest.mark.parametrize(("groups", "merge"), [(1, 2), (3, 2), (3, KV), (2, 1)])
@torch.no_grad()
def test_slow_pairs_that_do_not_turn(family, groups, merge):
    """Seven of eight pairs are mixed, over pairs and heads; each direction gets a pair of its own."""
    dense = tiny_model(family, kv_heads=KV, groups=groups, **STILL)
    bases = measured_bases(dense, merge, slow=True)
    assert all(len(basis.slow) == 14 for basis in bases)
    plan = stock_plan(dense, bases)
    assert [len(kept) for kept in plan.layers[0].qk] == [16] * (KV // merge)
    pruned = cut(ModelView(dense), plan, bases)
    assert type(pruned) is LlamaForCausalLM
    ids = text(2, 11)
    expected = project_dense(dense, plan, bases)(ids).logits
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=1e-4, atol=2e-5)


def test_one_coordinate_of_each_pair():
    """The plan's rule, in plain words: the first component of every fast pair, and the leading slow directions, which
    come behind the fast ones."""
    theta = {"rope_type": "default", "rope_theta": 1e12}
    dense = tiny_model("llama", kv_heads=KV, rope_parameters=theta, positions=2048)
    (basis, _) = measured_bases(dense, 2, slow=True)
    assert basis.slow[::2].tolist() == [7, 6, 5, 4, 3]
    kept = one_of_each(basis)
    half = [0, 2, 4, 6, 7, 8, 9, 10]
    assert kept.qk.tolist() == [[*half, *(c + 16 for c in half)]] * 2
    assert kept.vo.tolist() == [list(range(16))] * 2
    assert one_of_each(identity(KV, 16)).qk.tolist() == [list(range(16))] * KV


@torch.no_grad()
def test_a_plan_of_other_coordinates():
    """Any component of each pair makes a stock head; two of one pair do not."""
    dense = tiny_model("llama", kv_heads=KV)
    bases = random_bases(dense, 2)
    plan = stock_plan(dense, bases)

    def keeping(half):
        layers = (layer.model_copy(update={"qk": (half + tuple(c + 16 for c in half),) * 2}) for layer in plan.layers)
        return plan.model_copy(update={"layers": tuple(layers)})

    second = keeping(tuple(range(1, 16, 2)))
    ids = text(2, 11)
    expected = project_dense(dense, second, bases)(ids).logits
    torch.testing.assert_close(cut(ModelView(dense), second, bases)(ids).logits, expected, rtol=0, atol=1e-5)
    for half in (tuple(range(8)), tuple(range(0, 14, 2))):
        with pytest.raises(PlanMismatch, match="one coordinate of each RoPE pair"):
            cut(ModelView(dense), keeping(half), bases)
    other = plan.layers[0].model_copy(update={"qk": second.layers[0].qk})
    with pytest.raises(PlanMismatch, match="same qk"):
        cut(ModelView(dense), plan.model_copy(update={"layers": (plan.layers[0], other)}), bases)


def test_prune_to_the_stock_layout(checkpoint, texts, tmp_path):
    result = kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, layout="stock", **TEXT)
    assert result.plan.widths == [32] * 4
    assert result.plan.merge == 2
    assert result.record["ratio_achieved"] == 0.5
    assert len(result.record["refit"]) == 8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is LlamaForCausalLM
    out = model.generate(text(1, 7), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    tensors = [tensor for layer in out[CACHE].layers for tensor in (layer.keys, layer.values)]
    assert [tensor.shape for tensor in tensors] == [(1, 1, 9, 32)] * 8
    (row,) = result.record["perplexity"]
    (again,) = kvprune.evaluate(tmp_path / "out", window_lengths=(64,), tokens=512)["perplexity"]
    assert again["values"] == [pytest.approx(row["pruned"], rel=1e-6)]
    applied = kvprune.prune(checkpoint, plan=tmp_path / "out" / "plan.json", **TEXT)
    for name, tensor in applied.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor)


def test_nothing_is_removed_at_ratio_zero(checkpoint, texts):
    model = kvprune.prune(checkpoint, ratio=0.0, layout="stock", **TEXT).model
    ids = text(2, 9)
    torch.testing.assert_close(model(ids).logits, kvprune.load(checkpoint)(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kv_heads", "ratio", "merge"), [
    (8, 0.5, 2), (8, 0.6, 2), (8, 0.65, 4), (8, 0.75, 4), (8, 0.875, 8), (8, 0.95, 8),
    (3, 0.67, 3), (3, 0.5, 3), (3, 0.34, 3), (6, 0.6, 3), (6, 0.5833, 2), (2, 0.26, 2), (2, 0.0, 1), (1, 0.0, 1),
])  # fmt: skip
def test_the_nearest_ratio_says_how_many_heads(kv_heads, ratio, merge):
    shape = AttentionShape(layers=1, hidden=8, kv_heads=kv_heads, groups=1, head_dim=512)
    settings = Settings(source="", layout="stock", ratio=ratio)
    assert choose_merge(settings, shape, print) == merge
    same = Settings(source="", layout="stock", ratio=ratio, merge=merge)
    assert choose_merge(same, shape, print) == merge


def test_a_ratio_that_is_not_reached_is_said(checkpoint, texts, monkeypatch):
    said: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", said.append)
    result = kvprune.prune(checkpoint, ratio=0.6, layout="stock", repair="rotate", progress=progress, **TEXT)
    assert result.plan.ratio_achieved == 0.5
    assert any("2 into one is the nearest, ratio 0.5" in message for message in said)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"ratio": 0.2}, UnreachableRatio, r"nearest to removing nothing.*0.5 \(merge 2\)"),
    ({"ratio": 1.0}, UnreachableRatio, "below 1"),
    ({"ratio": float("nan")}, UnreachableRatio, "below 1"),
    ({"ratio": 0.5, "merge": 1}, BadOption, r"--merge 1 contradicts --ratio 0.5 \(merge 2\)"),
    ({"ratio": 0.5, "repair": "none"}, BadOption, "--layout stock merges KV heads"),
    ({"ratio": 0.5, "importance": "energy"}, BadOption, "--layout stock merges KV heads"),
    ({"ratio": 0.5, "allocation": "budget"}, BadOption, "one width"),
])  # fmt: skip
def test_what_cannot_be_is_refused(checkpoint, texts, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        kvprune.prune(checkpoint, tmp_path / "out", layout="stock", **COARSE, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [2, 4])
def test_the_heads_that_must_be_merged_to_fit(merge, tmp_path):
    """The memory that the pruned model and its cache take is just enough for it, and for nothing larger."""
    dense = tiny_model("qwen2", kv_heads=KV, groups=2)
    dense.save_pretrained(tmp_path)
    bases = random_bases(dense, merge)
    weights = sum(p.numel() * 4 for p in cut(ModelView(dense), stock_plan(dense, bases), bases).parameters())
    cache = 2 * 2 * (KV // merge) * 16 * 4 * 64 * 100  # two layers of K and V, 64 sequences of 100 tokens
    how = {"context": 100, "batch": 64, "reserve": 0.0, "layout": "stock"}
    report = kvprune.fit(tmp_path, memory=weights + cache, **how)
    assert (report["merge"], report["ratio"]) == (merge, 1 - 1 / merge)
    assert report["pruned"]["total"] == weights + cache
    assert report["largest_ratio"] == 0.75
    less = kvprune.fit(tmp_path, memory=weights + cache - 1, **how)
    assert less["ratio"] == (0.75 if merge == 2 else None)


def test_prune_to_what_fits(checkpoint, texts):
    dense = kvprune.fit(checkpoint, memory="1GiB", context=100, batch=64, layout="stock")["dense"]
    options = {"fit": int(dense["total"] * 0.8), "context": 100, "batch": 64, "reserve": 0.0, "repair": "rotate"}
    assert kvprune.prune(checkpoint, layout="stock", **options, **TEXT).plan.merge == 2


def test_sliding_windows_that_llama_does_not_have():
    model = tiny_model("qwen2-sliding", kv_heads=KV)
    bases = random_bases(model, 2)
    with pytest.raises(BadOption, match="layout stock writes qwen2 as llama"):
        cut(ModelView(model), stock_plan(model, bases), bases)
