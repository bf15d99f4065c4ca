"""Every family on a GPU, where there is one: what the CPU's dense reference says."""

import copy

import pytest
import torch
from every_family import VOCABULARY, changed, has_sdpa
from test_every_family import KNOWN, WAYS, made
from transformers import DynamicCache, StaticCache

from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_prefill_decode_and_left_padding(name, way):
    attention = "sdpa" if has_sdpa(name) else "eager"
    dense, change, pruned = made(name, way, attention)
    ids = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with changed(dense, change):
        expected, behind_padding = dense(ids).logits, dense(ids, **padded).logits
    there, ids = copy.deepcopy(pruned).cuda(), ids.cuda()

    def close(a, b):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-4)

    close(there(ids).logits, expected)
    close(there(ids, **{k: v.cuda() for k, v in padded.items()}).logits.cpu()[mask.bool()], behind_padding[mask.bool()])
    for kind in (DynamicCache, GrowingCache):
        cache = kind(config=there.config)
        steps = [there(ids[:, :9], **{CACHE: cache}, use_cache=True).logits]
        steps += [there(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(9, 17)]
        close(torch.cat(steps, 1), expected)
    cache = StaticCache(config=there.config, max_cache_len=20)
    steps = [there(ids[:, :9], **{CACHE: cache}, use_cache=True).logits]
    steps += [there(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(9, 17)]
    close(torch.cat(steps, 1), expected)


@torch.no_grad()
def test_a_step_with_a_static_cache_is_a_cuda_graph():
    """Of a pruned model with a width per layer, replayed: the tokens that generate gives."""
    _, _, pruned = made("llama", "merged", "sdpa")
    model = copy.deepcopy(pruned).cuda()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5)).cuda()
    expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, 9:]
    tokens = captured_tokens(model, ids, StaticCache(config=model.config, max_cache_len=32), 12)
    assert tokens.tolist() == expected.tolist()


def captured_tokens(model, ids, cache, new):
    """`new` greedy tokens (B, new) behind ids (B, T): the last ones by replaying a graph of one step."""
    token = model(ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
    position = torch.full_like(token, ids.shape[1])
    found = [token.clone()]
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")

    def step():
        logits = forward(token, position_ids=position, **{CACHE: cache}, logits_to_keep=1).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
            found.append(token.clone())
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which runs nothing
        step()
    while len(found) < new:
        graph.replay()
        found.append(token.clone())
    return torch.cat(found, 1)
