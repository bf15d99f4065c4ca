"""Refit against least squares by other means, and what it promises."""

import pytest
import torch

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.channels.journal import Journal
from kvprune.channels.repair.least_squares import Moments, Rows, ridge_fit, sums_of
from kvprune.channels.repair.refit import HELD_OUT, _Layer, refit, split
from kvprune.errors import TextTooShort
from kvprune.models.view import ModelView
from tiny import COARSE, VOCABULARY, make_plan, random_layers, tiny_model


def windows(count, length=24, seed=1):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(("sums", "rows"), [(Moments, 50), (Rows, 50), (Rows, 5)])
def test_ridge_fit_is_the_minimum(sums, rows, ridge):
    """The same problem as one stacked system, solved by lstsq."""
    generator = torch.Generator().manual_seed(0)
    x, y, old = (torch.randn(size, generator=generator) for size in ((rows, 7), (rows, 3), (3, 7)))
    moments = sums() if sums is Rows else sums(7, 3)
    moments.add(x[:2], y[:2])
    moments.add(x[2:].view(3, -1, 7), y[2:].view(3, -1, 3))
    found = ridge_fit(moments, old, ridge)
    pull = (ridge * x.double().square().sum() / 7).sqrt()
    stacked = torch.cat((x.double(), pull * torch.eye(7, dtype=torch.float64)))
    target = torch.cat((y.double(), pull * old.double().T))
    torch.testing.assert_close(found, torch.linalg.lstsq(stacked, target).solution.T, rtol=1e-6, atol=1e-7)

    def residual(weight):
        return (x.double() @ weight.double().T - y.double()).square().sum().item()

    assert moments.error(found) == pytest.approx(residual(found), rel=1e-4, abs=1e-6)
    assert moments.is_finite()
    assert float(moments.yy) == pytest.approx(float(y.square().sum()), rel=1e-6)
    assert residual(found) <= residual(old)  # the text's own residual never rises


def test_few_rows_are_kept_themselves():
    assert isinstance(sums_of(6, 7, 2), Rows)
    assert isinstance(sums_of(7, 7, 2), Moments)
    broken = Rows()
    broken.add(torch.full((2, 3), torch.inf), torch.zeros(2, 1))
    assert not broken.is_finite()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen2-sliding", "llama-bias"])
@torch.no_grad()
def test_refit_brings_the_model_back(family):
    """Hidden states, logits on text that refit never saw, the dense model left alone, and the held-out errors."""
    model = tiny_model(family, kv_heads=2, groups=2, head_dim=16, layers=3)
    view = ModelView(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = make_plan(model, random_layers(model, [8, 8, 8]))
    pruned, repaired = cut(view, plan), cut(view, plan)
    report = refit(view, repaired, list(windows(200).split(8)), lambda n: None)
    assert [(r.layer, r.matrix) for r in report] == [(layer, name) for layer in range(3) for name in ("o", "down")]
    assert all(r.after <= r.before for r in report)
    assert sum(r.ridge is not None for r in report) >= 4
    ids = windows(10, seed=5)

    def distance(other):
        return (other(ids).logits - model(ids).logits).square().mean().item()

    assert distance(repaired) < 0.8 * distance(pruned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_first_layer_solves_its_own_least_squares():
    """O of layer 0, whose input is the dense one, by lstsq on the rows themselves, each over the root mean square of
    the dense stream behind the attention."""
    model = tiny_model("llama", kv_heads=2, groups=1, head_dim=16, layers=1)
    view = ModelView(model)
    plan = make_plan(model, random_layers(model, [8]))
    pruned, repaired = cut(view, plan), cut(view, plan)
    ids = windows(64)
    report = refit(view, repaired, list(ids.split(8)), lambda n: None)
    fitted, _ = split(list(ids.split(8)))
    rows = {"z": [], "y": [], "stream": []}
    pruned.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: rows["z"].append(args[0]))
    model.model.layers[0].self_attn.register_forward_hook(lambda _m, _a, out: rows["y"].append(out[0]))
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_pre_hook(lambda _m, args: rows["stream"].append(args[0]))
    for batch in fitted:
        pruned(batch)
        model(batch)
    z, y, stream = (torch.cat([part.flatten(0, 1) for part in rows[name]]).double() for name in rows)
    size = (stream.square().sum(1, keepdim=True) / stream.shape[1]).sqrt()
    z, y = z / size, y / size
    old = pruned.model.layers[0].self_attn.o_proj.weight.double()
    pull = (report[0].ridge * z.square().sum() / z.shape[1]).sqrt()
    stacked = torch.cat((z, pull * torch.eye(z.shape[1], dtype=torch.float64)))
    expected = torch.linalg.lstsq(stacked, torch.cat((y, pull * old.T))).solution.T
    found = repaired.model.layers[0].self_attn.o_proj.weight.double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-bias", "mistral"])
@torch.no_grad()
def test_no_written_matrix_is_worse_than_the_one_before(family, dtype):
    """Residual behind attention and behind the block, from the models' own activations, on the held-out windows."""
    model = tiny_model(family, kv_heads=2, groups=2, head_dim=16, layers=3).to(dtype)
    view = ModelView(model)
    plan = make_plan(model, random_layers(model, [8, 12, 8]))
    pruned, repaired = cut(view, plan), cut(view, plan)
    batches = list(windows(40).split(8))
    report = {(r.layer, r.matrix): r for r in refit(view, repaired, batches, lambda n: None)}
    seen = {}

    def watch(key, module):
        module.register_forward_pre_hook(lambda _m, args: seen.__setitem__(key, args[0].double()))

    for name, lm in (("dense", model), ("ours", repaired)):
        for i, block in enumerate(lm.model.layers):
            watch((name, i, "middle"), block.post_attention_layernorm)
            watch((name, i, "o"), block.self_attn.o_proj)
            watch((name, i, "down"), block.mlp.down_proj)
            watch((name, i, "start"), block)
        watch((name, len(lm.model.layers), "start"), lm.model.norm)
    ids = torch.cat(split(batches)[1])
    model(ids)
    repaired(ids)
    for (i, matrix), r in report.items():
        before, behind = ("start", (i, "middle")) if matrix == "o" else ("middle", (i + 1, "start"))
        linear = {}
        for which, lm in (("old", pruned), ("new", repaired)):
            block = lm.model.layers[i]
            linear[which] = block.self_attn.o_proj if matrix == "o" else block.mlp.down_proj
        errors = {}
        for which, layer in linear.items():
            bias = 0 if layer.bias is None else layer.bias.double()
            made = seen["ours", i, before] + seen["ours", i, matrix] @ layer.weight.double().T + bias
            target = seen[("dense", *behind)]
            errors[which] = ((made - target).square().sum(-1) / target.square().mean(-1)).sum().item()
        slack = 1e-4 if dtype == torch.float32 else 0.02  # what rounding adds to a matrix that gains nothing
        assert errors["new"] <= errors["old"] * (1 + slack), (i, matrix)
        assert (r.ridge is None) == torch.equal(linear["old"].weight, linear["new"].weight)


@torch.no_grad()
def test_guard_keeps_what_text_cannot_improve():
    """Two windows of random text say nothing of other text: the held-out slice must not get worse."""
    model = tiny_model("llama", kv_heads=2, groups=2, head_dim=16, layers=2)
    view = ModelView(model)
    pruned = cut(view, make_plan(model, random_layers(model, [14, 14])))
    old = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    report = refit(view, pruned, [windows(2, length=3)], lambda n: None)
    assert all(r.after <= r.before for r in report)
    kept = [r for r in report if r.ridge is None]
    assert kept
    for r in kept:
        name = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}[r.matrix]
        key = f"model.layers.{r.layer}.{name}.weight"
        assert torch.equal(pruned.state_dict()[key], old[key])


def test_held_out_windows_are_never_fitted():
    for count in (2, 7, 8, 9, 33):
        ids = torch.arange(count).view(-1, 1).expand(-1, 5)
        fitted, held = (torch.cat(part)[:, 0].tolist() for part in split(list(ids.split(4))))
        assert sorted(fitted + held) == list(range(count))
        assert len(held) == max(count // HELD_OUT, 1)
    with pytest.raises(TextTooShort, match="two"):
        split([torch.zeros(1, 5, dtype=torch.long)])


def test_record_tells_what_refit_did(checkpoint, texts, tmp_path):
    result = kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, **{**COARSE, "repair_tokens": 2048})
    record = kvprune.read_record(tmp_path / "out")
    assert len(record["refit"]) == 8
    assert {"layer", "matrix", "before", "after", "ridge"} == set(record["refit"][0])
    assert record["method"]["repair"] == "rotate+refit"
    plain = kvprune.prune(checkpoint, ratio=0.5, repair="rotate", **COARSE)
    assert plain.plan.layers == result.plan.layers
    assert plain.record["refit"] == []
    down = "model.layers.0.mlp.down_proj.weight"
    dense = kvprune.load(checkpoint).state_dict()[down]
    assert torch.equal(plain.model.state_dict()[down], dense)
    assert not torch.equal(result.model.state_dict()[down], dense)


def test_an_interrupted_refit_goes_on_behind_its_last_layer(tmp_path, monkeypatch):
    model = tiny_model("llama-bias", kv_heads=2, groups=2, head_dim=16, layers=3)
    view = ModelView(model)
    plan = make_plan(model, random_layers(model, [8, 8, 8]))
    whole, resumed = cut(view, plan), cut(view, plan)
    batches = list(windows(40).split(8))
    expected = refit(view, whole, batches, lambda n: None)
    journal = Journal.open(tmp_path / "out", {}, resume=False)
    done = []

    def stop(_):
        done.append(None)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit(view, cut(view, plan), batches, stop, journal)
    fitted = []
    fit = _Layer._fit
    monkeypatch.setattr(_Layer, "_fit", lambda self, name, *a: fitted.append((self.index, name)) or fit(self, name, *a))
    again = Journal.open(tmp_path / "out", {}, resume=True)
    assert refit(view, resumed, batches, lambda n: None, again) == expected
    assert fitted == [(2, "o"), (2, "down")]
    weights = whole.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.state_dict().items())
