"""Every family on its way through prune: what probes see, what refit mends, what is written, and token filters."""

from contextlib import ExitStack

import pytest
import torch
from every_family import OPTIONS, VOCABULARY, family_model, type_of
from test_every_family import one_for_each_store, without_channels
from transformers import CONFIG_MAPPING, DynamicCache

import kvprune
from kvprune.channels.choice.basis import Kept, basis_of, slow_channels
from kvprune.channels.cut.surgery import cut
from kvprune.channels.evidence.moments import attention_moments
from kvprune.channels.repair.refit import refit
from kvprune.channels.widths.masking import masked
from kvprune.measure.fit import fit
from kvprune.measure.shapes import pruned_config, random_model
from kvprune.models.logits import Head
from kvprune.models.tap import tapped
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from tiny import COARSE, make_plan, tiny_tokenizer

KNOWN = [name for name in OPTIONS if type_of(name) in CONFIG_MAPPING]
TEXT = list(torch.randint(3, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(2)).split(4))
JOINS = [
    "llama",
    "granite",
    "gemma3_text",
    "gemma4_text:experts",
    "olmo2",
    "glm4",
    "gpt2",
    "opt",
    "phi",
    "cohere",
    "mixtral",
    "gpt_oss",
    "lfm2",
    "qwen3_5_text",
]
NOT_ADMITTED = ["gemma2", "gpt_oss", "mistral", "phi3", "gemma4_text:shared"]
WHOLE = ["qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "gpt_oss", "olmo2", "qwen3_moe", "cohere2"]
WHOLE += ["hunyuan_v1_dense", "lfm2", "ministral3", "qwen3_5_text", "qwen3_next"]
WHOLE += [name for name in KNOWN if type_of(name) == "gemma4_text"]


def half(model, width=None):
    """(bases, plan) that keep the leading half of as many KV heads merged into one as every layer can."""
    view = ModelView(model)
    merge = view.shape.shared_heads
    slow = [slow_channels(a) for a in view.attention]
    moments = attention_moments(view, TEXT, slow, merge, lambda n: None)
    bases = [basis_of(m, a.weights(), s)[0] for m, a, s in zip(moments, view.attention, slow, strict=True)]
    bases, layers = one_for_each_store(view, bases), []
    for basis in bases:
        n, pairs = basis.width // 2, (width or basis.width // 2) // 2
        fast = pairs * basis.turning // n
        kept = [*range(fast), *range(basis.turning, basis.turning + pairs - fast)]
        layers.append(([sorted(kept + [p + n for p in kept])] * len(basis.heads), None, basis.heads.tolist()))
    return bases, make_plan(model, layers, merge=merge)


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_probes_see_the_model_that_is_cut(name):
    model = family_model(name)
    view, (bases, plan) = ModelView(model), half(model)
    ids = torch.randint(3, VOCABULARY, (2, 15))
    expected, dense = cut(view, plan, bases)(ids).logits, model(ids).logits
    with tapped(view), ExitStack() as stack:
        for attention, layer, basis in zip(view.attention, plan.layers, bases, strict=True):
            leading = torch.arange(layer.width).repeat(len(layer.qk), 1)
            stack.enter_context(masked(attention, Kept(torch.tensor(layer.qk), leading), basis))
        found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (dense - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", JOINS)
@torch.no_grad()
def test_refit_brings_every_way_to_join_the_stream_back(name):
    model = family_model(name)
    view, before, pruned = ModelView(model), without_channels(model)[1], without_channels(model)[1]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    text = list(torch.randint(3, VOCABULARY, (64, 32), generator=torch.Generator().manual_seed(2)).split(16))
    found = refit(view, pruned, text, lambda n: None)
    assert {row.matrix for row in found} == ({"o", "down"} if view.family.down else {"o"})
    assert all(row.after <= row.before for row in found)
    fitted = torch.cat(text)
    p = model(fitted).logits.log_softmax(-1)

    def lost(other):
        return float((p.exp() * (p - other(fitted).logits.log_softmax(-1))).sum(-1).mean())

    assert lost(pruned) < 0.9 * lost(before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_the_head_is_the_familys(name):
    model, ids = family_model(name), torch.randint(3, VOCABULARY, (1, 9))
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(Head.of(model)(hidden), model(ids).logits)


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_a_pruned_shape_is_that_of_the_cut_model(name):
    model = family_model(name)
    bases, plan = half(model)
    expected = cut(ModelView(model), plan, bases)
    config = pruned_config(model.config, 0.5, 2, plan.merge)
    found = random_model(config, torch.device("cpu"), torch.float32)
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    for said in ("words", "rope_columns", "rebuilds"):
        assert getattr(config, said) == getattr(expected.config, said)
    assert found(torch.randint(3, VOCABULARY, (2, 9))).logits.isfinite().all()


@pytest.mark.parametrize("name", WHOLE)
def test_from_checkpoint_to_folder(name, texts, tmp_path):
    if type_of(name) not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know the family")
    source, out = tmp_path / "dense", tmp_path / "pruned"
    family_model(name).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    result = kvprune.prune(source, out, ratio=0.5, **COARSE)
    assert result.record["kv_bytes_per_token"]["pruned"] * 2 == result.record["kv_bytes_per_token"]["dense"]
    loaded, ids = kvprune.load(out), torch.randint(3, VOCABULARY, (1, 11))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=0, atol=1e-5)
        cache = loaded(ids, use_cache=True)[CACHE]
    # Some attend to another's, or have a state
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = sum((layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[2] for layer in filled)
    assert held == result.record["kv_bytes_per_token"]["pruned"]
    found = fit(source, memory="1GiB", context=16, align=2, min_width=4)
    assert found["weights_read_bytes"]["dense"] == result.record["weights_read_bytes"]["dense"]


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in NOT_ADMITTED])
@torch.no_grad()
def test_late_admission_that_keeps_all_is_the_model(name):
    dense = family_model(name, "sdpa")
    bases, plan = half(dense)
    for model in (dense, cut(ModelView(dense), plan, bases)):
        ids = torch.randint(3, VOCABULARY, (2, 30))
        expected = model(ids).logits
        with kvprune.TokenFilter(keep=1.0, block=4, window=4)(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        with kvprune.TokenFilter(keep=0.5, block=4, window=4)(model) as f:
            cache = DynamicCache(config=model.config)
            found = model(ids, **{CACHE: cache}).logits
            assert (found - expected).abs().max() > 1e-4
            assert f.report["keep_achieved"] < 0.8
    assert len(cache.layers) == dense.config.num_hidden_layers
