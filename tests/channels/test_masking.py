"""A layer as if channels were gone: against plain loops, against the cut itself, and without a trace."""

import pytest
import torch

from kvprune.channels.choice.basis import Kept, identity
from kvprune.channels.cut.surgery import cut
from kvprune.channels.widths.masking import masked
from kvprune.models.tap import tapped
from kvprune.models.view import ModelView
from tiny import (
    STILL,
    VOCABULARY,
    measured_bases,
    merged_plan,
    probes_of,
    project_dense,
    random_bases,
    random_layers,
    tiny_model,
)

FAMILIES = ["llama", "llama-bias", "qwen2"]


def kept_of(layer):
    return Kept(torch.tensor(layer.qk), torch.arange(layer.width).repeat(len(layer.qk), 1))


@pytest.mark.parametrize("merge", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_projects_as_plain_loops_do(family, merge):
    """Of heads that are merged in any order; and nothing of the other layer."""
    model = tiny_model(family, kv_heads=4, groups=2)
    bases = random_bases(model, merge)
    plan = merged_plan(model, bases, [8 * merge] * 2)
    expected = project_dense(model, plan, bases)
    expected.model.layers[0] = model.model.layers[0]
    view, ids = ModelView(model), torch.randint(3, VOCABULARY, (2, 11))
    dense = model(ids).logits
    with tapped(view), masked(view.attention[1], kept_of(plan.layers[1]), bases[1]):
        found = model(ids).logits
    torch.testing.assert_close(found, expected(ids).logits, rtol=1e-4, atol=1e-5)
    assert (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_is_what_surgery_makes(family, merge):
    """The probes see the very model that is cut, slow pairs included: these stand still here, so mixing is exact."""
    model = tiny_model(family, kv_heads=4, groups=2, layers=1, **STILL)
    (basis,) = measured_bases(model, merge, slow=True)
    assert len(basis.slow) == 14  # all pairs but the first
    plan = merged_plan(model, [basis], [8 * merge])
    view = ModelView(model)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    found = cut(view, plan, [basis])(ids).logits
    dense = model(ids).logits
    with tapped(view), masked(view.attention[0], kept_of(plan.layers[0]), basis):
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=2e-5)
    assert (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("merge", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_leaves_no_trace_after_an_error(family, merge):
    """merge 0: channels as they are."""
    model = tiny_model(family, groups=2)
    if merge:
        bases = random_bases(model, merge)
        kept, basis = kept_of(merged_plan(model, bases, [16, 16]).layers[1]), bases[1]
    else:
        probe = probes_of(random_layers(model, [8, 8]))[1]
        kept, basis = probe.kept, probe.basis
    ids, view = torch.randint(3, VOCABULARY, (2, 11)), ModelView(model)
    before, state = model(ids).logits, {name: set(vars(m)) for name, m in model.named_modules()}

    def fail_inside():
        with tapped(view), masked(view.attention[1], kept, basis):
            assert not torch.equal(model(ids).logits, before)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert {name: set(vars(m)) for name, m in model.named_modules()} == state


@pytest.mark.parametrize("merge", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removing_everything_leaves_the_attention_constant(family, merge):
    model = tiny_model(family, groups=2)
    basis = random_bases(model, merge)[0] if merge else identity(2, 16)
    nothing = torch.zeros(len(basis.heads), 0, dtype=torch.int64)
    outputs = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda _m, _a, out: outputs.append(out[0]))
    view = ModelView(model)
    with tapped(view), masked(view.attention[0], Kept(nothing, nothing), basis):
        model(torch.randint(3, VOCABULARY, (1, 7)))
    hook.remove()
    assert torch.allclose(outputs[0], outputs[0][:, :1].expand_as(outputs[0]), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_bfloat16_it_is_the_same_within_rounding(family):
    """Slow pairs are turned back in float32."""
    model = tiny_model(family, kv_heads=4, groups=2, layers=1, **STILL)
    (basis,) = measured_bases(model, 2, slow=True)
    plan, ids = merged_plan(model, [basis], [16]), torch.randint(3, VOCABULARY, (2, 11))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        view = ModelView(model.to(dtype))
        with tapped(view), masked(view.attention[0], kept_of(plan.layers[0]), basis):
            found.append(model(ids).logits.float())
    torch.testing.assert_close(*found, rtol=0.1, atol=0.1)
