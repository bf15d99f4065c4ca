"""A layer as if channels were gone: against plain loops, against the cut itself, and without a trace."""

import pytest
import torch

from kvprune.channels.basis import Kept, identity
from kvprune.channels.masking import masked
from kvprune.channels.surgery import cut
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
    """Every weight, of heads that are merged in any order; and nothing of the other layer's."""
    model = tiny_model(family, kv_heads=4, groups=2)
    bases = random_bases(model, merge)
    plan = merged_plan(model, bases, [8 * merge] * 2)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = project_dense(model, plan, bases).state_dict()
    with masked(ModelView(model).attention[1], kept_of(plan.layers[1]), bases[1]):
        for name, tensor in model.state_dict().items():
            here = expected[name] if ".layers.1." in name else dense[name]
            torch.testing.assert_close(tensor, here, rtol=1e-5, atol=1e-6)
        for name in ("k_proj.weight", "v_proj.weight"):
            name = f"model.layers.1.self_attn.{name}"
            assert (model.state_dict()[name] - dense[name]).abs().max() > 0.01


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
    with masked(view.attention[0], kept_of(plan.layers[0]), basis):
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=2e-5)
    assert (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("merge", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_restores_every_bit_after_an_error(family, merge):
    """merge 0: channels as they are."""
    model = tiny_model(family, groups=2)
    if merge:
        bases = random_bases(model, merge)
        kept, basis = kept_of(merged_plan(model, bases, [16, 16]).layers[1]), bases[1]
    else:
        probe = probes_of(random_layers(model, [8, 8]))[1]
        kept, basis = probe.kept, probe.basis
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.1.self_attn.k_proj.weight"

    def fail_inside():
        with masked(ModelView(model).attention[1], kept, basis):
            assert not torch.equal(model.state_dict()[name], before[name])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("merge", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removing_everything_leaves_the_attention_constant(family, merge):
    model = tiny_model(family, groups=2)
    basis = random_bases(model, merge)[0] if merge else identity(2, 16)
    nothing = torch.zeros(len(basis.heads), 0, dtype=torch.int64)
    outputs = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda _m, _a, out: outputs.append(out[0]))
    with masked(ModelView(model).attention[0], Kept(nothing, nothing), basis):
        model(torch.randint(3, VOCABULARY, (1, 7)))
    hook.remove()
    assert torch.allclose(outputs[0], outputs[0][:, :1].expand_as(outputs[0]), atol=1e-6)
