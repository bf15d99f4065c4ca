"""A plan is plain JSON: it survives the round trip, and a bad one is refused in one line."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvprune.channels.plan import PruningPlan
from kvprune.channels.surgery import cut
from kvprune.errors import PlanMismatch
from kvprune.models.view import ModelView
from tiny import make_plan, random_layers, tiny_model


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


def test_one_layer_a_line(model):
    text = make_plan(model, random_layers(model, [8, 8])).to_json()
    assert sum('"qk"' in line for line in text.splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("layers"), "layers"),
        (lambda p: p["layers"][0]["qk"][0].pop(), "same number"),
        (lambda p: p["layers"][0]["vo"][0].reverse(), "ascending"),
        (lambda p: p["layers"][0].update(extra=1), "extra"),
        (lambda p: p.update(format=2), "format"),
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
