"""What a model writes with a cache is what it writes without one: every family, cache, attention function, and name
that transformers has for the cache."""

import inspect
import logging
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import logging as hf_logging

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime import attention as packed
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE, CACHE_NAMES, PrunedAttention, take_cache
from tiny import COARSE, FAMILIES, VOCABULARY, make_plan, merged_model, random_layers, tiny_model

NEW = 10
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "plain": lambda config: DynamicCache(),  # makes its layers as they come
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
    "growing": GrowingCache,
}


def pruned_model(family, attention="sdpa", merge=None):
    """Mixed widths; merge: with merged heads, the second layer factored."""
    kind = "eager" if attention == "eager" else "sdpa"
    if merge:
        dense = tiny_model(family, kv_heads=4, groups=3, hidden=48, attention=kind)
        _, pruned = merged_model(dense, (12, 28), merge)
        assert [block.self_attn.q_mix is not None for block in pruned.model.layers] == [False, True]
    else:
        dense = tiny_model(family, groups=3, attention=kind)
        pruned = cut(ModelView(dense), make_plan(dense, random_layers(dense, (8, 12))))
    if attention == packed.NAME:
        packed.pack_groups(pruned)
    assert pruned.config._attn_implementation == attention
    return pruned


def written(model, ids, **how):
    found = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **how
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("merge", [None, 2, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa", packed.NAME])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generate_is_uncached_generate(family, attention, merge):
    model = pruned_model(family, attention, merge)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, VOCABULARY, (2, 9))
    tokens, logits = written(model, ids, use_cache=False)
    assert tokens.shape == (2, 9 + NEW)
    for name, make in CACHES.items():
        if name == "plain" and model.config.to_dict().get("sliding_window"):
            continue  # a window needs layers that know of it
        cache = make(model.config)
        found, its = written(model, ids, **{CACHE: cache})
        assert torch.equal(found, tokens), name
        torch.testing.assert_close(its, logits, rtol=0, atol=1e-5, msg=name)
        assert cache.get_seq_length() == 9 + NEW - 1, name


@torch.no_grad()
def test_no_step_sees_itself_alone():
    """The fault that this file is about: a model without a memory writes, and has the right perplexity."""
    model = pruned_model("llama")
    ids = torch.randint(3, VOCABULARY, (1, 9))
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], **{CACHE: cache})
    last = model(ids[:, -1:], **{CACHE: cache}).logits
    torch.testing.assert_close(last, model(ids).logits[:, -1:], rtol=0, atol=1e-5)
    assert (last - model(ids[:, -1:]).logits).abs().max() > 1e-2


@pytest.fixture
def deprecated():
    """Lines that warn of something deprecated: transformers says so by both ways of Python's, some once a process."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    hf_logging.warning_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [line for line in said + [str(w.message) for w in caught] if "deprecated" in line]
    logger.removeHandler(handler)


def test_nothing_deprecated_is_used(deprecated, checkpoint, texts, tmp_path):
    pruned = kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, **COARSE)
    kvprune.generate(tmp_path / "out", "the cat saw", max_new_tokens=3, device="cpu", skip=0.25)
    kvprune.evaluate(checkpoint, tmp_path / "out", tokens=128, window_lengths=[32], device="cpu")
    kvprune.bench(checkpoint, tmp_path / "out", context=8, new_tokens=2, rounds=1, device="cpu")
    assert not deprecated()
    if CACHE != "past_key_values":  # and it would be noticed
        pruned.model(torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache(config=pruned.model.config))
        assert deprecated()


def test_the_name_is_the_one_that_the_dense_model_takes():
    dense = tiny_model("llama")
    assert CACHE in inspect.signature(type(dense).forward).parameters
    assert CACHE in inspect.signature(type(dense.model.layers[0].self_attn).forward).parameters


class Recorder:
    """A pruned layer's attention, called as some transformers might call it."""

    def __init__(self):
        self.model = pruned_model("llama")
        self.attention: PrunedAttention = self.model.model.layers[1].self_attn
        self.states = torch.randn(1, 1, self.model.config.hidden_size)

    def __call__(self, **arguments):
        position = torch.zeros(1, 1, dtype=torch.long)
        tables = self.model.model.rotary_emb(self.states, position)
        return self.attention(self.states, position_embeddings=tables, **arguments)[0]


@pytest.mark.parametrize("name", [*CACHE_NAMES, "memory_of_2031"])
@torch.no_grad()
def test_a_cache_is_used_under_any_name(name):
    call = Recorder()
    cache = DynamicCache(config=call.model.config)
    for _ in range(3):
        call(**{name: cache}, use_cache=True)
    assert cache.layers[1].keys.shape == (1, 2, 3, 12)
    alone = DynamicCache(config=call.model.config).layers[1]
    if name != "memory_of_2031":
        for _ in range(2):
            call(**{name: alone}, use_cache=True)  # a block's own layer of a cache
        assert alone.keys.shape == (1, 2, 2, 12)


@torch.no_grad()
def test_a_cache_that_cannot_be_found_is_an_error():
    call = Recorder()
    with pytest.raises(TypeError, match=r"layer 1: a KV cache is wanted.*update kvprune"):
        call(use_cache=True)
    with pytest.raises(TypeError, match="layer_past is a tuple, not a KV cache"):
        call(layer_past=(torch.zeros(1), torch.zeros(1)))
    two = {CACHE: DynamicCache(), "layer_past": DynamicCache()}
    with pytest.raises(TypeError, match="two different KV caches"):
        call(**two)
    call(use_cache=False)
    call(**{CACHE: None})


def test_take_cache_leaves_the_rest():
    cache = DynamicCache()
    arguments = {"use_cache": True, "past_key_value": None, CACHE: cache, "layer_past": cache, "mask": 3}
    assert take_cache(arguments) is cache
    assert arguments == {"use_cache": True, "mask": 3}


def test_a_future_transformers_that_renames_it_again(monkeypatch):
    """The dense model's blocks hand the cache on under a new name; the pruned model goes on being right."""
    model = pruned_model("llama")
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, VOCABULARY, (1, 9))
    expected, _ = written(model, ids)
    for block in model.model.layers:
        inner = block.self_attn.forward
        block.self_attn.forward = lambda inner=inner, **kwargs: inner(
            **{("kv_memory" if name == CACHE else name): value for name, value in kwargs.items()}
        )
    found, _ = written(model, ids)
    assert torch.equal(found, expected)
