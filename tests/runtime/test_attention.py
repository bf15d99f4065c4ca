"""Packed groups against transformers' own attention, in every decoding step."""

import pytest
import torch
from transformers import DynamicCache

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime import attention
from kvprune.runtime.modeling import CACHE
from tiny import VOCABULARY, make_plan, merged_model, random_layers, tiny_model


def decoded(model, ids, mask, steps=6):
    """Logits of a prompt and of the steps behind it."""
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for t in [slice(0, 20), *(slice(t, t + 1) for t in range(20, 20 + steps))]:
            logits.append(model(ids[:, t], attention_mask=mask[:, : t.stop], **{CACHE: cache}).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pruned", [False, True, "merged"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding"])
def test_packed_groups_change_nothing(family, pruned, padded, monkeypatch):
    model = tiny_model(family, kv_heads=4 if pruned == "merged" else 2, groups=3, hidden=72)
    if pruned == "merged":  # four heads to two, each read by six query heads
        _, model = merged_model(model, (12, 28))
    elif pruned:
        view = ModelView(model)
        model = cut(view, make_plan(model, random_layers(model, [8, 12])))
    ids = torch.randint(3, VOCABULARY, (2, 26), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    expected = decoded(model, ids, mask)
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    spy = lambda query, key, *a, **k: (calls.append((query.shape[1], key.shape[1])), real(query, key, *a, **k))[1]  # noqa: E731
    attention.pack_groups(model)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found = decoded(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    assert calls[-12:] == [(2, 2)] * 12  # two layers, six steps: no head was repeated


def test_load_packs_on_a_cpu_and_the_folder_does_not_know(checkpoint, tmp_path):
    model = kvprune.load(checkpoint, device="cpu")
    assert model.config._attn_implementation == attention.NAME
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


def test_eager_stays_eager():
    model = tiny_model("llama", attention="eager")
    attention.pack_groups(model)
    assert model.config._attn_implementation == "eager"
