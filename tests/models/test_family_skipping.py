"""Skipping in every family: the family's own model with the skipped columns hidden and the skipped outputs left out."""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from every_family import VOCABULARY, family_model
from test_every_family import tolerance_of
from test_family_steps import KNOWN, half
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.errors import FilterMisuse
from kvprune.models.family import family_of
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from kvprune.tokens import cache

REFUSED = {
    **dict.fromkeys(("lfm2", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), "some have none; use keep"),
    **dict.fromkeys(("gemma2", "gpt_oss"), "has a cap or sinks"),
    "gemma4_text:shared": "share keys and values",
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral3"), "does more behind it; use keep"),
}
OPTIONS = {"ratio": 0.3, "warmup": 4, "sinks": 0, "block": 4, "tail": 1.0, "layer_ratio": "all"}


@contextmanager
def without(model, skipped):
    """The model as it is, where no query sees skipped tokens and their attention puts out zeros; skipped (layers, B, T)
    bool."""

    def attention(module, query, key, value, mask, **kwargs):
        own = sys.modules[type(module).__module__].eager_attention_forward
        hidden = torch.zeros(key.shape[0], 1, query.shape[2], key.shape[2])
        hidden.masked_fill_(skipped[module.layer_idx][:, None, None], torch.finfo(torch.float32).min)
        return own(module, query, key, value, hidden if mask is None else (mask + hidden).clamp_min(-3e38), **kwargs)

    def silent(layer, module, args, output):
        return output[0].masked_fill(skipped[layer].unsqueeze(-1), 0.0), *output[1:]

    AttentionInterface.register("reference", attention)
    AttentionMaskInterface.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    family = family_of(model.config.model_type)
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        for layer, block in enumerate(family.blocks(model)):
            module = getattr(block, family.attention)
            stack.callback(module.register_forward_hook(partial(silent, layer)).remove)
        model.set_attn_implementation("reference")
        yield


def read(model, ids, pieces, **options):
    """Logits, and what was skipped, of a text fed in pieces."""
    own, found, start = DynamicCache(config=model.config), [], 0
    with kvprune.TokenFilter(record=True, **{**OPTIONS, **options})(model) as f:
        for n in pieces:
            found.append(model(ids[:, start : start + n], **{CACHE: own}).logits)
            start += n
    return torch.cat(found, 1), torch.from_numpy(f.skipped)


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in REFUSED])
@torch.no_grad()
def test_skipping_is_the_model_without_what_is_skipped(name, monkeypatch):
    """Of a dense and a pruned model, at once, and by steps that the host decides, and the device."""
    dense, tolerance = family_model(name), tolerance_of(name)
    bases, plan = half(dense)
    for model in (dense, cut(ModelView(dense), plan, bases)):
        ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
        found, skipped = read(model, ids, [40], on_skip="zero")
        assert 40 < skipped.sum() < 140
        with without(model, skipped):
            torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=tolerance)
        for on_device in (False, True):
            monkeypatch.setattr(cache, "decides_on", lambda device, yes=on_device: yes)
            steps, same = read(model, ids, [20, *[1] * 20], on_skip="zero")
            assert torch.equal(same, skipped)
            torch.testing.assert_close(steps, found, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in KNOWN if name in REFUSED])
def test_what_skipping_cannot_do_is_refused(name):
    with pytest.raises(FilterMisuse, match=REFUSED[name]):
        kvprune.TokenFilter(0.25)(family_model(name))


def test_layers_that_share_keys_are_refused_by_keep_too():
    with pytest.raises(FilterMisuse, match="share keys and values"):
        kvprune.TokenFilter(keep=0.5)(family_model("gemma4_text:shared"))


@torch.no_grad()
def test_queries_of_one_matrix_come_with_the_keys():
    for name, own in (("phi3", False), ("qwen3", True)):
        model, ids = family_model(name), torch.randint(3, VOCABULARY, (2, 40))
        with kvprune.TokenFilter(**OPTIONS)(model) as f:
            model(ids)
        rows, skipped = f.report["rows"], sum(f.report["per_layer"]) * f.report["tokens_after_warmup"]
        assert rows["k"] == rows["v"] == rows["o"] + skipped == 4 * 80
        assert rows["q"] == (rows["o"] if own else rows["k"])
