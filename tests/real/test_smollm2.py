"""SmolLM2-135M-Instruct, pruned through the command line: by default once for all tests, and by two other scores."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.runtime.modeling import CACHE

MODEL = os.environ.get("KVPRUNE_TEST_MODEL", "missing")
PRUNED = Path(os.environ.get("KVPRUNE_TEST_PRUNED", "missing"))  # a quarter cut, by the Makefile
QUICK = ["--calibration", "wiki", "--calibration-tokens", "4096", "--eval-tokens", "4096", "--window", "512"]
OTHERS = {
    importance: ["--ratio", "0.5", "--importance", importance, "--repair", "none", "--allocation", "uniform"]
    for importance in ("energy", "taylor")
}
# Far from the published tables (docs/results-width.md) means that something broke, in either direction.
PERPLEXITY_RATIOS = {"default": (1.01, 1.5), "energy": (1.5, 8), "taylor": (1.5, 8)}


@pytest.fixture(scope="module", params=["default", *OTHERS])
def pruned(request, tmp_path_factory):
    """(folder, record) of one run in a process of its own, so that its peak memory is its own."""
    if request.param == "default":
        return PRUNED, kvprune.read_record(PRUNED)
    out = tmp_path_factory.mktemp(request.param) / "out"
    command = [sys.executable, "-m", "kvprune.cli", "prune", MODEL, "--out", str(out), "--json"]
    result = subprocess.run([*command, *OTHERS[request.param], *QUICK], check=True, stdout=subprocess.PIPE)
    return out, json.loads(result.stdout)


def test_the_bytes_of_a_real_cache(pruned):
    folder, record = pruned
    kv = record["kv_bytes_per_token"]
    assert kv["dense"] == 2 * 30 * 3 * 64 * 2
    assert abs(kv["pruned"] / kv["dense"] - (1 - record["ratio"])) <= 0.01
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The Eiffel Tower is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    tensors = [t for layer in out[CACHE].layers for t in (layer.keys, layer.values)]
    assert len(tensors) == 60
    size = sum(t.numel() * t.element_size() for t in tensors)
    assert size * 2 == kv["pruned"] * model.dtype.itemsize * out[CACHE].get_seq_length()


def test_memory_stays_within_the_formula(pruned):
    _, record = pruned
    allowed = sum(record["memory_formula_bytes"].values())
    name = record["method"]["importance"] + ", " + record["method"]["repair"]
    print(f"\n{name}: peak {record['peak_memory_bytes'] / 1e6:.0f} MB, formula {allowed / 1e6:.0f} MB")
    assert 0 < record["peak_memory_bytes"] <= allowed


def test_quality_is_what_it_was(pruned):
    (row,) = pruned[1]["perplexity"]
    assert 10 < row["dense"] < 40
    low, high = PERPLEXITY_RATIOS["default" if pruned[1]["refit"] else "energy"]
    assert row["dense"] * low < row["pruned"] < row["dense"] * high


@torch.no_grad()
def test_masked_dense_model_agrees(pruned):
    """In float32, on the real weights: the pruned logits are the masked dense model's."""
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
    from tiny import mask_dense

    plan = kvprune.PruningPlan.read(pruned[0])
    if plan.is_rotated:
        pytest.skip("a rotated cut is compared with the projected dense model on tiny models")
    dense = kvprune.load(MODEL, dtype="float32")
    from kvprune.channels.cut.surgery import cut
    from kvprune.models.view import ModelView

    ids = torch.randint(0, 49152, (1, 64))
    small = cut(ModelView(dense), plan)(ids).logits
    masked = mask_dense(dense, [(layer.qk, layer.vo) for layer in plan.layers])(ids).logits
    torch.testing.assert_close(small, masked, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_compiled_forward():
    """torch.compile of the forward, with the default backend where there is a compiler for it."""
    model = AutoModelForCausalLM.from_pretrained(PRUNED, dtype=torch.float32)
    ids = torch.randint(0, 49152, (1, 16))
    expected = model(ids, use_cache=False).logits
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-3)
