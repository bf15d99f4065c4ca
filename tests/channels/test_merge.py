"""How many KV heads become one, and a whole prune with merged heads."""

import json
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import errors
from kvprune.channels.planning import choose_merge
from kvprune.channels.settings import Settings, with_preset
from kvprune.models.attention import AttentionShape
from kvprune.runtime.modeling import CACHE
from tiny import COARSE, QUICK, VOCABULARY, Heard, stop, tiny_model, tiny_tokenizer

WITHOUT_WIDTHS = {name: value for name, value in COARSE.items() if name not in ("repair_tokens", "align", "min_width")}


def choose(kv_heads, head_dim, **options):
    said = []
    shape = AttentionShape(layers=2, hidden=64, kv_heads=kv_heads, groups=2, head_dim=head_dim)
    return choose_merge(Settings(source="", **options), shape, said.append), said


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "ratio", "merge"),
    [
        (8, 128, 0.5, 4),  # Llama-3-8B
        (8, 128, 0.25, 2),
        (8, 128, 0.75, 8),
        (32, 128, 0.5, 4),  # Llama-2-7B
        (2, 64, 0.5, 2),  # Qwen2.5-0.5B
        (3, 64, 0.5, 3),  # SmolLM2-135M
        (3, 64, 0.25, 3),
        (3, 128, 0.25, 1),  # three are too wide, and two do not divide them
        (8, 512, 0.1, 1),  # wider than kernels take, as it was
        (4, 64, 0.0, 1),
    ],
)
def test_auto(kv_heads, head_dim, ratio, merge):
    assert choose(kv_heads, head_dim, ratio=ratio) == (merge, [])


@given(st.integers(2, 40), st.sampled_from([16, 64, 80, 96, 128, 256]), st.floats(0.01, 0.9))
def test_auto_takes_the_most_that_fit(kv_heads, head_dim, ratio):
    merge, _ = choose(kv_heads, head_dim, ratio=ratio)
    fits = [m for m in range(1, kv_heads + 1) if kv_heads % m == 0 and m * head_dim * (1 - ratio) <= 256 + 1e-9]
    assert merge == max(fits, default=1)


@pytest.mark.parametrize("given", [1, 2, "2", 4, "auto"])
def test_what_is_asked_is_what_comes(given):
    assert choose(8, 64, ratio=0.5, merge=given)[0] == (8 if given == "auto" else int(given))


@pytest.mark.parametrize(
    "options",
    [{"channels": "joint"}, {"repair": "none"}, {"repair": "refit"}, {"importance": "energy"}, {"importance": "l1"}],
)
def test_heads_stay_apart_where_channels_are_cut_as_they_are(options):
    assert choose(8, 128, **options) == (1, [])
    assert choose(8, 128, merge=1, **options) == (1, [])
    with pytest.raises(errors.BadOption, match=r"--merge 2 .*--channels split, --importance variance.*--repair rotate"):
        choose(8, 128, merge=2, **options)


@pytest.mark.parametrize("given", ["two", "0", 0, -1, 1.5, "1.5", ""])
def test_a_merge_that_is_no_number_is_refused(given):
    with pytest.raises(errors.BadOption, match="from 1 up"):
        Settings(source="", merge=given)


def test_a_merge_that_cannot_be_is_refused():
    with pytest.raises(errors.BadOption, match=r"--merge 3 does not divide the 8 KV heads; choose auto, 1, 2, 4$"):
        choose(8, 128, merge=3, ratio=0.5)
    with pytest.raises(errors.BadOption, match=r"--merge 16 does not divide the 8 KV heads"):
        choose(8, 128, merge=16, ratio=0.5)
    with pytest.raises(
        errors.BadOption, match=r"--merge 8 makes heads of 512 channels.*take 256; choose auto, 1, 2, 4$"
    ):
        choose(8, 128, merge=8, ratio=0.5)
    with pytest.raises(errors.BadOption, match=r"--merge 4 makes heads of 384 channels at --ratio 0\.25"):
        choose(8, 128, merge=4, ratio=0.25)
    with pytest.raises(errors.BadOption, match=r"removes nothing.*leave out --merge 2"):
        choose(8, 16, merge=2, ratio=0.0)


def test_a_single_head_is_said_once():
    assert choose(1, 64, ratio=0.5) == (1, ["the model has one KV head, so there are none to merge"])
    assert choose(1, 64, ratio=0.5, merge=1) == (1, [])
    assert choose(1, 64, ratio=0.5, repair="none") == (1, [])


def test_the_paper_merges_nothing():
    settings = Settings(source="", **with_preset("kvpruner", {}))
    assert settings.merge == 1
    with pytest.raises(errors.BadOption, match="--preset kvpruner decides --merge itself"):
        with_preset("kvpruner", {"merge": 2})


def test_a_model_with_one_kv_head(texts, tmp_path):
    tiny_model("llama", kv_heads=1, groups=4).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    heard = Heard()
    result = kvprune.prune(tmp_path / "dense", ratio=0.5, progress=heard, **COARSE)
    assert sum("one KV head" in message for message in heard.said) == 1
    assert result.plan.merge == 1
    assert all(layer.heads is None and layer.vo is None for layer in result.plan.layers)


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("merge", ["auto", 1, 2])
def test_half_of_the_bytes_go_and_the_folder_loads(texts, tmp_path, merge, layout):
    """The cache that a merged model really fills, and the perplexity that the record promises."""
    dense = tiny_model("llama-bias", kv_heads=4, groups=2, head_dim=32)
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    result = kvprune.prune(tmp_path / "dense", tmp_path / "out", ratio=0.5, merge=merge, layout=layout, **COARSE)
    m = 4 if merge == "auto" else merge
    assert result.plan.merge == m
    assert sum(result.plan.widths) == 2 * 32 * m // 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_key_value_heads == 4 // m
    ids = torch.randint(3, VOCABULARY, (2, 20))
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
        held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
        assert held == 2 * 20 * 2 * 4 * 32 * 2 / 2  # sequences, tokens, layers, heads, channels, K and V, half
        torch.testing.assert_close(model(ids).logits, result.model(ids).logits)
    row = result.record["perplexity"][0]
    options = {"texts": [row["text"]], "window_lengths": (row["window"],), "tokens": 512}
    (again,) = kvprune.evaluate(tmp_path / "out", **options)["perplexity"]
    assert again["values"] == [pytest.approx(row["pruned"], rel=1e-6)]


def same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, {"merge": 1}, {"importance": "energy"}, {"repair": "rotate"}])
def test_a_plan_with_a_basis_applies_again(checkpoint, texts, tmp_path, options):
    first = kvprune.prune(checkpoint, tmp_path / "a", ratio=0.5, **options, **COARSE)
    assert all(layer.vo is None for layer in first.plan.layers)
    assert (first.plan.merge == 2) == ("merge" not in options and "importance" not in options)
    again = kvprune.prune(checkpoint, tmp_path / "b", plan=tmp_path / "a" / "plan.json", **WITHOUT_WIDTHS)
    assert again.plan == first.plan
    same_weights(first.model, again.model)
    with pytest.raises(errors.BadOption, match="--plan has decided --merge already"):
        kvprune.prune(checkpoint, plan=tmp_path / "a" / "plan.json", merge=2, **WITHOUT_WIDTHS)


def test_a_plan_knows_how_much_text_its_refit_took(checkpoint, texts, tmp_path):
    first = kvprune.prune(checkpoint, tmp_path / "a", ratio=0.5, **{**COARSE, "repair_tokens": 1024})
    plan = tmp_path / "a" / "plan.json"
    same_weights(first.model, kvprune.prune(checkpoint, plan=plan, **WITHOUT_WIDTHS).model)
    with pytest.raises(errors.BadOption, match="--repair-tokens"):
        kvprune.prune(checkpoint, plan=plan, repair_tokens=2048, **WITHOUT_WIDTHS)


def test_a_plan_with_a_basis_wants_its_importance_and_its_text(checkpoint, texts, tmp_path):
    plan = kvprune.prune(checkpoint, ratio=0.5, repair="rotate", **COARSE).plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    heard = Heard()
    options = {**WITHOUT_WIDTHS, "calibration": "ptb", "eval": ("wikitext2",)}
    kvprune.prune(checkpoint, plan=tmp_path / "plan.json", progress=heard, **options)
    assert sum("another calibration text" in message for message in heard.said) == 1
    (tmp_path / "plan.json").write_text(plan.model_copy(update={"method": {}}).to_json())
    with pytest.raises(errors.PlanMismatch, match="importance"):
        kvprune.prune(checkpoint, plan=tmp_path / "plan.json", **WITHOUT_WIDTHS)


def test_an_older_rotated_plan_is_refused_before_any_work(checkpoint, texts, tmp_path):
    plan = kvprune.prune(checkpoint, ratio=0.5, merge=1, **COARSE).plan
    content = json.loads(plan.to_json()) | {"format": 1}
    del content["merge"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(errors.PlanMismatch, match=r"older kvprune.*make it again"):
        kvprune.prune(checkpoint, tmp_path / "out", plan=tmp_path / "plan.json", **WITHOUT_WIDTHS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["estimate_sensitivity", "cut", "refit"])
def test_a_run_that_was_stopped_goes_on_to_equal_weights(checkpoint, texts, tmp_path, monkeypatch, stage):
    """What was measured comes from the journal, merged bases included: refit gets the very same model."""
    options = {**COARSE, "ratio": 0.5, "allocation": "budget"}
    whole = kvprune.prune(checkpoint, **options)
    assert whole.plan.merge == 2

    with monkeypatch.context() as patch:
        module = "planning" if stage == "estimate_sensitivity" else "prune"
        patch.setattr(f"kvprune.channels.{module}.{stage}", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            kvprune.prune(checkpoint, tmp_path / "out", **options)
    monkeypatch.setattr("kvprune.channels.evidence.moments.enter", stop)  # nothing is measured again
    resumed = kvprune.prune(checkpoint, tmp_path / "out", resume=True, **options)
    assert resumed.plan.layers == whole.plan.layers
    assert resumed.plan.sensitivity == whole.plan.sensitivity
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_journal_from_before_heads_could_be_merged_is_not_resumed(checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("kvprune.channels.prune.refit", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        kvprune.prune(checkpoint, tmp_path / "out", **COARSE)
    path = tmp_path / "out" / ".resume" / "settings.json"
    settings = json.loads(path.read_text())
    assert "kvprune" in settings["versions"]
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "merge"}))
    with pytest.raises(errors.OutputExists, match="older kvprune began; remove it"):
        kvprune.prune(checkpoint, tmp_path / "out", resume=True, **COARSE)
    versions = settings["versions"] | {"kvprune": "0.0.1"}
    path.write_text(json.dumps(settings | {"versions": versions}))
    with pytest.raises(errors.OutputExists, match=r"with versions=.*0\.0\.1"):
        kvprune.prune(checkpoint, tmp_path / "out", resume=True, **COARSE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"merge": 3}, errors.BadOption, "does not divide the 2 KV heads; choose auto, 1, 2"),
        ({"merge": "many"}, errors.BadOption, "--merge many"),
        ({"merge": 2, "repair": "none"}, errors.BadOption, "--repair rotate"),
        ({"merge": 2, "channels": "joint"}, errors.BadOption, "--channels split"),
        ({"merge": 2, "preset": "kvpruner"}, errors.BadOption, "--preset kvpruner decides --merge"),
        ({"merge": 2, "ratio": 0.0}, errors.BadOption, "leave out --merge"),
        ({"merge": 2, "ratio": math.nan}, errors.UnreachableRatio, "0 to 0.75"),
        ({"merge": 2, "ratio": 0.9}, errors.UnreachableRatio, "KV heads of 64 channels"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(checkpoint, texts, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        kvprune.prune(checkpoint, tmp_path / "out", **{**QUICK, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line(command, checkpoint, texts, tmp_path):
    few = {"calibration-tokens": 512, "eval-tokens": 512, "window": 64, "repair-tokens": 4096, "device": "cpu"}
    words = [word for name, value in few.items() for word in (f"--{name}", value)] + ["--json"]
    code, out, _ = command("prune", checkpoint, "--out", tmp_path / "out", "--merge", "2", *words)
    assert code == 0
    assert json.loads(out)["source"] == str(checkpoint)
    assert kvprune.PruningPlan.read(tmp_path / "out").merge == 2
    code, out, err = command("prune", checkpoint, "--out", tmp_path / "other", "--merge", "half", *words)
    assert (code, out) == (2, "")
    assert "--merge half" in err.splitlines()[-1]
