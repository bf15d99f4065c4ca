"""Sampled text against a plain loop with the same random numbers."""

import pytest
import torch
from transformers import GenerationConfig

import kvprune
from kvprune.errors import NotFinite
from kvprune.text.sampled import DOCUMENTS, sample_ids
from tiny import COARSE, tiny_model, tiny_tokenizer


def test_equals_a_plain_loop():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    steps = []
    found = sample_ids(model, tokenizer, 500, 16, 7, steps.append)
    assert found.shape == (500,)
    assert sum(steps) == 500
    torch.manual_seed(7)
    ids = torch.full((DOCUMENTS, 1), tokenizer.bos_token_id)
    with torch.no_grad():
        for _ in range(16):
            probabilities = model(ids).logits[:, -1].float().softmax(-1)
            ids = torch.cat((ids, torch.multinomial(probabilities, 1)), 1)
    assert torch.equal(found, ids[:, 1:].flatten()[:500])
    longer = sample_ids(model, tokenizer, 600, 16, 7, lambda n: None)
    assert torch.equal(longer[:500], found)
    assert longer.shape == (600,)
    assert not torch.equal(longer[512:], longer[:88])


def test_an_end_token_ends_nothing():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():  # the hidden state does not matter: the end token always wins
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(300))
        model.lm_head.bias[tokenizer.eos_token_id] = 50
    others = {"cache_implementation": "static", "num_beams": 2, "use_cache": False, "max_length": 3}
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, repetition_penalty=9.0, **others)
    assert sample_ids(model, tokenizer, 20, 20, 0, lambda n: None).tolist() == [tokenizer.eos_token_id] * 20


def test_the_caller_keeps_its_random_numbers():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = sample_ids(model, tokenizer, 32, 16, 0, lambda n: None)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(sample_ids(model, tokenizer, 32, 16, 0, lambda n: None), first)
    assert not torch.equal(sample_ids(model, tokenizer, 32, 16, 1, lambda n: None), first)


def test_prune_without_any_text(checkpoint, tmp_path, monkeypatch):
    """Judged on other sampled text; the same seed gives the same plan."""
    monkeypatch.delenv("KVPRUNE_DATA", raising=False)
    first = kvprune.prune(
        checkpoint, tmp_path / "out", ratio=0.5, calibration="self", **{**COARSE, "repair_tokens": 1024}
    )
    assert [row["text"] for row in first.record["perplexity"]] == ["self", "self"]
    assert (first.plan.calibration["text"], first.plan.calibration["tokens"]) == ("self", 512)
    again = kvprune.prune(checkpoint, ratio=0.5, calibration="self", **{**COARSE, "repair_tokens": 1024})
    assert again.plan == first.plan


def test_broken_logits_are_a_message():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"lm_head\.weight holds NaN"):
        sample_ids(model, tiny_tokenizer(), 20, 20, 0, lambda n: None)
