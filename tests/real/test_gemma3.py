"""A real model with norms on q and k, windows, and norms before the residual stream: Gemma 3 270M, from a GGUF file."""

import os
from pathlib import Path

import pytest
import torch

import kvprune
from kvprune.measure.perplexity import perplexity
from kvprune.text.corpus import read_text
from kvprune.text.windows import cut_windows, start_token, token_ids, windows

MODEL = Path(os.environ.get("KVPRUNE_TEST_GEMMA", "missing"))
TOKENS = 4096


@pytest.fixture(scope="module")
def dense():
    return kvprune.load(MODEL), kvprune.load_tokenizer(MODEL)


def test_every_window_begins_with_the_start_token(dense):
    """Without it Gemma is another model."""
    model, tokenizer = dense
    text = read_text("wiki", "test")
    with_start = perplexity(model, windows(text, tokenizer, 512, TOKENS))
    without = perplexity(model, cut_windows(token_ids(text, tokenizer, TOKENS), 512))
    print(f"\nperplexity {with_start.value:.2f}, without a start token {without.value:.2f}")
    assert start_token(tokenizer) == 2
    assert with_start.value * 1.5 < without.value


def test_a_quarter_less(dense, tmp_path):
    """Of one KV head of 256 channels, chosen behind the norm."""
    result = kvprune.prune(
        MODEL,
        tmp_path / "out",
        ratio=0.25,
        calibration="wiki",
        calibration_tokens=8192,
        repair_tokens=16384,
        eval_tokens=TOKENS,
        windows=(512,),
    )
    (row,) = result.record["perplexity"]
    print(f"\nperplexity {row['dense']:.2f} -> {row['pruned']:.2f}")
    assert row["pruned"] < 1.4 * row["dense"]
    kv = result.record["kv_bytes_per_token"]
    assert kv["pruned"] / kv["dense"] == pytest.approx(0.75, abs=0.01)
    loaded = kvprune.load(tmp_path / "out")
    ids = windows(read_text("wiki", "test"), dense[1], 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits)
