"""The quantised cache against the plain one, and its bytes against a count by hand."""

import copy

import pytest
import torch
from transformers import DynamicCache, cache_utils
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.errors import BadOption
from kvprune.measure.memory import cache_bytes, kv_bytes
from kvprune.measure.speed import Side
from kvprune.models.view import ModelView
from kvprune.runtime import quantized
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import RECENT, group_size, quantized_cache, quantizer
from kvprune.text.windows import windows
from tiny import VOCABULARY, make_plan, merged_model, random_layers, tiny_model, tiny_tokenizer

FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")
HERE = [
    b
    for b, there in (
        (8, FP8 or is_hqq_available()),
        (4, is_optimum_quanto_available() or is_hqq_available()),
        (2, is_optimum_quanto_available() or is_hqq_available()),
    )
    if there
]
WIDTHS = [8, 16, 8, 12]
MERGED = [12, 28, 24, 16]  # of twice as many KV heads, two of which become one
NAMES = ["dense", "pruned", "merged"]
fp8 = pytest.mark.skipif(not FP8 or is_hqq_available(), reason="8 bits are not fp8 here")


def models():
    dense = tiny_model("llama", kv_heads=2, groups=2, layers=4, positions=600)
    pruned = cut(ModelView(copy.deepcopy(dense)), make_plan(dense, random_layers(dense, WIDTHS)))
    wide = tiny_model("llama", kv_heads=4, groups=2, layers=4, positions=600)
    return {"dense": dense, "pruned": pruned, "merged": merged_model(wide, MERGED)[1]}


def ids_of(n, batch=2):
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def fed(model, ids, cache, pieces):
    logits = [model(piece, **{CACHE: cache}).logits for piece in ids.split(pieces, dim=1)]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("bits", HERE)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_stays_close_and_the_bytes_are_fewer(name, bits):
    model, ids = models()[name], ids_of(300)
    pieces = [128, 128, *[1] * 44]
    plain, cache = DynamicCache(config=model.config), quantized_cache(model.config, bits)
    expected, found = fed(model, ids, plain, pieces), fed(model, ids, cache, pieces)
    torch.testing.assert_close(found[:, :128], expected[:, :128], atol=1e-5, rtol=0)  # what is new is read as it is
    error = (found - expected)[:, 128:].abs().mean() / expected.abs().mean()
    assert 0 < error < {8: 0.05, 4: 0.1, 2: 0.5}[bits]
    assert cache_bytes(cache) < 0.6 * cache_bytes(plain)


@fp8
@pytest.mark.parametrize(("name", "widths"), [("pruned", WIDTHS), ("merged", MERGED)])
def test_bytes_counted_by_hand(name, widths):
    """fp8: one byte a number and one float32 scale a tensor."""
    model = models()[name]
    cache = quantized_cache(model.config, 8)
    fed(model, ids_of(200), cache, [200])
    assert cache_bytes(cache) == sum(2 * 2 * 200 * 2 * width for width in widths) + 4 * 2 * 4
    assert kv_bytes(cache.layers[1]) == 2 * 2 * 200 * 2 * widths[1] + 2 * 4


@pytest.mark.parametrize("bits", HERE)
def test_perplexity_reads_what_decoding_reads(bits):
    """Token by token behind a first piece, as a user's decoding would, against the pieces of `perplexity`."""
    model, ids = models()["pruned"], ids_of(200)
    cache = quantized_cache(model.config, bits)
    logits = fed(model, ids, cache, [RECENT, *[1] * (200 - RECENT)])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    found = kvprune.perplexity(model, ids, kv_bits=bits).value
    plain = kvprune.perplexity(model, ids).value
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found - plain) > 5 * abs(found - expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 3, 100, 64), 64), ((1, 3, 100, 128), 128), ((2, 2, 7, 16), 32), ((2, 3, 128, 24), 48), ((1, 1, 7, 8), 56)],
)
def test_groups_are_whole_vectors_and_divide(shape, expected):
    tensor = torch.empty(shape)
    size = group_size(tensor)
    assert size == expected
    assert tensor[0].numel() % size == 0


@pytest.mark.parametrize("bits", [b for b in HERE if b < 8])
@pytest.mark.parametrize("tokens", [128, 150])
def test_keys_are_rounded_by_channel_and_values_by_token(bits, tokens):
    """Against the width of a step of each group: a channel, or a token, that is large costs the others nothing."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, tokens, 64, generator=generator)
    keys[..., 5] *= 100
    values[:, :, 7] *= 100
    config = tiny_model("llama", kv_heads=2, groups=1, layers=1, head_dim=64, positions=600).config
    layer = quantized_cache(config, bits).layers[0]
    layer.update(keys, values)
    one = torch.zeros(1, 2, 1, 64)
    found_keys, found_values = (x[:, :, :tokens] for x in layer.update(one, one))

    def allowed(groups):  # (..., numbers of a group)
        return 0.51 * (groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)) / (2**bits - 1) + 1e-3

    for start in range(0, tokens, 64):
        group = slice(start, start + 64)
        error = (found_keys - keys)[:, :, group].abs().amax(2)
        assert (error <= 1.02 * allowed(keys[:, :, group].transpose(2, 3))).all()
    assert ((found_values - values).abs().amax(3) <= 1.02 * allowed(values)).all()


@fp8
def test_under_a_filter_every_layer_is_quantised():
    model, ids = models()["pruned"], ids_of(200)
    cache = quantized_cache(model.config, 8)
    with kvprune.TokenFilter(0.2, layers=(1,), record=True)(model) as f:
        fed(model, ids, cache, [150, *[1] * 50])
    kept = 400 - f.skipped[1].sum()
    assert f.skipped.sum() > 100
    others = sum(2 * 400 * 2 * width + 2 * 4 for width in (8, 8, 12))
    scales = 2 * 2 * 4  # each sequence's own
    assert f.report["kv_bytes"] == cache_bytes(cache) == kept * 2 * 2 * 16 + scales + others


class Same(cache_utils.QuantizedLayer):
    """Moves what it keeps as the others do, and rounds nothing."""

    def __init__(self):
        super().__init__(residual_length=16)

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


def same_cache(model):
    cache = DynamicCache(config=model.config)
    cache.layers = [Same() for _ in cache.layers]
    return cache


@pytest.mark.parametrize("drop_ratio", [None, 0.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_a_filter_on_bits_that_round_nothing_is_the_filter(name, drop_ratio):
    """Left-padded, in pieces and steps, some sequences dropping what they attend with and some not."""
    model, ids = models()[name], ids_of(150, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0

    def logits(cache):
        found, start = [], 0
        with torch.no_grad(), kvprune.TokenFilter(0.3, tail=0.5, drop_ratio=drop_ratio, record=True)(model) as f:
            for piece in ids.split([60, 40, *[1] * 50], dim=1):
                start += piece.shape[1]
                found.append(model(piece, attention_mask=mask[:, :start], **{CACHE: cache}).logits)
            return torch.cat(found, dim=1), f.skipped, cache_bytes(cache)

    plain, skipped, held = logits(DynamicCache(config=model.config))
    found, same_skipped, same_held = logits(same_cache(model))
    assert skipped.sum() > 50
    assert (skipped == same_skipped).all()
    assert held == same_held
    torch.testing.assert_close(found[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=0)


def test_beams_and_copies_of_a_filtered_quantised_cache():
    """All layers skip: transformers' own quantised layers do not reorder beams in older versions."""
    model, ids = models()["dense"], ids_of(80)
    every_layer = kvprune.TokenFilter(0.3, tail=1.0, layer_ratio="all")
    options = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with every_layer(model):
        plain = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **options)
        found = model.generate(ids, **{CACHE: same_cache(model)}, **options)
    assert torch.equal(plain, found)
    with torch.no_grad(), every_layer(model):
        cache = same_cache(model)
        model(ids, **{CACHE: cache})
        twin = copy.deepcopy(cache.layers[-1])
        before = kv_bytes(twin)
        for _ in range(40):
            model(ids[:, :1], **{CACHE: cache})
        assert twin.get_seq_length() == 80
        assert kv_bytes(twin) == before < kv_bytes(cache.layers[-1])


@fp8
def test_a_bench_side_goes_back_to_its_prompt():
    model, ids = models()["dense"], ids_of(140)
    side = Side(model, kv_bits=8)
    with side.running():
        side.prefill(ids)
        sizes = []
        for _ in range(2):
            side.rewind(140)
            sizes.append([side.cache.get_seq_length(), cache_bytes(side.cache)])
            side.decode(ids[:, -1:], 5)
            assert side.cache.get_seq_length() == 145
    assert sizes[0] == sizes[1] == [140, 4 * 2 * (140 * 2 * 2 * 16 + 4)]


@fp8
def test_eval_and_bench_take_bits(texts, tmp_path):
    checkpoint = tmp_path / "model"
    tiny_model("llama", groups=2, head_dim=32, layers=4, positions=512).save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    result = kvprune.evaluate(checkpoint, texts=["ptb"], window_lengths=[160], tokens=480, kv_bits=8)
    (source,), (row,) = result["sources"], result["perplexity"]
    a_token, scales = 4 * 2 * 2 * 32, 4 * 2 * 4
    assert source["kv_bytes_per_token"] == round((96 * a_token + scales) / 96)  # 160 but for half of RECENT
    model, tokenizer = kvprune.load(checkpoint), kvprune.load_tokenizer(checkpoint)
    ids = windows((texts / "ptb-test.txt").read_text(), tokenizer, 160, 480, "ptb")
    assert row["values"] == [kvprune.perplexity(model, ids, kv_bits=8).value]
    (cell,) = kvprune.bench(checkpoint, context=[64], new_tokens=4, rounds=1, kv_bits=8, device="cpu")["cells"]
    held = {name: side["kv_cache"] for name, side in cell["memory_bytes"].items()}
    assert held == {"dense": 64 * a_token * model.dtype.itemsize, "pruned": 64 * a_token + scales}
    assert cell["decode_limit"] > 1


def test_what_cannot_be(monkeypatch):
    with pytest.raises(BadOption, match="choose 8, 4 or 2"):
        quantizer(3)
    if HERE:
        with pytest.raises(BadOption, match="sliding"):
            quantized_cache(tiny_model("mistral").config, HERE[0])
    monkeypatch.setattr(quantized, "is_optimum_quanto_available", lambda: False)
    monkeypatch.setattr(quantized, "is_hqq_available", lambda: False)
    with pytest.raises(BadOption, match="pip install optimum-quanto"):
        quantizer(4)
