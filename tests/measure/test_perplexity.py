"""Perplexity against transformers' own loss, and bytes against real tensors."""

import json
import math

import pytest
import torch
from transformers import cache_utils

import kvprune
from kvprune import errors
from kvprune.measure import loss as loss_module
from kvprune.measure.memory import cache_bytes, kv_bytes_per_token, parameters
from kvprune.measure.perplexity import perplexity
from kvprune.models.logits import Head
from kvprune.runtime.modeling import CACHE
from tiny import VOCABULARY, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("window", [2, 7, 64])
@pytest.mark.parametrize("piece", [1, 6 * 2**20])
def test_equals_transformers_loss(monkeypatch, window, piece):
    monkeypatch.setattr(loss_module, "PIECE", piece)
    model = tiny_model("llama")
    ids = torch.randint(3, VOCABULARY, (9, window))
    found = kvprune.perplexity(model, ids)
    assert found.value == pytest.approx(math.exp(model(ids, labels=ids).loss.item()), rel=1e-5)
    assert (found.window, found.tokens) == (window, 9 * (window - 1))


def test_gradient_of_the_pieces_is_the_gradient(monkeypatch):
    monkeypatch.setattr(loss_module, "PIECE", 1)
    model = tiny_model("llama", groups=2)
    hidden = torch.randn(2, 21, model.config.hidden_size, requires_grad=True)
    ids = torch.randint(3, VOCABULARY, (2, 21))
    logits = model.lm_head(hidden)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    _, count, grad = loss_module.next_token_loss(Head(model.lm_head), hidden.detach(), ids, gradient=True)
    assert count == 40
    torch.testing.assert_close(grad, hidden.grad, rtol=1e-4, atol=1e-6)


def test_a_broken_model_is_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(errors.NotFinite):
        kvprune.perplexity(model, torch.randint(3, VOCABULARY, (2, 8)))


def test_bytes_of_a_real_cache():
    model = tiny_model("llama", kv_heads=2, groups=2, layers=3)
    cache = model(torch.randint(3, VOCABULARY, (2, 5)), use_cache=True)[CACHE]
    assert cache_bytes(cache) == 2 * 5 * kv_bytes_per_token([16] * 3, 2, torch.float32)
    assert parameters(model) == model.num_parameters()


def test_evaluate_two_sources(checkpoint, texts, tmp_path):
    kvprune.prune(
        checkpoint,
        tmp_path / "p",
        ratio=0.5,
        allocation="uniform",
        calibration_tokens=512,
        eval_tokens=512,
        windows=(64,),
    )
    result = kvprune.evaluate(
        checkpoint, tmp_path / "p", texts=("wikitext2", "ptb"), window_lengths=(16, 64), tokens=512
    )
    dense, pruned = result["sources"]
    assert pruned["kv_bytes_per_token"] * 2 == dense["kv_bytes_per_token"] == 2 * 4 * 2 * 32 * 4
    assert [(r["text"], r["window"]) for r in result["perplexity"]] == [
        ("wikitext2", 16),
        ("wikitext2", 64),
        ("ptb", 16),
        ("ptb", 64),
    ]
    record = kvprune.read_record(tmp_path / "p")["perplexity"][0]
    assert result["perplexity"][1]["values"] == [record["dense"], record["pruned"]]


def test_evaluate_refuses_what_cannot_be_compared(checkpoint, texts, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tiny_model("llama").save_pretrained(tmp_path / "other")
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(errors.BadOption, match="different tokenizers"):
        kvprune.evaluate(checkpoint, tmp_path / "other")
    for tokens in (1, -5):
        with pytest.raises(errors.BadOption, match="--tokens"):
            kvprune.evaluate(checkpoint, tokens=tokens)
    with pytest.raises(errors.BadOption, match="window"):
        kvprune.evaluate(checkpoint, window_lengths=(1,))
    with pytest.raises(errors.BadOption, match="--window 129 is more than the 128 tokens"):
        kvprune.evaluate(checkpoint, window_lengths=(64, 129))
    tiny_model("llama", groups=2, head_dim=32, layers=4, positions=512).save_pretrained(tmp_path / "longer")
    tiny_tokenizer().save_pretrained(tmp_path / "longer")
    with pytest.raises(errors.BadOption, match=r"--window 256 is more than the 128 tokens .*tiny-llama"):
        kvprune.evaluate(tmp_path / "longer", checkpoint, window_lengths=(256,))
    assert kvprune.evaluate(tmp_path / "longer", checkpoint, tokens=512)["perplexity"][0]["window"] == 128
    assert kvprune.evaluate(tmp_path / "longer", tokens=1024)["perplexity"][0]["window"] == 512
    if hasattr(cache_utils, "Fp8QuantizedLayer"):
        with pytest.raises(errors.BadOption, match="before any is quantised"):
            kvprune.evaluate(tmp_path / "longer", window_lengths=(128, 512), kv_bits=8)


def test_what_is_not_finite_or_too_large_does_not_take_the_rest_with_it(checkpoint, texts, tmp_path, monkeypatch):
    model = kvprune.load(checkpoint)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    found = kvprune.evaluate(checkpoint, tmp_path / "nan", texts=("ptb",), window_lengths=(64,), tokens=512)
    alone = kvprune.evaluate(checkpoint, texts=("ptb",), window_lengths=(64,), tokens=512)
    assert found["perplexity"][0]["values"] == [*alone["perplexity"][0]["values"], None]
    assert "not finite" in found["errors"][0]
    assert alone["errors"] == []

    def no_room(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("kvprune.measure.evaluate.perplexity", no_room)
    assert "out of memory" in kvprune.evaluate(checkpoint, texts=("ptb",), tokens=512)["errors"][0]


def test_a_huge_perplexity_is_a_number_that_json_holds():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    value = perplexity(model, torch.randint(3, VOCABULARY, (2, 16))).value
    assert value == pytest.approx(math.exp(700))
    json.dumps(value, allow_nan=False)
