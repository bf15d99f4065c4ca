"""Late admission in rooms of a fixed size: the same tokens, and a step that is one compiled graph."""

import pytest
import torch
from test_late import RULE, close, filtered, ids_of, model_of
from transformers import DynamicCache

import kvprune
from kvprune import errors
from kvprune.runtime.modeling import CACHE


@pytest.mark.parametrize("lengths", [(47, 47), (47, 30)], ids=["one length", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding"])
def test_room_for_the_whole_text_changes_nothing(family, lengths):
    model, ids = model_of(family), ids_of(47, batch=2)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, : 47 - n] = 0
    pieces = [33, *[1] * 14]
    expected, *_ = filtered(model, ids, pieces, mask=mask)
    found, _, report = filtered(model, ids, pieces, mask=mask, length=64)
    real = mask.bool()
    close(found[real], expected[real])
    assert report["keep_achieved"] < 1


@torch.no_grad()
def test_a_compiled_step_is_the_eager_one():
    """Over all positions of two blocks, decisions among them: one graph, without a break, for all steps."""
    model, ids = model_of(), ids_of(52, batch=2)
    expected, *_ = filtered(model, ids, [31, *[1] * 21], length=64)
    cache = DynamicCache(config=model.config)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with kvprune.TokenFilter(keep=0.5, length=64, **RULE)(model):
        found = [model(ids[:, :31], **{CACHE: cache}).logits]
        rooms = {id(layer.key_room) for layer in cache.layers}
        step = torch.compile(model.forward, fullgraph=True, backend=backend)
        for t in range(31, 52):
            positions = torch.full((2, 1), t)
            found.append(step(ids[:, t : t + 1], position_ids=positions, **{CACHE: cache}).logits)
        assert {id(layer.key_room) for layer in cache.layers} == rooms
        assert [layer.counts.tolist() for layer in cache.layers] == [[52, 52]] * len(cache.layers)
    close(torch.cat(found, 1), expected)
    assert len(graphs) == 1


@torch.no_grad()
def test_generate_with_room():
    model, ids = model_of(), ids_of(20, batch=2)
    asked = {"max_new_tokens": 20, "do_sample": False}
    with kvprune.TokenFilter(keep=0.5, **RULE)(model):
        expected = model.generate(ids, **asked)
    with kvprune.TokenFilter(keep=0.5, length=64, **RULE)(model):
        assert model.generate(ids, **asked).tolist() == expected.tolist()


@torch.no_grad()
def test_what_has_no_room_is_refused():
    model = model_of()
    with pytest.raises(errors.BadOption, match="length must be a whole number"):
        kvprune.TokenFilter(keep=0.5, length=3, **RULE)
    with pytest.raises(errors.CacheMismatch, match="longer than length"):
        filtered(model, ids_of(40), length=39)
    with kvprune.TokenFilter(keep=0.5, length=64, **RULE)(model):
        with pytest.raises(errors.CacheMismatch, match="no beams"):
            model.generate(ids_of(20), max_new_tokens=3, num_beams=2, do_sample=False)
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="had its prompt uncompiled"):
            step(ids_of(1), position_ids=torch.zeros(1, 1, dtype=torch.long))
