"""The filter against the reference loop, itself in pieces, and the dense model where nothing is skipped."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import run
from transformers import DynamicCache, GenerationConfig, StaticCache

import kvprune
from kvprune import errors
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from tiny import VOCABULARY, make_plan, mask_dense, merged_model, random_layers, tiny_model

OPTIONS = {
    "warmup": 6,
    "sinks": 2,
    "block": 4,
    "tail": 0.5,
    "gamma": 0.9,
    "output_gamma": 0.7,
    "keys": "pre-rope",
    "on_skip": "anchor",
}
MARGIN = 1e-5


def ids_of(n, batch=1, seed=0):
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))


def model_of(family="llama", **options):
    return tiny_model(family, **{"kv_heads": 2, "groups": 2, "layers": 4, **options})


def filtered(model, ids, pieces=None, ratio=0.25, **options):
    """Logits of a prompt fed in pieces (or at once), and the filter."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    with torch.no_grad(), kvprune.TokenFilter(ratio=ratio, record=True, **{**OPTIONS, **options})(model) as f:
        for n in pieces or [ids.shape[1]]:
            logits.append(model(ids[:, start : start + n], **{CACHE: cache}).logits)
            start += n
    return torch.cat(logits, dim=1), f


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama3-rope", "mistral", "qwen2", "qwen2-sliding"])
def test_a_prompt_is_what_the_plain_loop_makes_of_it(family, attention):
    model, ids = model_of(family, attention=attention), ids_of(50)
    expected = run(model, ids[0].tolist(), rates={2: 0.5, 3: 0.5}, options=OPTIONS)
    assert expected.margin > MARGIN
    for pieces in (None, [1] * 50, [3, 17, 1, 9, 20]):
        logits, f = filtered(model, ids, pieces)
        torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
        assert f.skipped[:, 0].tolist() == expected.skipped
        late = f.report["tokens_after_warmup"]
        assert late == 50 - 8
        assert f.report["per_layer"] == [sum(flags) / late for flags in expected.skipped]
    assert sum(map(sum, expected.skipped)) > 10
    dense = model(ids).logits
    assert not torch.allclose(logits, dense, atol=1e-3)  # or the filter had done nothing


@pytest.mark.parametrize(
    "options",
    [
        {"on_skip": "zero"},
        {"keys": "post-rope"},
        {"gamma": 0.5, "output_gamma": 0.0},
        {"tail": 1.0, "layer_ratio": "all", "block": 5, "warmup": 0, "sinks": 0},
        {"warmup": 20},
        {"sinks": 11},
        {"tail": 1.0, "layer_ratio": "all", "decide_every": 3},
        {"decide_every": 2, "threshold": "adaptive", "alpha": 0.5, "beta": 0.8, "eta": 0.01},
        {"fusion": "mean"},
        {"fusion": "key"},
        {"fusion": "value"},
        {"threshold": "adaptive", "alpha": 0.5, "beta": 0.8, "eta": 0.01},
        {"threshold": "adaptive", "alpha": 0.5, "beta": 0.8, "eta": 0.01, "fusion": "mean", "on_skip": "zero"},
    ],
    ids=str,
)
def test_options_are_the_loop_too(options):
    model, ids = model_of(), ids_of(60, seed=3)
    o = {**OPTIONS, **options}
    rates = {2: 0.5, 3: 0.5} if o["tail"] == 0.5 else dict.fromkeys(range(4), 0.25)
    expected = run(model, ids[0].tolist(), rates=rates, options=o)
    assert expected.margin > MARGIN
    for pieces in (None, [7, 30, 23]):
        logits, f = filtered(model, ids, pieces, **options)
        torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
    assert f.report["kv_bytes"] == sum(expected.kept) * 2 * 2 * 16 * 4


def test_the_papers_preset_is_the_loop_too():
    model, ids = model_of(), ids_of(60, seed=3)
    own = {"warmup": 6, "sinks": 2, "block": 4, "alpha": 0.5, "beta": 0.8, "eta": 0.01}
    papers = {"on_skip": "zero", "gamma": 0.9, "fusion": "variance", "threshold": "adaptive"}
    expected = run(model, ids[0].tolist(), rates={2: 0.5, 3: 0.5}, options={**OPTIONS, **own, **papers})
    assert expected.margin > MARGIN
    with torch.no_grad(), kvprune.TokenFilter(0.25, preset="paper", record=True, **own)(model) as f:
        logits = model(ids).logits
    torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
    assert f.skipped[:, 0].tolist() == expected.skipped
    assert sum(map(sum, expected.skipped)) > 10


@pytest.mark.parametrize(
    ("drop", "drops"), [(0.0, {2: 0.0, 3: 0.0}), (0.1, {2: 0.0, 3: 0.4}), (0.4, {2: 0.8, 3: 0.8})], ids=str
)
def test_dropping_is_a_decision_of_its_own(drop, drops):
    model, ids = model_of(), ids_of(60, seed=1)
    rates = {2: 0.5, 3: 0.5}
    expected = run(model, ids[0].tolist(), rates=rates, drop_rates=drops, options=OPTIONS)
    assert expected.margin > MARGIN
    for pieces in (None, [1] * 60, [2] * 30, [3] * 20, [5, 30, 25]):
        logits, f = filtered(model, ids, pieces, drop_ratio=drop)
        torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
        assert f.report["kv_bytes"] == sum(expected.kept) * 2 * 2 * 16 * 4
    if not drop:
        assert f.report["kv_bytes"] == f.report["kv_bytes_dense"]


@pytest.mark.parametrize(("drop", "drops"), [(0.1, {2: 0.0, 3: 0.4}), (0.4, {2: 0.8, 3: 0.8})], ids=str)
def test_a_layer_decides_for_the_next_if_they_drop_alike(drop, drops):
    model, ids = model_of(), ids_of(60, seed=1)
    every = {**OPTIONS, "decide_every": 2}
    expected = run(model, ids[0].tolist(), rates={2: 0.5, 3: 0.5}, drop_rates=drops, options=every)
    assert expected.margin > MARGIN
    assert (expected.skipped[2] == expected.skipped[3]) == (drop == 0.4)
    for pieces in (None, [1] * 60, [5, 30, 25]):
        logits, f = filtered(model, ids, pieces, drop_ratio=drop, decide_every=2)
        torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
        assert f.report["kv_bytes"] == sum(expected.kept) * 2 * 2 * 16 * 4


def test_a_layer_that_follows_decides_nothing(monkeypatch):
    model, ids, calls = model_of(), ids_of(60), []
    similarity = kvprune.tokens.attention.similarity

    def counting(layer, k, v, step, *a):
        calls.extend(i for i, one in step.layers.items() if one is layer)
        return similarity(layer, k, v, step, *a)

    monkeypatch.setattr(kvprune.tokens.attention, "similarity", counting)
    _, each = filtered(model, ids, ratio=0.5, tail=1.0)
    assert calls == [1, 2, 3]
    _, f = filtered(model, ids, ratio=0.5, tail=1.0, decide_every=2)
    assert calls[3:] == [1, 3]
    assert np.array_equal(f.skipped[1], f.skipped[2])
    anchors, outputs = 2 * 2 * 16 * 4, model.config.hidden_size * 4
    assert each.report["anchor_bytes"] == 3 * (anchors + outputs)
    assert f.report["anchor_bytes"] == 2 * anchors + 3 * outputs


@pytest.mark.parametrize(
    ("ratio", "options", "rates"),
    [
        (0.15, {"layers": (1, 3, 0)}, {1: 0.6}),  # one layer can do it: the first that is given
        (0.2, {"layers": (1, 3, 0)}, {1: 0.4, 3: 0.4}),  # no layer skips more than 0.75
        (0.2, {"layers": (1, 3, 0), "layer_ratio": 0.8}, {1: 0.8}),
        (0.4, {"layers": [1, 3, 0]}, {0: 0.4 * 4 / 3, 1: 0.4 * 4 / 3, 3: 0.4 * 4 / 3}),
        (0.4, {"layers": [1, 3]}, {1: 0.8, 3: 0.8}),  # but where there are no more layers
        (0.15, {"tail": 1.0}, {3: 0.6}),  # or the last
        (0.3, {"layers": (1, 3, 0), "layer_ratio": "all"}, {0: 0.4, 1: 0.4, 3: 0.4}),
    ],
    ids=str,
)
def test_as_few_layers_skip_as_the_ratio_needs(ratio, options, rates):
    model, ids = model_of(), ids_of(60, seed=2)
    expected = run(model, ids[0].tolist(), rates=rates, options=OPTIONS)
    assert expected.margin > MARGIN
    logits, f = filtered(model, ids, ratio=ratio, **options)
    torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
    assert f.skipped[:, 0].tolist() == expected.skipped
    assert [i for i, rate in enumerate(f.report["per_layer"]) if rate] == sorted(rates)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_neighbours_in_a_batch_change_nothing(family, every):
    """Left-padded sequences of three lengths, prefill in two pieces and then steps, each as it is alone."""
    model = model_of(family)
    lengths, total = [40, 29, 12], 40
    ids, mask = ids_of(total, batch=3, seed=5), torch.zeros(3, total, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, total - n :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.no_grad(), kvprune.TokenFilter(ratio=0.25, decide_every=every, **OPTIONS)(model):
        for start, end in ((0, 20), (20, 33), *((i, i + 1) for i in range(33, total))):
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            logits.append(model(ids[:, start:end], **{CACHE: cache}, **inputs).logits)
    logits = torch.cat(logits, dim=1)
    for b, n in enumerate(lengths):
        alone, _ = filtered(model, ids[b : b + 1, total - n :], decide_every=every)
        torch.testing.assert_close(logits[b, total - n :], alone[0], atol=1e-4, rtol=0)


def test_nothing_is_skipped_or_dropped_by_a_share_of_zero_however_long_the_text():
    model, ids = model_of(positions=1000), ids_of(900)
    with torch.no_grad():
        dense = model(ids).logits
    logits, f = filtered(model, ids, ratio=0.0)
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=0)
    assert not f.skipped.any()
    _, f = filtered(model, ids, drop_ratio=0.0)
    assert f.skipped.any()
    assert f.report["kv_bytes"] == f.report["kv_bytes_dense"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_long_prompt_takes_one_mask_for_some_queries_after_the_other(family, monkeypatch):
    """Masks for 7 queries at a time, where otherwise all of this prompt's share one."""
    model, ids = model_of(family), ids_of(60, seed=1)
    expected = run(model, ids[0].tolist(), rates={2: 0.5, 3: 0.5}, drop_rates={2: 0.0, 3: 0.4}, options=OPTIONS)
    monkeypatch.setattr(kvprune.tokens.attention, "QUERIES", 7)
    masks = []
    kind = kvprune.tokens.attention.FilteredAttention
    make = kind._mask
    monkeypatch.setattr(kind, "_mask", lambda self, queries, *a: masks.append(len(queries)) or make(self, queries, *a))
    for pieces in (None, [25, 35]):
        logits, _ = filtered(model, ids, pieces, drop_ratio=0.1)
        torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
    assert max(masks) == 7
    assert masks.count(7) > 8


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding"])
def test_ratio_zero_is_the_dense_model(family):
    model, ids = model_of(family), ids_of(40, batch=2)
    with torch.no_grad():
        dense = model(ids).logits
    torch.testing.assert_close(filtered(model, ids, ratio=0.0)[0], dense, atol=1e-5, rtol=0)
    with kvprune.TokenFilter(ratio=0.0, **OPTIONS)(model) as f:
        found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False))
    assert f.report["ratio_achieved"] == 0


def test_skipped_tokens_reach_no_projection_and_no_cache():
    model, ids = model_of(), ids_of(60, batch=2)
    rows = {}

    def count(name):
        def hook(_module, args, _output):
            rows[name] = rows.get(name, 0) + args[0].numel() // args[0].shape[-1]

        return hook

    for layer in (0, 3):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(model.model.layers[layer].self_attn, name).register_forward_hook(count((layer, name[0])))
    _, f = filtered(model, ids, [30, *[1] * 30])
    skipped = round(f.report["per_layer"][3] * f.report["tokens_after_warmup"])
    assert skipped > 20
    assert rows[0, "q"] == rows[0, "o"] == rows[3, "k"] == rows[3, "v"] == 120
    assert rows[3, "q"] == rows[3, "o"] == 120 - skipped
    assert f.report["rows"]["q"] == f.report["rows"]["o"] == 240 - round(sum(f.report["per_layer"]) * 104)
    assert f.report["rows"]["k"] == f.report["rows_dense"] == 240


def test_a_layer_without_active_sequences_does_no_attention(monkeypatch):
    model, ids = model_of(), ids_of(60)
    calls = []
    attend = kvprune.tokens.attention.FilteredAttention._attend
    monkeypatch.setattr(
        kvprune.tokens.attention.FilteredAttention,
        "_attend",
        lambda self, *a: calls.append(self.index) or attend(self, *a),
    )
    _, f = filtered(model, ids, [1] * 60)
    skipped = [round(rate * f.report["tokens_after_warmup"]) for rate in f.report["per_layer"]]
    assert [calls.count(i) for i in (2, 3)] == [60 - skipped[2], 60 - skipped[3]]


def test_memory_is_the_kept_tokens_and_the_anchors():
    model, ids = model_of(), ids_of(100, batch=2)
    _, f = filtered(model, ids)
    r = f.report
    kept = (200 - f.skipped.sum((1, 2))).tolist()
    skipped = [round(rate * r["tokens_after_warmup"]) for rate in r["per_layer"]]
    assert kept == [200 - n for n in skipped]
    assert r["kv_bytes"] == sum(kept) * 2 * 2 * 16 * 4
    assert r["kv_bytes_dense"] == 4 * 200 * 2 * 2 * 16 * 4
    assert 0 < r["padding_bytes"] < 2 * 2 * 128 * 2 * 2 * 16 * 4  # two layers, two sequences
    assert 0 < r["position_bytes"] < r["kv_bytes"] / 4
    config = model.config
    assert r["anchor_bytes"] <= 2 * (2 * 4 * 2 * 16 + 4 * config.hidden_size) * 4


def test_a_padded_batch_counts_real_tokens_and_the_padding_apart():
    model, ids, lengths = model_of(), ids_of(60, batch=3), [60, 41, 17]
    mask = torch.zeros(3, 60, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, 60 - n :] = 1
    with torch.no_grad(), kvprune.TokenFilter(ratio=0.25, record=True, **OPTIONS)(model) as f:
        cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))[CACHE]
    a_token, real = 2 * 2 * 16 * 4, sum(lengths)
    assert not (f.skipped & (mask == 0).numpy()).any()
    assert f.skipped.sum() > 10
    assert f.report["kv_bytes"] == (4 * real - f.skipped.sum()) * a_token
    assert f.report["kv_bytes_dense"] == 4 * real * a_token
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert f.report["padding_bytes"] == held - f.report["kv_bytes"] >= 2 * (180 - real) * a_token
    assert f.report["position_bytes"] == sum(layer.columns.nbytes for layer in cache.layers[2:])


@pytest.mark.parametrize("every", [1, 2])
def test_beam_search_reorders_all_state(every):
    """Each beam's answer scores what a run of that very text alone gives it."""
    model, ids = model_of(), ids_of(20, batch=2, seed=2)
    with kvprune.TokenFilter(ratio=0.25, decide_every=every, **OPTIONS)(model):
        found = model.generate(
            ids,
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        logits, _ = filtered(model, sequence[None], prompt_length=20, decide_every=every)
        logp = logits[0].log_softmax(-1)
        alone = sum(logp[t - 1, sequence[t]].item() for t in range(20, 40))
        assert score.item() == pytest.approx(alone, abs=2e-3)
    assert len({tuple(s.tolist()) for s in found.sequences}) > 2


def test_generate_protects_the_prompts_final_token_and_goes_on_in_a_second_call():
    model, ids = model_of(), ids_of(30, seed=8)
    steps = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True}
    with kvprune.TokenFilter(ratio=0.25, **OPTIONS)(model):
        first = model.generate(ids, **steps)
        second = model.generate(first.sequences, **{CACHE: first[CACHE]}, **steps)
    logits, _ = filtered(model, first.sequences, prompt_length=30)
    logits[..., model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
    assert logits[0, 29:-1].argmax(-1).tolist() == first.sequences[0, 30:].tolist()
    assert second.sequences.shape[1] == 60
    # The same tokens in one go: the second call has fed what the first had not.
    expected = run(
        model, second.sequences[0, :-1].tolist(), rates={2: 0.5, 3: 0.5}, prompt_ends=(30, 45), options=OPTIONS
    )
    assert expected.margin > MARGIN
    assert [int(layer.lengths[0]) for layer in second[CACHE].layers[2:]] == expected.kept[2:]


def test_generate_in_pieces_and_with_a_mask_it_makes_itself():
    """prefill_chunk_size, and padding that only the pad tokens tell of: the final token is each prompt's own."""
    model, ids = model_of(), ids_of(30, batch=2, seed=8)
    ids[1, :9] = model.config.pad_token_id
    steps = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with kvprune.TokenFilter(ratio=0.25, **OPTIONS)(model) as f:
        whole = model.generate(ids, **steps)
        assert f._way._prompt_ends is None
        pieces = model.generate(ids, prefill_chunk_size=7, **steps)
        alone = model.generate(ids[1:, 9:], **steps)
    assert torch.equal(whole, pieces)
    assert torch.equal(whole[1, 30:], alone[0, 21:])


@pytest.mark.parametrize("how", ["option", "config", "positional"])
def test_generate_is_told_of_another_pad_token(how):
    model, ids = model_of(), ids_of(30, batch=2, seed=8)
    pad = 299
    ids[ids == pad] = 5
    alone = ids[1:, 9:].clone()
    ids[1, :9] = pad
    steps = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    config = GenerationConfig(pad_token_id=pad, eos_token_id=2)
    with kvprune.TokenFilter(ratio=0.25, **OPTIONS)(model) as f:
        seen = []
        ends = f._way._ends
        f._way._ends = lambda batch: seen.append(ends(batch).tolist()) or ends(batch)
        if how == "option":
            found = model.generate(ids, pad_token_id=pad, **steps)
        elif how == "config":
            found = model.generate(ids, generation_config=config, **steps)
        else:
            found = model.generate(ids, config, **steps)
        assert seen[0] == [30, 21]
        expected = model.generate(alone, **steps)
    assert torch.equal(found[1, 30:], expected[0, 21:])


def test_sampling_and_a_padded_batch_generate():
    model, ids = model_of("qwen2"), ids_of(20, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with kvprune.TokenFilter(ratio=0.25, **OPTIONS)(model) as f:
        torch.manual_seed(0)
        both = model.generate(ids, attention_mask=mask, max_new_tokens=100, min_new_tokens=100, do_sample=False)
        alone = model.generate(ids[1:, 7:], max_new_tokens=100, min_new_tokens=100, do_sample=False)
        sampled = model.generate(ids, max_new_tokens=10, do_sample=True)
    assert torch.equal(both[1, 20:], alone[0, 13:])
    assert sampled.shape[0] == 2
    assert f.report["ratio_achieved"] == pytest.approx(0.25, abs=0.1)


def test_pruned_models_are_filtered_too():
    dense = model_of()
    view = ModelView(dense)
    pruned = cut(view, make_plan(dense, random_layers(dense, [8, 16, 8, 8])))
    masked_ids = ids_of(50)
    with torch.no_grad():
        plain = pruned(masked_ids).logits
    torch.testing.assert_close(filtered(pruned, masked_ids, ratio=0.0)[0], plain, atol=1e-5, rtol=0)
    whole, f = filtered(pruned, masked_ids)
    pieces, _ = filtered(pruned, masked_ids, [1] * 50)
    torch.testing.assert_close(whole, pieces, atol=1e-4, rtol=0)
    kept = (50 - f.skipped[:, 0].sum(1)).tolist()
    assert f.report["kv_bytes"] == sum(n * 2 * 2 * w * 4 for n, w in zip(kept, [8, 16, 8, 8], strict=True))
    assert f.report["kv_bytes_dense"] == 4 * 50 * 2 * 2 * 16 * 4


def test_a_pruned_model_decides_as_the_masked_dense_one():
    """Removed channels are zeros there, which change no cosine: the loop over it has the same similarities."""
    dense, ids = model_of(), ids_of(50)
    layers = random_layers(dense, [8, 16, 8, 12])
    pruned, masked = cut(ModelView(copy.deepcopy(dense)), make_plan(dense, layers)), mask_dense(dense, layers)
    expected = run(masked, ids[0].tolist(), rates={2: 0.5, 3: 0.5}, options=OPTIONS)
    assert expected.margin > MARGIN
    for pieces in (None, [1] * 50):
        logits, f = filtered(pruned, ids, pieces)
        torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
        assert f.skipped[:, 0].tolist() == expected.skipped


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("merge", "groups"), [(2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_merged_heads_are_what_the_plain_loop_makes_of_them(family, merge, groups, attention):
    """Layers that skip with and without a matrix behind Q and before O; the dense bytes are those of all KV heads."""
    widths, ids = [12, 28, 12, 28], ids_of(50)
    dense = model_of(family, kv_heads=4, groups=groups, hidden=48, attention=attention)
    projected, pruned = merged_model(dense, widths, merge)
    assert [block.self_attn.q_mix is not None for block in pruned.model.layers] == [False, True, False, True]
    with torch.no_grad():
        expected = projected(ids).logits
    torch.testing.assert_close(filtered(pruned, ids, ratio=0.0)[0], expected, atol=1e-5, rtol=0)
    expected = run(pruned, ids[0].tolist(), rates={2: 0.5, 3: 0.5}, options=OPTIONS)
    assert expected.margin > MARGIN
    for pieces in (None, [1] * 50, [3, 17, 1, 9, 20]):
        logits, f = filtered(pruned, ids, pieces)
        torch.testing.assert_close(logits[0], expected.logits, atol=1e-4, rtol=0)
        assert f.skipped[:, 0].tolist() == expected.skipped
    assert sum(map(sum, expected.skipped)) > 10
    if family != "mistral":  # whose window drops some more
        a_number, kv_heads = 4, 4 // merge
        sizes = zip(expected.kept, widths, strict=True)
        assert f.report["kv_bytes"] == sum(n * 2 * kv_heads * width * a_number for n, width in sizes)
        assert f.report["kv_bytes_dense"] == 4 * 50 * 2 * 4 * 16 * a_number


def test_merged_heads_generate_under_a_filter():
    _, pruned = merged_model(model_of(kv_heads=4, groups=3, hidden=48), [12, 28, 12, 28])
    ids, options = ids_of(20, batch=2), {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    with kvprune.TokenFilter(ratio=0.0, **OPTIONS)(pruned):
        found = pruned.generate(ids, **options)
    assert torch.equal(found, pruned.generate(ids, **options))
    with kvprune.TokenFilter(ratio=0.25, **OPTIONS)(pruned) as f:
        both = pruned.generate(ids, **options)
        alone = pruned.generate(ids[1:], **options)
    assert torch.equal(both[1], alone[0])
    assert f.report["ratio_achieved"] > 0.1


def test_a_window_keeps_what_is_in_it():
    model, ids = model_of("mistral"), ids_of(120)  # a window of 6
    for pieces in (None, [100, *[1] * 20], [1] * 120):
        _, f = filtered(model, ids, pieces, ratio=0.0)
        r = f.report
        assert r["kv_bytes"] == r["kv_bytes_dense"] == 4 * 5 * 2 * 2 * 16 * 4
        assert r["padding_bytes"] < 4 * 2 * 70 * 2 * 2 * 16 * 4
        _, f = filtered(model, ids, pieces)
        kept = 4 * 5 - f.skipped[:, 0, -5:].sum()
        assert f.report["kv_bytes"] == kept * 2 * 2 * 16 * 4


def test_autocast_and_inference_mode():
    model, ids = model_of(), ids_of(60)
    exact, _ = filtered(model, ids, [40, *[1] * 20])
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = filtered(model, ids, [40, *[1] * 20])
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.05
    with torch.no_grad(), kvprune.TokenFilter(ratio=0.25, **OPTIONS)(model):
        with torch.inference_mode():
            cache = model(ids[:, :40])[CACHE]
        logits = [model(ids[:, t : t + 1], **{CACHE: cache}).logits for t in range(40, 60)]
    torch.testing.assert_close(torch.cat(logits, dim=1), exact[:, 40:], atol=1e-4, rtol=0)


def test_a_bfloat16_model_keeps_its_dtype():
    model, ids = model_of().to(torch.bfloat16), ids_of(60)
    logits, f = filtered(model, ids, [40, *[1] * 20])
    assert logits.dtype == torch.bfloat16
    assert f.report["kv_bytes"] == (240 - f.skipped.sum()) * 2 * 2 * 16 * 2


def test_the_model_is_restored_also_after_an_error():
    model, ids = model_of(), ids_of(20)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
    for fail in (False, True):
        with pytest.raises(ZeroDivisionError) if fail else torch.no_grad(), kvprune.TokenFilter(ratio=0.25)(model):
            model.generate(ids, max_new_tokens=4)
            if fail:
                raise ZeroDivisionError
        for name, module in model.named_modules():
            assert vars(module).keys() == before[name].keys()
        assert not model.model._forward_pre_hooks
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)


def test_what_stops_the_first_prompt_half_way_comes_out_as_it_is(monkeypatch):
    model, ids = model_of(), ids_of(20)
    monkeypatch.setattr(model.model.layers[2].mlp, "forward", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
    f = kvprune.TokenFilter(ratio=0.25)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), f(model):
        model(ids)
    assert f.report["kv_bytes"] == 0
    assert all("forward" not in vars(block.self_attn) for block in model.model.layers)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ratio": 0.9}, errors.UnreachableRatio, "0.475"),
        ({"ratio": -0.1}, errors.BadOption, "ratio"),
        ({"ratio": float("nan")}, errors.BadOption, "ratio"),
        ({"gamma": 1.0}, errors.BadOption, "gamma"),
        ({"alpha": float("inf")}, errors.BadOption, "alpha"),
        ({"fusion": "sum"}, errors.BadOption, "variance"),
        ({"on_skip": "repeat"}, errors.BadOption, "anchor"),
        ({"tail": 0.0}, errors.BadOption, "tail"),
        ({"layer_ratio": 0.0}, errors.BadOption, "layer_ratio"),
        ({"layer_ratio": 1.0}, errors.BadOption, "layer_ratio"),
        ({"warmup": -1}, errors.BadOption, "warmup"),
        ({"block": 0}, errors.BadOption, "block"),
        ({"preset": "papers"}, errors.BadOption, "paper"),
        ({"preset": "paper", "gamma": 0.5}, errors.BadOption, "gamma"),
        ({"window": 64}, errors.BadOption, r"window is of TokenFilter\(keep=...\), not of ratio"),
        ({"seed": -1}, errors.BadOption, "seed"),
        ({"decide_every": 0}, errors.BadOption, "decide_every"),
        ({"ratio": "0.25"}, errors.BadOption, "ratio"),
        ({"gamma": "x"}, errors.BadOption, "gamma"),
        ({"warmup": 3.5}, errors.BadOption, "warmup"),
        ({"layers": (2, 4)}, errors.BadOption, "no 4"),
        ({"layers": (2, 2)}, errors.BadOption, "differ"),
        ({"layers": ()}, errors.BadOption, "layers"),
        ({"layers": (-1,)}, errors.BadOption, "layers"),
        ({"layers": (2.5,)}, errors.BadOption, "layers"),
        ({"ratio": 0.5, "layers": (1, 3)}, errors.UnreachableRatio, "0.475"),
    ],
    ids=str,
)
def test_bad_options(options, error, says):
    with pytest.raises(error, match=says):
        kvprune.TokenFilter(**options)(model_of())


def test_misuse_is_one_clear_error_before_anything_changes():
    model, ids = model_of(), ids_of(12)
    with kvprune.TokenFilter(ratio=0.25)(model):
        with pytest.raises(errors.FilterMisuse, match="already"):
            kvprune.TokenFilter(ratio=0.1)(model)
        with pytest.raises(errors.FilterMisuse, match="no_grad"):
            model(ids)
        with torch.no_grad():
            with pytest.raises(errors.FilterMisuse, match="output_attentions"):
                model(ids, output_attentions=True)
            with pytest.raises(errors.CacheMismatch, match="StaticCache"):
                model(ids, **{CACHE: StaticCache(config=model.config, max_cache_len=32)})
            cache = model(ids)[CACHE]
        with torch.no_grad(), pytest.raises(errors.FilterMisuse, match="start again"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]), use_cache=False)
        with torch.no_grad(), pytest.raises(errors.FilterMisuse, match="masks"):
            model.model(ids, torch.ones(1, 1, 12, 12))
        assert {layer.get_seq_length() for layer in cache.layers} == {12}
        model.set_attn_implementation("eager")
    with torch.no_grad():
        with kvprune.TokenFilter(ratio=0.1)(model), pytest.raises(errors.CacheMismatch, match="another"):
            model(ids, **{CACHE: cache})
        with pytest.raises(errors.CacheMismatch, match="under a TokenFilter"):
            model(ids, **{CACHE: cache})
        with kvprune.TokenFilter(ratio=0.25)(model), pytest.raises(errors.CacheMismatch, match="without its"):
            model(ids, **{CACHE: cache})
        plain = model(ids)[CACHE]
        with kvprune.TokenFilter(ratio=0.25)(model), pytest.raises(errors.CacheMismatch, match="without"):
            model(ids, **{CACHE: plain})
    f = kvprune.TokenFilter(ratio=0.25)
    with f(model), pytest.raises(errors.FilterMisuse, match="in use"):
        f(model_of(seed=1))
    assert "forward" not in vars(model.model.layers[3].self_attn)
    with pytest.raises(errors.FilterMisuse, match="Linear"):
        kvprune.TokenFilter()(torch.nn.Linear(2, 2))
    with pytest.raises(errors.FilterMisuse, match="bare LlamaModel"):
        kvprune.TokenFilter()(model.model)
    with pytest.raises(errors.FilterMisuse, match="no model"):
        _ = kvprune.TokenFilter().report
    with pytest.raises(errors.FilterMisuse, match="flex_attention"):
        kvprune.TokenFilter()(tiny_model("llama", attention="flex_attention"))


def test_what_wraps_a_model_is_refused_with_its_own_remedy():
    compiled_in_place = model_of()
    compiled_in_place.compile()
    for compiled in (torch.compile(model_of()), compiled_in_place):
        with pytest.raises(errors.FilterMisuse, match=r"before torch\.compile") as caught:
            kvprune.TokenFilter()(compiled)
        assert "adapters" not in str(caught.value)
    adapted = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(errors.FilterMisuse, match=r"PeftModel; merge adapters first"):
        kvprune.TokenFilter()(adapted)
    with pytest.raises(errors.FilterMisuse, match="DataParallel; give the one inside"):
        kvprune.TokenFilter()(torch.nn.DataParallel(model_of()))


def test_the_random_baseline_takes_its_share_and_repeats():
    model, ids = model_of(), ids_of(120)
    first, f = filtered(model, ids, signal="random", seed=1)
    again, _ = filtered(model, ids, [1] * 120, signal="random", seed=1)
    other, _ = filtered(model, ids, signal="random", seed=2)
    torch.testing.assert_close(first, again, atol=1e-4, rtol=0)
    assert not torch.allclose(first, other, atol=1e-3)
    assert f.report["ratio_achieved"] == pytest.approx(0.25, abs=0.06)
    assert np.isfinite(f.report["deciding_seconds"])
