"""Token filters on a GPU, where there is one: the CPU's decisions, no waiting in a step, and a step as a CUDA graph."""

import copy
from contextlib import contextmanager

import pytest
import test_filter
import test_late
import torch
from reference import run
from test_late import RULE, ids_of, model_of
from transformers import DynamicCache

import kvprune
from kvprune.runtime.modeling import CACHE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PIECES = [20, *[1] * 25, 5, *[1] * 10]


def close(a, b):
    torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=0)


@contextmanager
def no_waiting():
    """PyTorch raises where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lengths", [(60, 60), (60, 41)], ids=["one length", "padded"])
@pytest.mark.parametrize("family", ["llama", "llama3-rope", "qwen2-sliding"])
@torch.no_grad()
def test_late_admission_is_the_cpus(family, lengths):
    model, ids = model_of(family), ids_of(60, batch=2)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, : 60 - n] = 0
    expected, _, report = test_late.filtered(model, ids, PIECES, mask=mask)
    there = copy.deepcopy(model).cuda()
    for given in ({}, {"length": 64}):
        found, _, other = test_late.filtered(there, ids.cuda(), PIECES, mask=mask.cuda(), **given)
        close(found.cpu()[mask.bool()], expected[mask.bool()])
        assert other["keep_achieved"] == report["keep_achieved"]


@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral", "qwen2-sliding"])
def test_skipping_is_what_the_plain_loop_makes_of_it(family):
    model, ids = test_filter.model_of(family), test_filter.ids_of(60)
    expected = run(model, ids[0].tolist(), rates={2: 0.5, 3: 0.5}, options=test_filter.OPTIONS)
    logits, f = test_filter.filtered(copy.deepcopy(model).cuda(), ids.cuda(), PIECES)
    close(logits[0], expected.logits)
    assert f.skipped[:, 0].tolist() == expected.skipped


@pytest.mark.parametrize("way", [{"keep": 0.5, **RULE}, {"ratio": 0.25, **test_filter.OPTIONS}], ids=["keep", "skip"])
@torch.no_grad()
def test_a_step_of_decoding_does_not_wait(way):
    """Over all positions of two blocks."""
    model, ids = model_of().cuda(), ids_of(40, batch=2).cuda()
    cache = DynamicCache(config=model.config)
    with kvprune.TokenFilter(**way)(model):
        model(ids[:, :30], **{CACHE: cache})
        for t in range(30, 39):
            token, positions = ids[:, t : t + 1], torch.full((2, 1), t, device="cuda")
            with no_waiting():
                model(token, position_ids=positions, **{CACHE: cache})
        with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
            ids.sum().item()  # it can see one


@torch.no_grad()
def test_a_step_of_late_admission_is_a_cuda_graph():
    """Over all positions of two blocks, decisions among them."""
    model, ids = model_of().cuda(), ids_of(31, batch=2).cuda()
    expected = []
    with kvprune.TokenFilter(keep=0.5, **RULE)(model):
        cache = DynamicCache(config=model.config)
        token = model(ids, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        for t in range(31, 52):
            expected.append(token)
            token = model(token, position_ids=torch.full_like(token, t), **{CACHE: cache}).logits.argmax(-1)
    with kvprune.TokenFilter(keep=0.5, length=64, **RULE)(model):
        cache = DynamicCache(config=model.config)
        token = model(ids, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        position, found = torch.full_like(token, 31), []
        forward = torch.compile(model.forward, fullgraph=True, backend="eager")

        def step():
            token.copy_(forward(token, position_ids=position, **{CACHE: cache}).logits.argmax(-1))
            position.add_(1)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                found.append(token.clone())
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # which runs nothing
            step()
        while len(found) < 21:
            found.append(token.clone())
            graph.replay()
    assert torch.cat(found, 1).tolist() == torch.cat(expected, 1).tolist()
