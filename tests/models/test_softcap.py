"""A cap on attention's scores is heeded, whatever transformers takes for such a family."""

import pytest
import torch
from every_family import VOCABULARY, family_model
from transformers import AutoModelForCausalLM

import kvprune
from tiny import COARSE, tiny_tokenizer

IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def dense(tmp_path):
    """Eager, and with scores so large that their cap decides."""
    model = family_model("gemma2")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).weight, std=1.0)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return model


@torch.no_grad()
def test_a_dense_model(dense, tmp_path):
    expected = dense(IDS).logits
    torch.testing.assert_close(kvprune.load(tmp_path / "dense")(IDS).logits, expected, rtol=0, atol=1e-5)
    for layer in dense.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (dense(IDS).logits - expected).abs().max() > 0.1


@torch.no_grad()
def test_a_pruned_folder(dense, texts, tmp_path):
    """Read by transformers alone as by kvprune; made of a folder, or of a model in memory with another attention."""
    options = COARSE | {"ratio": 0.25}
    from_disk = kvprune.prune(tmp_path / "dense", tmp_path / "out", **options)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    in_memory = kvprune.prune(other, tokenizer=tiny_tokenizer(), **options)
    assert in_memory.plan.layers == from_disk.plan.layers
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits = pruned(IDS).logits
    torch.testing.assert_close(kvprune.load(tmp_path / "out")(IDS).logits, logits, rtol=0, atol=1e-5)
    assert pruned.config._attn_implementation == "eager"
    for layer in pruned.model.layers:
        layer.self_attn.softcap = None
    assert (pruned(IDS).logits - logits).abs().max() > 0.1
