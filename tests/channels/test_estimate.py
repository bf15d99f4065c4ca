"""Estimated sensitivities against their formula, written out, and against what small cuts really cost."""

import copy

import pytest
import torch

import kvprune
from kvprune.channels.choice.basis import Kept
from kvprune.channels.journal import Journal
from kvprune.channels.planning import first_windows
from kvprune.channels.widths.estimate import estimate_sensitivity
from kvprune.channels.widths.sensitivity import Probe, measure_sensitivity
from kvprune.models.view import ModelView
from tiny import (
    COARSE,
    batches,
    mask_dense,
    merged_plan,
    probes_of,
    project_dense,
    random_bases,
    random_layers,
    tiny_model,
)

LAYERS = 3


@pytest.fixture(params=["llama", "llama-bias", "qwen2-sliding"])
def model(request):
    return tiny_model(request.param, groups=2, layers=LAYERS)


def attention_outputs(model, window, add=None):
    """Every layer's attention output (T, hidden), with add[i] on top of layer i's, and the summed loss."""
    outputs = []

    def keep(_module, _args, output):
        here = output[0] if add is None else output[0] + add[len(outputs)]
        outputs.append(here)
        return (here, *output[1:])

    hooks = [block.self_attn.register_forward_hook(keep) for block in model.model.layers]
    loss = model(window, labels=window).loss * (window.shape[1] - 1)
    for hook in hooks:
        hook.remove()
    return outputs, loss


def by_the_formula(model, changed):
    """One window, layer and token at a time; changed: the dense model with one layer cut, for each layer."""
    found = [0.0] * LAYERS
    windows = torch.cat(batches()).split(1)
    for window in windows:
        add = [torch.zeros(1, 13, model.config.hidden_size, requires_grad=True) for _ in range(LAYERS)]
        dense, loss = attention_outputs(model, window, add)
        gradients = torch.autograd.grad(loss, add)
        dense = [output.detach() for output in dense]
        for i in range(LAYERS):
            with torch.no_grad():
                cut, _ = attention_outputs(changed[i], window)
            for t in range(13):
                along = (gradients[i][0, t] @ (cut[i][0, t] - dense[i][0, t])).item()
                found[i] += along + along**2 / 2
    return [total / (5 * 12) for total in found]


@pytest.mark.parametrize("merged", [False, True])
def test_equals_the_formula(model, merged):
    if merged:
        bases = random_bases(model, 2)
        plan = merged_plan(model, bases, [16] * LAYERS)
        leading = torch.arange(16).unsqueeze(0)
        probes = [Probe(i, Kept(torch.tensor(plan.layers[i].qk), leading), bases[i]) for i in range(LAYERS)]
        all_cut = project_dense(model, plan, bases)
    else:
        layers = random_layers(model, [8] * LAYERS)
        probes = probes_of(layers)
        all_cut = mask_dense(model, layers)
    changed = [copy.deepcopy(model) for _ in range(LAYERS)]
    for i, alone in enumerate(changed):
        alone.model.layers[i].load_state_dict(all_cut.model.layers[i].state_dict())
    found = estimate_sensitivity(ModelView(model), batches(), probes, lambda n: None)
    expected = by_the_formula(model, changed)
    assert max(map(abs, expected)) > 1e-4
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_small_cut_costs_what_is_estimated():
    """Channels that hardly matter: the first order is all there is."""
    model = tiny_model("llama", groups=2, layers=LAYERS)
    layers = random_layers(model, [14] * LAYERS)
    with torch.no_grad():
        for block, (qk, vo) in zip(model.model.layers, layers, strict=True):
            for head in range(2):
                for channel in range(16):
                    block.self_attn.k_proj.weight[head * 16 + channel] *= 1 if channel in qk[head] else 0.01
                    block.self_attn.v_proj.weight[head * 16 + channel] *= 1 if channel in vo[head] else 0.01
    view = ModelView(model)
    found = estimate_sensitivity(view, batches(), probes_of(layers), lambda n: None)
    measured = measure_sensitivity(view, batches(), probes_of(layers), Journal(), lambda n: None)
    assert found == pytest.approx(measured, rel=0.1, abs=2e-6)


def test_any_order_of_probes_and_one_call_a_batch(model):
    layers = random_layers(model, [8] * LAYERS)
    probes = probes_of(layers)
    done = []
    forward = estimate_sensitivity(ModelView(model), batches(), probes, done.append)
    backward = estimate_sensitivity(ModelView(model), batches(), probes[::-1], lambda n: None)
    assert forward == pytest.approx(backward[::-1])
    assert done == [1] * 3


def test_prune_estimates_unless_told_to_measure(checkpoint, texts):
    found = {
        probes: kvprune.prune(checkpoint, ratio=0.5, allocation="sensitivity", probes=probes, **COARSE).plan
        for probes in ("estimated", "measured")
    }
    assert found["estimated"].method["probes"] == "estimated"
    assert found["estimated"].sensitivity != found["measured"].sensitivity
    paper = kvprune.prune(checkpoint, ratio=0.5, preset="kvpruner", **COARSE).plan
    assert paper.method["probes"] == "measured"


def test_a_probe_reads_whole_windows_up_to_its_tokens():
    given = list(torch.arange(60).view(10, 6).split(4))
    for tokens, windows in ((None, 10), (1, 1), (6, 1), (7, 2), (24, 4), (25, 5), (60, 10), (999, 10)):
        found = first_windows(given, tokens)
        assert torch.equal(torch.cat(found), torch.arange(60).view(10, 6)[:windows])
