"""The growing cache against transformers' own, operation by operation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvprune.runtime import cache as growing
from kvprune.runtime.cache import GrowingCache, GrowingLayer
from kvprune.runtime.modeling import CACHE
from tiny import VOCABULARY, tiny_model

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(OPERATIONS, st.integers(0, 2**16))
def test_it_holds_what_concatenation_holds(operations, seed):
    generator = torch.Generator().manual_seed(seed)
    config = tiny_model("llama", layers=1).config
    mine, theirs = GrowingCache(config), DynamicCache(config=config)
    before, growing.STEP = growing.STEP, 4
    try:
        for name, value in operations:
            if name == "append":
                keys, values = torch.randn(2, 2, 2, value, 8, generator=generator)
                for found, expected in zip(mine.update(keys, values, 0), theirs.update(keys, values, 0), strict=True):
                    torch.testing.assert_close(found, expected, rtol=0, atol=0)
            elif name == "crop" and theirs.get_seq_length() > value:
                for cache in (mine, theirs):
                    cache.layers[0].crop(-value)
            elif name == "select":
                for cache in (mine, theirs):
                    cache.batch_select_indices(torch.tensor(value))
            elif name == "reset":
                for cache in (mine, theirs):
                    cache.reset()
            assert mine.get_seq_length() == theirs.get_seq_length()
    finally:
        growing.STEP = before


@torch.no_grad()
def test_a_step_writes_in_place():
    model = tiny_model("llama")
    cache = GrowingCache(model.config)
    ids = torch.randint(3, VOCABULARY, (2, 30))
    model(ids, **{CACHE: cache})
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(20):
        model(ids[:, :1], **{CACHE: cache})
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    assert cache.get_seq_length() == 50
    assert all(layer.key_room.shape[2] == growing.STEP for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding"])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}], ids=["greedy", "beams"])
def test_generate_is_the_same(family, how):
    model = tiny_model(family)
    ids = torch.randint(3, VOCABULARY, (2, 12))
    settings = {**how, "max_new_tokens": 15, "min_new_tokens": 15, "pad_token_id": 0}
    cache = GrowingCache(model.config)
    assert any(isinstance(layer, GrowingLayer) for layer in cache.layers)
    found = model.generate(ids, **{CACHE: cache}, **settings)
    assert torch.equal(found, model.generate(ids, **settings))


def test_what_inference_mode_filled_can_grow_outside_it():
    model = tiny_model("llama")
    cache, ids = GrowingCache(model.config), torch.randint(3, VOCABULARY, (1, 8))
    with torch.inference_mode():
        model(ids, **{CACHE: cache})
    with torch.no_grad():
        logits = model(ids[:, :1], **{CACHE: cache}).logits[:, -1]
        expected = model(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
