"""Refit where a norm stands between a matrix and the residual stream."""

import pytest
import torch
from every_family import VOCABULARY, family_model

from kvprune.channels.cut.surgery import cut
from kvprune.channels.repair.refit import refit, split
from kvprune.models.view import ModelView
from tiny import make_plan, random_layers


@pytest.mark.parametrize("matrix", ["o", "down"])
@torch.no_grad()
def test_behind_a_norm_the_larger_of_both_outputs_counts(matrix):
    """Layer 0 of Gemma 3, by lstsq on the rows themselves: what the dense matrix puts out is what is fitted to, each
    row over the larger of the root mean squares of that and of what comes out before, which is here the larger one of
    some rows and the smaller one of others."""
    model = family_model("gemma3_text")
    view = ModelView(model)
    plan = make_plan(model, random_layers(model, [4] * len(view.blocks)))
    before, repaired = cut(view, plan), cut(view, plan)
    place = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
    for lm in (before, repaired):
        larger = lm.model.layers[0].get_submodule(place[matrix])
        larger.weight = torch.nn.Parameter(2 * larger.weight)
    ids = torch.randint(3, VOCABULARY, (64, 24), generator=torch.Generator().manual_seed(1))
    batches = list(ids.split(8))
    report = {r.matrix: r for r in refit(view, repaired, batches, lambda n: None) if r.layer == 0}
    if matrix == "down":  # whose input comes from the new O
        before.model.layers[0].self_attn.o_proj.weight = repaired.model.layers[0].self_attn.o_proj.weight
    rows = {name: [] for name in ("x", "ours", "dense")}

    def keep(module, args, output):
        rows["x"].append(args[0])
        rows["ours"].append(output)

    layers = {
        name: lm.model.layers[0].get_submodule(place[matrix]) for name, lm in (("ours", before), ("dense", model))
    }
    layers["ours"].register_forward_hook(keep)
    layers["dense"].register_forward_hook(lambda _m, _a, output: rows["dense"].append(output))
    for batch in split(batches)[0]:
        before(batch)
        model(batch)
    x, ours, dense = (torch.cat([part.flatten(0, 1) for part in rows[name]]).double() for name in rows)
    sizes = [(y.square().sum(1, keepdim=True) / y.shape[1]).sqrt() for y in (ours, dense)]
    assert 0.02 < (sizes[0] > sizes[1]).double().mean() < 0.98
    size = torch.maximum(*sizes)
    x, y, old = x / size, dense / size, layers["ours"].weight.double()
    pull = (report[matrix].ridge * x.square().sum() / x.shape[1]).sqrt()
    stacked = torch.cat((x, pull * torch.eye(x.shape[1], dtype=torch.float64)))
    expected = torch.linalg.lstsq(stacked, torch.cat((y, pull * old.T))).solution.T
    found = repaired.model.layers[0].get_submodule(place[matrix]).weight.double()
    assert not torch.equal(found, old)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
