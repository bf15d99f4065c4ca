"""How the experts of a pruned model are run is how the dense model's are."""

import copy

import pytest
import torch
from test_every_family import KNOWN, WAYS, made
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

FAMILIES = [name for name in ("mixtral", "qwen3_moe", "gpt_oss", "olmoe") if name in KNOWN]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_experts_hear_how_they_are_to_run(name, way, monkeypatch):
    """As `generate` switches it on a GPU for the steps of decoding."""
    dense, _, pruned = made(name, way, "eager")
    ids, ran = torch.arange(3, 9)[None], []

    def noted(kind, own):
        return lambda *args, **kwargs: ran.append(kind) or own(*args, **kwargs)

    for kind in ("batched_mm", "grouped_mm"):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, kind, noted(kind, ALL_EXPERTS_FUNCTIONS[kind]))
    for model in map(copy.deepcopy, (dense, pruned)):
        before = model.get_experts_implementation()
        assert before[""] == "grouped_mm"
        first = model(ids).logits
        model.set_experts_implementation({"": "batched_mm"})
        torch.testing.assert_close(model(ids).logits, first, rtol=0, atol=1e-4)
        model.set_experts_implementation(before)
        model(ids)
        layers = len(ran) // 3
        assert layers > 0
        assert ran == [kind for kind in ("grouped_mm", "batched_mm", "grouped_mm") for _ in range(layers)]
        ran.clear()
