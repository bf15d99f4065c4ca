"""Late admission against the plain loop, itself in pieces and in batches, and the dense model where all is kept."""

import math

import hypothesis.strategies as st
import late_reference
import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, StaticCache

import kvprune
from kvprune import errors
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime import quantized
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import quantized_cache
from kvprune.tokens.admission import Admission, Schedule
from kvprune.tokens.admitted import AdmittedLayer
from kvprune.tokens.signals import SIGNALS
from tiny import FAMILIES, VOCABULARY, measured_bases, merged_plan, tiny_model

RULE = {"block": 4, "window": 8, "sinks": 2}
BITS = [bits for bits in (8, 4) if quantized._available(bits)]  # that something here quantises to
SLIDING = ("mistral", "qwen2-sliding")
WHOLE = [family for family in FAMILIES if family not in SLIDING]


def ids_of(n, batch=1, seed=0):
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))


def model_of(family="llama", **options):
    return tiny_model(family, **{"kv_heads": 2, "groups": 2, "layers": 2, **options})


@torch.no_grad()
def filtered(model, ids, pieces=None, keep=0.5, cache=None, **given):
    """Logits of a prompt fed in pieces (or at once), and the cache."""
    cache, logits, start = cache or DynamicCache(config=model.config), [], 0
    masks = given.pop("mask", None)
    with kvprune.TokenFilter(keep=keep, **{**RULE, **given})(model) as f:
        for n in pieces or [ids.shape[1]]:
            end = start + n
            options = (
                {}
                if masks is None
                else {
                    "attention_mask": masks[:, :end],
                    "position_ids": (masks[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:],
                }
            )
            logits.append(model(ids[:, start:end], **{CACHE: cache}, **options).logits)
            start = end
        report = f.report
    return torch.cat(logits, dim=1), cache, report


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama3-rope", "qwen2", "qwen2-sliding"])
def test_a_prompt_is_what_the_plain_loop_makes_of_it(family, keep):
    model, ids = model_of(family), ids_of(50)
    expected = late_reference.run(model, ids[0].tolist(), keep=keep, **RULE)
    assert expected.margin > 1e-6
    for pieces in (None, [1] * 50, [3, 17, 1, 9, 20]):
        logits, cache, report = filtered(model, ids, pieces, keep)
        close(logits[0], expected.logits)
        for layer, kept in zip(cache.layers, expected.kept, strict=True):
            if isinstance(layer, AdmittedLayer):
                assert layer.keys.shape[2] == len(kept[0]) == len(kept[1])
        assert report["keep_asked"] == keep
    with torch.no_grad():
        assert (logits - model(ids).logits).abs().max() > 1e-3  # something was lost


def test_what_is_kept_are_the_tokens_of_the_plain_loop():
    """By their values, which tell tokens apart; different ones for each KV head."""
    model, ids = model_of(layers=1), ids_of(50)
    expected = late_reference.run(model, ids[0].tolist(), keep=0.5, **RULE)
    _, cache, _ = filtered(model, ids)
    whole = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: whole})
    for head, kept in enumerate(expected.kept[0]):
        torch.testing.assert_close(cache.layers[0].values[0, head], whole.layers[0].values[0, head, kept])
        torch.testing.assert_close(cache.layers[0].keys[0, head], whole.layers[0].keys[0, head, kept])
    assert expected.kept[0][0] != expected.kept[0][1]


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_pruned_and_merged_models(merge):
    dense = model_of(kv_heads=4)
    bases = measured_bases(dense, merge)
    model = cut(ModelView(dense), merged_plan(dense, bases, (8 * merge, 12 * merge)), bases)
    ids = ids_of(40)
    expected = late_reference.run(model, ids[0].tolist(), keep=0.5, **RULE)
    for pieces in (None, [1] * 40, [13, 27]):
        close(filtered(model, ids, pieces)[0][0], expected.logits)


def test_mixed_pairs_that_do_not_turn():
    dense = model_of(kv_heads=4)
    bases = measured_bases(dense, 2, slow=[5, 6, 7])
    model, ids = cut(ModelView(dense), merged_plan(dense, bases, (20, 20)), bases), ids_of(40)
    expected = late_reference.run(model, ids[0].tolist(), keep=0.5, **RULE)
    close(filtered(model, ids)[0][0], expected.logits)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("family", WHOLE)
def test_padded_batches_are_each_sequence_alone(family, signal):
    model = model_of(family)
    lengths, columns = (41, 30, 7, 36), 41
    texts = [ids_of(n, seed=n) for n in lengths]
    ids, mask = torch.zeros(4, columns, dtype=torch.long), torch.zeros(4, columns, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, columns - text.shape[1] :], mask[row, columns - text.shape[1] :] = text, 1
    alone = [filtered(model, text, signal=signal)[0][0] for text in texts]
    for pieces in (None, [1] * columns, [20, 1, 1, 1, 18]):
        logits, cache, _ = filtered(model, ids, pieces, signal=signal, mask=mask)
        for row, expected in enumerate(alone):
            close(logits[row, columns - lengths[row] :], expected)
    schedule = Schedule(Admission(0.5, **RULE))
    expected = [schedule.stored(n - 1) + 1 for n in lengths]
    assert all(layer.kept_tokens().tolist() == expected for layer in cache.layers)


def test_a_batch_keeps_what_each_sequence_alone_keeps():
    model, ids = model_of(), ids_of(50, batch=3)
    _, together, _ = filtered(model, ids)
    for row in range(3):
        _, alone, _ = filtered(model, ids[row : row + 1])
        for a, b in zip(together.layers, alone.layers, strict=True):
            close(a.keys[row], b.keys[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_1_is_the_dense_model(family):
    model, ids = model_of(family), ids_of(40, batch=2)
    if family == "mistral":
        with pytest.raises(errors.FilterMisuse, match="sliding window"):
            filtered(model, ids)
        return
    with torch.no_grad():
        expected = model(ids).logits
    for pieces in (None, [1] * 40):
        logits, _, report = filtered(model, ids, pieces, keep=1.0)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert report["keep_achieved"] == 1


@given(
    keep=st.floats(0.01, 1),
    block=st.integers(1, 9),
    blocks=st.integers(1, 3),
    sinks=st.integers(0, 4),
    number=st.integers(0, 400),
)
def test_the_share_is_met_to_the_token(keep, block, blocks, sinks, number):
    """Just behind a decision, once there is enough behind the window and the first block has its sinks."""
    rule = Admission(keep, block=block, window=blocks * block, sinks=min(sinks, block))
    schedule = Schedule(rule)
    stored = [schedule.stored(n) for n in range(number + 1)]
    assert stored[-1] == schedule.kept(number) + number - schedule.decided(number)
    assert schedule.most(number) == max(
        [schedule.stored(number), *(schedule.stored(n - 1) + 1 for n in range(block, number + 1, block))], default=0
    )
    whole = number // block * block
    asked = math.floor(keep * whole + 1e-6)
    if whole >= rule.window + block:
        at_least = rule.window + rule.sinks
        assert schedule.stored(whole) <= max(asked, at_least)
        if schedule.stored(whole) < asked:  # only where even a whole block was too few
            assert schedule.kept(whole) - schedule.kept(whole - block) == block


def test_the_cache_holds_what_it_reports():
    """Allocated within 5 % of what is kept, once contexts are long beside a block."""
    model = model_of(positions=4096)
    ids = ids_of(1700)
    cache = DynamicCache(config=model.config)
    rule = {"block": 16, "window": 16, "sinks": 4}
    with torch.no_grad(), kvprune.TokenFilter(keep=0.5, **rule)(model) as f:
        model(ids[:, :1500], **{CACHE: cache})
        for t in range(1500, 1700):
            model(ids[:, t : t + 1], **{CACHE: cache})
            report = f.report
            assert report["padding_bytes"] <= 0.05 * report["kv_bytes"]
            assert report["kv_bytes"] == sum(2 * layer.keys.nbytes for layer in cache.layers)
            assert abs(report["keep_achieved"] - 0.5) < 20 / t


def test_generate_with_beams_returns_and_several_turns():
    model, ids = model_of(), ids_of(30)
    with torch.no_grad():
        with kvprune.TokenFilter(keep=1.0, **RULE)(model):
            beams = model.generate(ids, num_beams=3, max_new_tokens=12, do_sample=False)
        assert beams.tolist() == model.generate(ids, num_beams=3, max_new_tokens=12, do_sample=False).tolist()
        with kvprune.TokenFilter(keep=0.5, **RULE)(model):
            found = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
            again = model.generate(
                torch.cat((found.sequences, ids), 1), max_new_tokens=5, do_sample=False, **{CACHE: found[CACHE]}
            )
        whole = torch.cat((found.sequences, ids), 1)
        for _ in range(5):  # the same text read from the beginning
            logits, _, _ = filtered(model, whole)
            whole = torch.cat((whole, logits[:, -1:].argmax(-1)), 1)
    assert again.tolist() == whole.tolist()


def test_beams_follow_their_parents():
    model, ids = model_of(), ids_of(30, batch=2)
    _, cache, _ = filtered(model, ids)
    _, swapped, _ = filtered(model, ids.flip(0))
    for layer, other in zip(cache.layers, swapped.layers, strict=True):
        layer.reorder_cache(torch.tensor([1, 0]))
        for name in ("keys", "values"):
            close(getattr(layer, name), getattr(other, name))
        close(layer.signal.mean, other.signal.mean)


def test_a_growing_cache_and_no_cache_at_all():
    model, ids = model_of(), ids_of(40)
    expected = filtered(model, ids)[0]
    close(filtered(model, ids, cache=GrowingCache(model.config))[0], expected)
    with torch.no_grad(), kvprune.TokenFilter(keep=0.5, **RULE)(model):
        close(model(ids, use_cache=False).logits, expected)


def test_the_model_is_as_it_was():
    model, ids = model_of(), ids_of(20)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(ids).logits
        filtered(model, ids)
        assert torch.equal(model(ids).logits, expected)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "above 0 and at most 1"),
        ({"keep": 1.5}, "above 0 and at most 1"),
        ({"keep": float("nan")}, "above 0 and at most 1"),
        ({"keep": 0.5, "block": 0}, "block must be a whole number, at least 1"),
        ({"keep": 0.5, "block": 8, "window": 12}, "multiple of block"),
        ({"keep": 0.5, "block": 8, "window": 8, "sinks": 9}, "sinks must be at most a block"),
        ({"keep": 0.5, "signal": "magic"}, "choose key-distance, expected-attention"),
        ({"keep": 0.5, "ratio": 0.25}, "leave it out, or keep"),
        ({"keep": 0.5, "preset": "paper"}, "leave it out, or keep"),
        ({"keep": 0.5, "tail": 0.5}, r"tail is of TokenFilter\(ratio=...\), not of keep"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.BadOption, match=message):
        kvprune.TokenFilter(**options)


def test_what_cannot_be_served_is_refused_before_anything_changes():
    model, ids = model_of(), ids_of(20)
    with pytest.raises(errors.BadOption, match="leave nothing to decide in a context of 128"):
        kvprune.TokenFilter(keep=0.5)(model)
    f = kvprune.TokenFilter(keep=0.5, **RULE)
    with torch.no_grad(), f(model):
        with pytest.raises(errors.CacheMismatch, match="StaticCache"):
            model(ids, **{CACHE: StaticCache(model.config, max_cache_len=64)})
        with pytest.raises(errors.CacheMismatch, match="static"):
            model.generate(ids, generation_config=GenerationConfig(cache_implementation="static", max_new_tokens=3))
        with pytest.raises(errors.FilterMisuse, match="prompt_lookup_num_tokens"):
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=3)
        with pytest.raises(errors.FilterMisuse, match="output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(errors.FilterMisuse, match="already"):
            kvprune.TokenFilter(keep=0.5, **RULE)(model).__enter__()
    _, cache, _ = filtered(model, ids)
    with pytest.raises(errors.CacheMismatch, match="another TokenFilter"):
        filtered(model, ids, cache=cache, keep=0.6)
    with torch.no_grad():
        whole = model(ids, use_cache=True)[CACHE]
    with pytest.raises(errors.CacheMismatch, match="made without"):
        filtered(model, ids, cache=whole)
    with pytest.raises(errors.CacheMismatch, match="cropped"):
        cache.crop(3)


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [(30, 30), (30, 21)], ids=["together", "each at its own position"])
def test_a_step_of_decoding_does_not_wait(lengths):
    """Over all positions of two blocks, decisions among them."""
    model, cache = model_of(), None
    ids = ids_of(40, batch=2)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, : 30 - n] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvprune.TokenFilter(keep=0.5, **RULE)(model):
        model(ids[:, :30], attention_mask=mask[:, :30], **{CACHE: cache})
        for t in range(30, 39):
            with Waits() as waits:
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], **{CACHE: cache})
            assert waits.found == []
        with Waits() as waits:
            torch.ones(2).nonzero()
        assert waits.found  # it can see one


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_cache(bits):
    """In the first layer the same tokens are kept, and lose no more than so many bits do; pieces change nothing."""
    model, ids = model_of(positions=2048, head_dim=32, layers=1), ids_of(700)
    rule = {"block": 32, "window": 64, "sinks": 4}
    whole, plain, _ = filtered(model, ids, **rule)
    logits, cache, report = filtered(model, ids, cache=quantized_cache(model.config, bits), **rule)
    pieces, _, _ = filtered(model, ids, [300, *[1] * 40, 360], cache=quantized_cache(model.config, bits), **rule)
    torch.testing.assert_close(logits, pieces, rtol=0, atol=1e-3)
    torch.testing.assert_close(logits, whole, rtol=0, atol=0.3)
    assert (logits - whole).abs().max() > 1e-4
    for found, exact in zip(cache.layers[0]._read(), (plain.layers[0].keys, plain.layers[0].values), strict=True):
        step = (exact.amax() - exact.amin()) / (2**bits - 1)
        lost = (found - exact).abs()
        # fp8 cuts off what is larger than anything in its first tokens
        assert lost.mean() < 0.05 * exact.abs().mean() if bits == 8 else lost.max() < step
        assert not torch.equal(found, exact)
    held = sum(layer.kv_nbytes() for layer in cache.layers)
    assert report["kv_bytes"] == held
    assert [layer.kept_tokens().tolist() for layer in cache.layers] == [
        layer.kept_tokens().tolist() for layer in plain.layers
    ]
    assert held < 0.9 * sum(layer.kv_nbytes() for layer in plain.layers)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_cache_follows_its_beams_and_refuses_padding(bits):
    model, ids = model_of(positions=2048, head_dim=32), ids_of(300, batch=2)
    rule = {"block": 32, "window": 64, "sinks": 4}
    _, cache, _ = filtered(model, ids, cache=quantized_cache(model.config, bits), **rule)
    _, swapped, _ = filtered(model, ids.flip(0), cache=quantized_cache(model.config, bits), **rule)
    for layer, other in zip(cache.layers, swapped.layers, strict=True):
        layer.reorder_cache(torch.tensor([1, 0]))
        for a, b in zip(layer._read(), other._read(), strict=True):
            close(a, b)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    empty = quantized_cache(model.config, bits)
    with pytest.raises(errors.CacheMismatch, match="takes no padding"):
        filtered(model, ids, cache=empty, mask=mask, **rule)
