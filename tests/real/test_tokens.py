"""Token filtering on a real model: what it costs, and that the asked share is reached on three kinds of text."""

import os
from pathlib import Path

import pytest
import torch

import kvprune
from kvprune.runtime.modeling import CACHE
from kvprune.text.corpus import read_text
from kvprune.text.windows import token_ids, windows

MODEL = os.environ.get("KVPRUNE_TEST_MODEL")
SOURCE = Path(kvprune.__file__).parent

pytestmark = pytest.mark.skipif(not MODEL, reason="needs the real model: make test-models")


@pytest.fixture(scope="module")
def model():
    return kvprune.load(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return kvprune.load_tokenizer(MODEL)


def text_of(kind):
    prose = read_text("wiki", "test")
    return {
        "prose": prose,
        "code": "\n".join(path.read_text() for path in sorted(SOURCE.rglob("*.py"))),
        "repeated": f"{prose.splitlines()[0]}\n" * 400,
    }[kind]


@pytest.mark.parametrize("kind", ["prose", "code", "repeated"])
def test_the_asked_share_is_reached(model, tokenizer, kind):
    ids = token_ids(text_of(kind), tokenizer, 2048)
    assert len(ids) == 2048
    with torch.no_grad(), kvprune.TokenFilter(0.25)(model) as f:
        cache = model(ids[None], logits_to_keep=1)[CACHE]
    assert f.report["ratio_achieved"] == pytest.approx(0.25, abs=0.02)
    kept = sum(int(layer.lengths[0]) if hasattr(layer, "lengths") else layer.keys.shape[2] for layer in cache.layers)
    assert f.report["kv_bytes"] == kept * 2 * 3 * 64 * 2
    print(kind, f.report["ratio_achieved"], f.report["kv_bytes"] / f.report["kv_bytes_dense"])


def test_studied_layers_cost_less(model, tokenizer):
    pages = windows(read_text("wiki", "test"), tokenizer, 512, 4096)
    dense = kvprune.perplexity(model, pages).value
    layers = kvprune.study_layers(MODEL, text="wiki", tokens=4096)["layers"]
    ratios = {}
    for name, options in (("last", {}), ("studied", {"layers": layers}), ("paper", {"preset": "paper"})):
        with kvprune.TokenFilter(0.25, **options)(model):
            ratios[name] = kvprune.perplexity(model, pages).value / dense
    print(ratios)
    assert ratios["studied"] < 1.45
    assert ratios["studied"] < ratios["last"] < ratios["paper"]
