"""Phase A against the slow way, its cost, and what it leaves behind."""

import copy

import pytest
import torch

from kvprune.channels.choice.basis import Kept
from kvprune.channels.evidence.importance import IMPORTANCE
from kvprune.channels.evidence.statistics import score_layers
from kvprune.channels.journal import Journal
from kvprune.channels.widths.sensitivity import Probe, measure_sensitivity
from kvprune.errors import NotFinite, OutputExists
from kvprune.models.stream import BlockRunner
from kvprune.models.view import ModelView
from tiny import batches, mask_dense, merged_plan, probes_of, project_dense, random_bases, random_layers, tiny_model

LAYERS, D = 4, 16


@pytest.fixture(params=["llama", "mistral", "qwen2-sliding"])
def model(request):
    return tiny_model(request.param, groups=2, layers=LAYERS)


def full_loss(model):
    ids = torch.cat(batches())
    return model(ids, labels=ids).loss.item()


def test_equals_masking_one_block_at_a_time(model):
    layers = random_layers(model, [8] * LAYERS)
    found = measure_sensitivity(ModelView(model), batches(), probes_of(layers), Journal(), lambda n: None)
    whole = [list(range(D))] * 2
    for block in range(LAYERS):
        one = [layer if i == block else (whole, whole) for i, layer in enumerate(layers)]
        expected = full_loss(mask_dense(model, one)) - full_loss(model)
        assert abs(expected) > 1e-5
        assert found[block] == pytest.approx(expected, abs=2e-6)


def test_equals_projecting_one_block_at_a_time(model):
    """Heads merged."""
    bases = random_bases(model, 2)
    plan = merged_plan(model, bases, [16] * LAYERS)
    probes = [
        Probe(block, Kept(torch.tensor(layer.qk), torch.arange(16).unsqueeze(0)), bases[block])
        for block, layer in enumerate(plan.layers)
    ]
    found = measure_sensitivity(ModelView(model), batches(), probes, Journal(), lambda n: None)
    projected = project_dense(model, plan, bases)
    for block in range(LAYERS):
        alone = copy.deepcopy(model)
        alone.model.layers[block].load_state_dict(projected.model.layers[block].state_dict())
        expected = full_loss(alone) - full_loss(model)
        assert abs(expected) > 1e-5
        assert found[block] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("importance", sorted(IMPORTANCE))
def test_block_forwards_stay_within_the_bound(model, importance):
    """L (L + 1) / 2 + 2 L per batch, the importance pass included, and another L with gradients, for which a block runs
    twice. Counted in windows through a block, since taylor takes a batch window by window; a pass block by block sends
    one window ahead, to see how blocks are called."""
    view = ModelView(model)
    count = 0

    def hook(_block, args, kwargs, _output):
        nonlocal count
        count += len(args[0] if args else kwargs["hidden_states"])

    for block in view.blocks:
        block.register_forward_hook(hook, with_kwargs=True)
    windows = sum(len(batch) for batch in batches())
    score_layers(view, IMPORTANCE[importance], batches(), lambda n: None)
    measure_sensitivity(view, batches(), probes_of(random_layers(model, [8] * LAYERS)), Journal(), lambda n: None)
    passes = 3 if importance == "taylor" else 2
    assert 0 < count <= windows * (LAYERS * (LAYERS + 1) // 2 + passes * LAYERS) + LAYERS


def test_a_journal_resumes_where_it_was_cut(model, tmp_path):
    view, probes = ModelView(model), probes_of(random_layers(model, [8] * LAYERS))
    complete = measure_sensitivity(view, batches(), probes, Journal(), lambda n: None)

    journal = Journal.open(tmp_path / "out", {"ratio": 0.5}, resume=False)

    class Cut(Exception):
        pass

    done = 0

    def advance(steps):
        nonlocal done
        done += steps
        if done == 6:  # in the middle of the second batch
            raise Cut

    with pytest.raises(Cut):
        measure_sensitivity(view, batches(), probes, journal, advance)
    losses = tmp_path / "out" / ".resume" / "losses.jsonl"
    losses.write_text(losses.read_text() + "[1, 3, 12.")  # what a kill leaves of a line

    again = Journal.open(tmp_path / "out", {"ratio": 0.5}, resume=True)
    assert len(again.losses) == 6 + 2
    steps = []
    assert measure_sensitivity(view, batches(), probes, again, steps.append) == complete
    assert sum(steps) == LAYERS * len(batches())
    assert len(losses.read_text().splitlines()) == (LAYERS + 1) * len(batches())


def test_a_journal_of_other_settings_is_refused(tmp_path):
    Journal.open(tmp_path / "out", {"ratio": 0.5}, resume=False)
    with pytest.raises(OutputExists, match="--resume"):
        Journal.open(tmp_path / "out", {"ratio": 0.5}, resume=False)
    with pytest.raises(OutputExists, match=r"ratio=0\.5, not 0\.25"):
        Journal.open(tmp_path / "out", {"ratio": 0.25}, resume=True)


def test_nan_in_a_loss_names_the_layer(model):
    view = ModelView(model)
    probes = probes_of(random_layers(model, [8] * LAYERS))
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[:] = float("inf")
    with pytest.raises(NotFinite, match="layer 2 of the dense model"):
        measure_sensitivity(view, batches(), probes, Journal(), lambda n: None)


def test_nan_in_a_probe_names_the_layer(model, monkeypatch):
    view = ModelView(model)
    probes = probes_of(random_layers(model, [8] * LAYERS))
    real = BlockRunner.rerun
    monkeypatch.setattr(
        BlockRunner, "rerun", lambda self, start: real(self, start) * (float("nan") if start == 3 else 1)
    )
    with pytest.raises(NotFinite, match="layer 3, probed"):
        measure_sensitivity(view, batches(), probes, Journal(), lambda n: None)
