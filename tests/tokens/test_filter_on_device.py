"""Skipping where decisions stay on the device, forced on a CPU: against the reference loop, and the host's own way."""

from contextlib import contextmanager

import pytest
import torch
from reference import run
from test_filter import MARGIN, OPTIONS, filtered, ids_of, model_of
from test_late import Waits
from transformers import DynamicCache

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from kvprune.tokens import attention, cache
from tiny import make_plan, merged_model, random_layers

RATES = {2: 0.5, 3: 0.5}
PIECES = ([1] * 60, [20, *[1] * 25, 5, *[1] * 10])
ALL = {"tail": 1.0, "layer_ratio": "all"}


@contextmanager
def on_device(monkeypatch, yes=True):
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decides_on", lambda device: yes)
        yield


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama3-rope", "mistral", "qwen2", "qwen2-sliding"])
def test_decoding_is_what_the_plain_loop_makes_of_it(family, monkeypatch):
    model, ids = model_of(family), ids_of(60)
    expected = run(model, ids[0].tolist(), rates=RATES, options=OPTIONS)
    assert expected.margin > MARGIN
    for pieces in PIECES:
        with on_device(monkeypatch):
            logits, f = filtered(model, ids, pieces)
        close(logits[0], expected.logits)
        assert f.skipped[:, 0].tolist() == expected.skipped
        host, plain = filtered(model, ids, pieces)
        close(logits, host)
        for name in ("kv_bytes", "kv_bytes_dense", "ratio_achieved", "per_layer", "tokens", "anchor_bytes"):
            assert f.report[name] == plain.report[name]
    assert sum(map(sum, expected.skipped)) > 20


@pytest.mark.parametrize(
    ("options", "rates", "drops"),
    [
        ({"on_skip": "zero"}, RATES, None),
        ({"keys": "post-rope"}, RATES, None),
        ({"tail": 1.0, "layer_ratio": "all", "decide_every": 3}, dict.fromkeys(range(4), 0.25), None),
        ({"threshold": "adaptive", "alpha": 0.5, "beta": 0.8, "eta": 0.01}, RATES, None),
        ({"drop_ratio": 0.0}, RATES, {2: 0.0, 3: 0.0}),
        ({"drop_ratio": 0.1}, RATES, {2: 0.0, 3: 0.4}),
        ({"drop_ratio": 0.4}, RATES, {2: 0.8, 3: 0.8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_options_are_the_loop_too(family, options, rates, drops, monkeypatch):
    model, ids = model_of(family), ids_of(60, seed=1)
    o = {**OPTIONS, **options}
    expected = run(model, ids[0].tolist(), rates=rates, drop_rates=drops, options=o)
    assert expected.margin > MARGIN
    for pieces in PIECES:
        with on_device(monkeypatch):
            logits, f = filtered(model, ids, pieces, **options)
        close(logits[0], expected.logits)
        assert f.skipped[:, 0].tolist() == expected.skipped
    if family == "llama":
        assert f.report["kv_bytes"] == sum(expected.kept) * 2 * 2 * 16 * 4


def test_pruned_and_merged_models(monkeypatch):
    dense, ids = model_of(kv_heads=4, groups=3, hidden=48), ids_of(60, batch=2)
    pruned = cut(ModelView(model_of()), make_plan(model_of(), random_layers(model_of(), [8, 16, 8, 12])))
    for model in (pruned, merged_model(dense, [12, 28, 12, 28])[1]):
        expected, plain = filtered(model, ids, PIECES[1])
        with on_device(monkeypatch):
            logits, f = filtered(model, ids, PIECES[1])
        close(logits, expected)
        assert (f.skipped == plain.skipped).all()
        assert f.skipped.sum() > 20


@pytest.mark.parametrize("signal", ["similarity", "random"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padded_batches_are_each_sequence_alone(family, signal, monkeypatch):
    """The shortest begins while the others decode."""
    model, lengths, total = model_of(family), [60, 49, 12], 60
    ids, mask = ids_of(total, batch=3, seed=5), torch.zeros(3, total, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, total - n :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    with on_device(monkeypatch), torch.no_grad():
        own = DynamicCache(config=model.config)
        with kvprune.TokenFilter(ratio=0.25, signal=signal, **OPTIONS)(model):
            for start, end in ((0, 20), *((i, i + 1) for i in range(20, total))):
                inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                found.append(model(ids[:, start:end], **{CACHE: own}, **inputs).logits)
    found = torch.cat(found, 1)
    for b, n in enumerate(lengths):
        alone, _ = filtered(model, ids[b : b + 1, total - n :], signal=signal)
        close(found[b, total - n :], alone[0])


@pytest.mark.parametrize("steps", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_generate_in_two_turns(steps, monkeypatch):
    model, ids = model_of(), ids_of(30, batch=2, seed=8)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    steps = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, **steps}
    answers = []
    for yes in (False, True):
        with on_device(monkeypatch, yes), kvprune.TokenFilter(ratio=0.25, **OPTIONS)(model) as f:
            first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **steps)
            answers.append([first.sequences.tolist()])
            if "num_beams" not in steps:
                whole = torch.cat((mask, torch.ones(2, 40, dtype=torch.long)), 1)
                again = {"attention_mask": whole, CACHE: first[CACHE]}
                answers[-1].append(model.generate(first.sequences, **again, **steps).tolist())
            assert f.report["ratio_achieved"] > 0.1
    assert answers[0] == answers[1]


def test_autocast_inference_mode_and_bfloat16(monkeypatch):
    model, ids = model_of(), ids_of(60)
    exact, _ = filtered(model, ids, [40, *[1] * 20])
    with on_device(monkeypatch):
        with torch.autocast("cpu", torch.bfloat16):
            rough, _ = filtered(model, ids, [40, *[1] * 20])
        assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.05
        with torch.no_grad(), kvprune.TokenFilter(ratio=0.25, **OPTIONS)(model):
            with torch.inference_mode():
                own = model(ids[:, :40])[CACHE]
            logits = [model(ids[:, t : t + 1], **{CACHE: own}).logits for t in range(40, 60)]
        close(torch.cat(logits, dim=1), exact[:, 40:])
        half, _ = filtered(model.to(torch.bfloat16), ids, [40, *[1] * 20])
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.05


class AllWaits(Waits):
    """Those too that a CPU's tensors answer without being asked by a dispatcher."""

    def __init__(self, monkeypatch):
        super().__init__()
        for name in ("cpu", "item", "numpy", "tolist"):
            ask = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda x, *a, ask=ask, **k: self.found.append(ask) or ask(x, *a, **k)
            )


@pytest.mark.parametrize("options", [{}, {"drop_ratio": 0.1, "decide_every": 2, "threshold": "adaptive"}], ids=str)
@pytest.mark.parametrize("lengths", [(30, 30), (30, 21)], ids=["together", "each at its own position"])
def test_a_step_of_decoding_does_not_wait(lengths, options, monkeypatch):
    """Over all positions of two blocks. Where there is padding, layers that do not skip have transformers make a mask
    for them, which looks: so all of them skip."""
    model, ids = model_of(), ids_of(40, batch=2)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, : 30 - n] = 0
    if lengths[1] < 30:
        options = {**options, **ALL}
    own = DynamicCache(config=model.config)
    with (
        on_device(monkeypatch),
        torch.no_grad(),
        kvprune.TokenFilter(0.25, record=True, **{**OPTIONS, **options})(model) as f,
    ):
        model(ids[:, :30], attention_mask=mask[:, :30], **{CACHE: own})
        for t in range(30, 39):
            positions = mask[:, : t + 1].sum(1, keepdim=True) - 1
            with monkeypatch.context() as patch, AllWaits(patch) as waits:
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=positions, **{CACHE: own})
            assert waits.found == []
        with monkeypatch.context() as patch, AllWaits(patch) as waits:
            torch.ones(2).tolist(), bool(torch.ones(()))
        assert len(waits.found) == 2  # it can see some
    assert f.skipped[:, :, 30:].any()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("signal", ["similarity", "random"])
def test_all_that_a_step_works_on_is_where_the_model_is(family, signal, monkeypatch):
    """On a device that holds no values, and refuses what mixes it with the host."""
    model, ids = model_of(family), ids_of(40, batch=2)
    own = DynamicCache(config=model.config)
    options = {**OPTIONS, **ALL, "signal": signal, "drop_ratio": 0.1, "prompt_length": 30}
    f = kvprune.TokenFilter(0.25, **options)
    with on_device(monkeypatch), torch.no_grad(), f(model):
        model(ids[:, :30], **{CACHE: own})
        model.to("meta")
        for layer in own.layers:
            for thing in (layer, layer.skip, layer.drop):
                for name, value in vars(thing).items():
                    setattr(thing, name, value.to("meta") if isinstance(value, torch.Tensor) else value)
            layer.device = torch.device("meta")
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no such device
        for padded in (False, True):
            for layer in own.layers:
                layer.has_padding = padded
            new, mask = (torch.ones(2, n, dtype=torch.long, device="meta") for n in (1, own.get_seq_length() + 1))
            logits = model(new, attention_mask=mask, position_ids=new, **{CACHE: own}).logits
            assert logits.is_meta
            assert all(layer.lengths.is_meta and layer.skip.level.is_meta for layer in own.layers)
        with pytest.raises(RuntimeError, match="meta"):
            _ = f.report
        f._way._cache = None  # which a report would be made of


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_host_asks_for_lengths_once_in_many_steps(family, monkeypatch):
    """And room stays near what is kept; what has left a window goes."""
    model, ids = model_of(family, positions=1000), ids_of(500, batch=2)
    own, asked = DynamicCache(config=model.config), []
    with on_device(monkeypatch), torch.no_grad(), kvprune.TokenFilter(0.25, **OPTIONS)(model) as f:
        model(ids[:, :40], **{CACHE: own})
        for t in range(40, 500):
            with Waits() as waits:
                model(ids[:, t : t + 1], **{CACHE: own})
            asked.append(len(waits.found))
            for layer in own.layers[2:]:
                longest = int(layer.lengths.max())
                assert longest <= layer.bound <= layer.keys.shape[2]
                assert layer.keys.shape[2] <= longest + max(cache.STEP, layer.bound // 8) + cache.STEP
                if family == "mistral":
                    assert layer.keys.shape[2] <= 6 + 2 * cache.STEP
        report = f.report
    assert 0 < sum(asked) <= 2 * -(-460 // cache.STEP)
    assert report["kv_bytes"] < report["kv_bytes_dense"]


def test_a_layer_costs_one_call_of_attention_whatever_skips(monkeypatch):
    """And who skips sees the column of its own token alone."""
    model, ids = model_of(), ids_of(60, batch=4)
    calls, visible = [], []
    attend, see = attention.packed_attention, cache.FilteredLayer.visible
    monkeypatch.setattr(attention, "packed_attention", lambda *a, **k: calls.append(a[1].shape) or attend(*a, **k))

    def looking(layer, place, active):
        found = see(layer, place, active)
        visible.append((found[:, 0, 0], place, active[:, 0]))
        return found

    monkeypatch.setattr(cache.FilteredLayer, "visible", looking)
    with on_device(monkeypatch):
        _, f = filtered(model, ids, [30, *[1] * 30])
    assert calls == [(4, 4, 1, 16)] * 60
    alone = 0
    for seen, place, active in visible:
        for b in range(4):
            first = 0 if active[b] else int(place[b])
            assert seen[b].nonzero()[:, 0].tolist() == list(range(first, int(place[b]) + 1))
            alone += not active[b]
    assert alone == f.skipped[:, :, 30:].sum() > 20
    assert f.report["rows"]["q"] == 2 * 4 * 60 - f.skipped[:, :, :30].sum()
