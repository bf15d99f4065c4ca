"""A plan is plain JSON: it survives the round trip, and a bad one is refused in one line."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvprune.channels.cut.surgery import cut
from kvprune.channels.plan import PruningPlan
from kvprune.errors import PlanMismatch
from kvprune.models.view import ModelView
from tiny import VOCABULARY, make_plan, mask_dense, merged_plan, random_bases, random_layers, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", groups=2)


@given(st.lists(st.integers(1, 8), min_size=2, max_size=2), st.integers(0, 99))
def test_round_trip(widths, seed):
    model = tiny_model("llama", groups=2)
    plan = make_plan(model, random_layers(model, [2 * w for w in widths], seed))
    assert PruningPlan.model_validate_json(plan.to_json()) == plan
    assert plan.widths == [2 * w for w in widths]
    assert plan.ratio_achieved == pytest.approx(1 - 2 * sum(widths) / 32)


@given(st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 16), min_size=2, max_size=2), st.integers(0, 99))
def test_round_trip_of_merged_heads(merge, pairs, seed):
    model = tiny_model("llama", kv_heads=4)
    widths = [2 * min(n, 8 * merge) for n in pairs]
    bases = random_bases(model, merge, seed)
    plan = merged_plan(model, bases, widths, seed)
    again = PruningPlan.model_validate_json(plan.to_json())
    assert again == plan
    again.check("llama", ModelView(model).shape)
    assert again.widths == widths
    assert again.ratio_achieved == pytest.approx(1 - sum(widths) / (2 * 16 * merge))
    assert [layer.heads for layer in again.layers] == [tuple(map(tuple, b.heads.tolist())) for b in bases]


def test_one_layer_a_line(model):
    text = make_plan(model, random_layers(model, [8, 8])).to_json()
    assert sum('"qk"' in line for line in text.splitlines()) == 2


def older(plan):
    """As kvprune wrote it before heads could be merged."""
    content = json.loads(plan.to_json()) | {"format": 1}
    del content["merge"]
    for layer in content["layers"]:
        del layer["heads"]
    return json.dumps(content)


@torch.no_grad()
def test_a_plan_of_format_1_still_applies(tmp_path):
    model = tiny_model("llama-bias", groups=2)
    layers = random_layers(model, [8, 12])
    (tmp_path / "plan.json").write_text(older(make_plan(model, layers)))
    ids = torch.randint(3, VOCABULARY, (2, 11))
    found = cut(ModelView(model), PruningPlan.read(tmp_path))(ids).logits
    torch.testing.assert_close(found, mask_dense(model, layers)(ids).logits, rtol=0, atol=1e-5)


def test_a_rotated_plan_of_format_1_is_refused(model, tmp_path):
    """Its qk were numbers of another basis."""
    layers = [(qk, None) for qk, _ in random_layers(model, [8, 12])]
    plan = make_plan(model, layers)
    bases = random_bases(model, 1)
    cut(ModelView(model), plan, bases)
    (tmp_path / "plan.json").write_text(older(plan))
    with pytest.raises(PlanMismatch, match=r"older kvprune.*make it again"):
        cut(ModelView(model), PruningPlan.read(tmp_path), bases)


def test_a_merged_plan_alone_says_too_little(model):
    plan = merged_plan(model, random_bases(model, 2), [8, 8])
    with pytest.raises(PlanMismatch, match="kvprune prune --plan"):
        cut(ModelView(model), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(merge=1), "does not fit 4 KV heads"),
        (lambda p: p.update(merge=4), "does not fit 4 KV heads"),
        (lambda p: p["layers"][1].update(heads=None), "every KV head in one group of 2"),
        (lambda p: p["layers"][1].update(heads=[[0, 1], [2, 2]]), "layer 1 .*every KV head in one group of 2"),
        (lambda p: p["layers"][1].update(heads=[[0, 1], [2, 4]]), "every KV head in one group of 2"),
        (lambda p: p["layers"][0].update(heads=[[0, 1, 2], [3]]), "layer 0 .*every KV head in one group of 2"),
        (lambda p: p["layers"][0].update(qk=[[0, 32], [0, 16]]), "does not fit"),
        (lambda p: p["layers"][0].update(qk=[[0, 8], [0, 16]]), "layer 0 .*RoPE pair"),
        (lambda p: p["layers"][0].update(vo=[[0, 1]] * 2), "null in all"),
        (lambda p: [layer.update(vo=[[0, 1]] * 2) for layer in p["layers"]], "null in all"),
    ],
)
def test_a_merged_plan_that_cannot_be_is_refused(change, message):
    model = tiny_model("llama", kv_heads=4)
    bases = random_bases(model, 2)
    content = json.loads(merged_plan(model, bases, [2, 2]).to_json())
    cut(ModelView(model), PruningPlan.model_validate(content), bases)
    change(content)
    with pytest.raises(PlanMismatch, match=message):
        cut(ModelView(model), PruningPlan.model_validate(content), bases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("layers"), "layers"),
        (lambda p: p["layers"][0]["qk"][0].pop(), "same number"),
        (lambda p: p["layers"][0]["vo"][0].reverse(), "ascending"),
        (lambda p: p["layers"][0].update(extra=1), "extra"),
        (lambda p: p.update(format=3), "format"),
        (lambda p: p.update(merge=0), "merge"),
        (lambda p: p["layers"][0].update(heads=[[0, 1]]), "one list per KV head"),
    ],
)
def test_an_invalid_plan_is_refused(model, tmp_path, change, message):
    content = json.loads(make_plan(model, random_layers(model, [8, 8])).to_json())
    change(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanMismatch, match=message) as error:
        PruningPlan.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_what_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanMismatch):
        PruningPlan.read(tmp_path / "plan.json")


def test_a_plan_for_another_model_is_refused(model):
    plan = make_plan(model, random_layers(model, [8, 8]))
    for other in (
        tiny_model("llama", groups=1),
        tiny_model("qwen2", groups=2),
        tiny_model("llama", groups=2, layers=3),
        tiny_model("llama", groups=2, head_dim=8),
    ):
        with pytest.raises(PlanMismatch, match="another model"):
            cut(ModelView(other), plan)


def test_a_plan_that_splits_a_pair_or_leaves_the_head_is_refused(model):
    whole = random_layers(model, [8, 8])
    split = [([[0, 1, 8, 10]] * 2, [[0, 1, 2, 3]] * 2), whole[1]]
    with pytest.raises(PlanMismatch, match="RoPE pair"):
        cut(ModelView(model), make_plan(model, split))
    outside = [([[0, 8]] * 2, [[0, 16]] * 2), whole[1]]
    with pytest.raises(PlanMismatch, match="does not fit"):
        cut(ModelView(model), make_plan(model, outside))


def test_a_byte_order_mark_is_no_plan(tmp_path):
    model = tiny_model("llama")
    plan = make_plan(model, random_layers(model, (8, 8)))
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8-sig")
    assert PruningPlan.read(tmp_path / "plan.json") == plan
