"""`prune` from end to end on a tiny checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import errors
from kvprune.measure.memory import cache_bytes
from kvprune.runtime.modeling import CACHE
from kvprune.text.given import find_text
from tiny import COARSE, QUICK, stop, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("importance", ["variance", "energy", "taylor", "l1", "l2"])
@pytest.mark.parametrize("channels", ["split", "joint"])
def test_half_of_the_bytes_go_and_the_folder_loads(checkpoint, texts, tmp_path, importance, channels):
    out = tmp_path / "out"
    result = kvprune.prune(checkpoint, out, ratio=0.5, importance=importance, channels=channels, **COARSE)
    record = json.loads((out / "kvprune.json").read_text())
    kv = record["kv_bytes_per_token"]
    assert kv["dense"] == 2 * 4 * 2 * 32 * 4
    assert abs(kv["pruned"] / kv["dense"] - 0.5) <= 0.01
    assert record["ratio_achieved"] == pytest.approx(1 - kv["pruned"] / kv["dense"])
    if channels == "joint":
        assert all(layer.qk == layer.vo for layer in result.plan.layers)
    merge = 2 if (importance, channels) == ("variance", "split") else 1
    assert result.plan.merge == record["merge"] == merge

    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(3, 300, (1, 9))
    generated = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = generated[CACHE]
    assert cache_bytes(cache) == kv["pruned"] * cache.get_seq_length()
    by_hand = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(cache) == by_hand
    assert record["parameters"]["pruned"] == sum(p.numel() for p in model.parameters())
    assert record["parameters"]["dense"] == sum(p.numel() for p in tiny_model_like(checkpoint).parameters())

    assert kvprune.PruningPlan.read(out) == result.plan
    assert {row["window"] for row in record["perplexity"]} == {32, 64}
    assert all(row["tokens"] == 512 // row["window"] * (row["window"] - 1) for row in record["perplexity"])
    assert not (out / ".resume").exists()


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_longrope(texts, tmp_path, layout):
    """Its factors belong to the dense width; transformers checks them when the folder is written."""
    tiny_model("longrope", groups=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(errors.BadOption, match="--layout uniform"):
        kvprune.prune(tmp_path / "dense", layout="portable", **COARSE)
    result = kvprune.prune(tmp_path / "dense", tmp_path / "out", layout=layout, **COARSE)
    row = result.record["perplexity"][0]
    options = {"texts": [row["text"]], "window_lengths": (row["window"],), "tokens": 512}
    (again,) = kvprune.evaluate(tmp_path / "out", **options)["perplexity"]
    assert again["values"] == [pytest.approx(row["pruned"], rel=1e-6)]


def tiny_model_like(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def test_record_has_the_contract_fields(checkpoint, texts):
    record = kvprune.prune(checkpoint, ratio=0.5, allocation="budget", **COARSE).record
    contract = "source ratio ratio_achieved kv_bytes_per_token parameters widths layout method perplexity seconds"
    assert set(contract.split()) | {"peak_memory_bytes", "versions", "seed"} <= set(record)
    assert set(record["perplexity"][0]) == {"text", "window", "tokens", "dense", "pruned"}
    assert {"load", "importance", "sensitivity", "surgery", "refit"} <= set(record["seconds"])
    assert len(record["widths"]) == 4
    assert record["merge"] == 2
    assert sum(record["widths"]) == 4 * 2 * 32 // 2


def test_ratio_zero_keeps_the_model(checkpoint, texts, tmp_path):
    result = kvprune.prune(checkpoint, tmp_path / "out", ratio=0.0, **QUICK)
    ids = torch.randint(3, 300, (2, 9))
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, dense(ids).logits)
    assert all(row["dense"] == row["pruned"] for row in result.record["perplexity"])


def test_preset_is_the_paper(checkpoint, texts):
    plan = kvprune.prune(checkpoint, ratio=0.5, preset="kvpruner", **COARSE).plan
    assert (plan.method["importance"], plan.method["channels"]) == ("taylor", "joint")
    assert plan.merge == 1
    assert plan.method["allocation"] == "sensitivity"
    assert plan.sensitivity is not None


def test_layouts_and_allocations(checkpoint, texts):
    steps_of_8 = {**QUICK, "repair_tokens": 4096}
    uniform = kvprune.prune(checkpoint, ratio=0.4, layout="uniform", **steps_of_8).plan
    assert uniform.widths == [40] * 4  # of two heads of 32: 0.375 is nearer to 0.4 than 0.5
    apart = kvprune.prune(checkpoint, ratio=0.4, layout="uniform", merge=1, **steps_of_8).plan
    assert apart.widths == [16] * 4  # of 32: 0.5 is nearer to 0.4 than 0.25
    assert kvprune.prune(checkpoint, ratio=0.5, allocation="uniform", **steps_of_8).plan.widths == [32] * 4
    ranked = kvprune.prune(checkpoint, ratio=0.5, allocation="rank", **COARSE).plan
    order = sorted(range(4), key=lambda i: ranked.sensitivity[i])
    assert [ranked.widths[i] for i in order] == sorted(ranked.widths)


def test_a_saved_plan_gives_the_same_model_again(checkpoint, texts, tmp_path):
    first = kvprune.prune(checkpoint, tmp_path / "a", ratio=0.5, **COARSE)
    second = kvprune.prune(checkpoint, tmp_path / "b", plan=tmp_path / "a" / "plan.json", **QUICK)
    with pytest.raises(errors.BadOption, match="--ratio"):
        kvprune.prune(checkpoint, plan=tmp_path / "a" / "plan.json", ratio=0.5, **QUICK)
    assert first.plan.layers == second.plan.layers
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_file_is_calibrated_on_its_beginning_and_judged_on_its_end(checkpoint, texts):
    path = str(texts / "ptb-valid.txt")
    result = kvprune.prune(checkpoint, ratio=0.5, calibration=path, **COARSE)
    assert result.record["perplexity"][0]["text"] == f"{path} (its end)"
    with pytest.raises(errors.BadOption, match="--eval"):
        kvprune.prune(checkpoint, ratio=0.5, calibration=path, **{**COARSE, "eval_tokens": 10**6})
    with pytest.raises(errors.BadOption, match="leave --eval out"):
        kvprune.prune(checkpoint, calibration=path, eval=(path,), **COARSE)
    with pytest.raises(errors.UnknownText, match="test split"):
        kvprune.prune(checkpoint, calibration=str(texts / "ptb-test.txt"), **COARSE)


RUN = """
import sys, json, time, kvprune
from kvprune.channels import journal
slow = journal.Journal.add
def add(*a):
    slow(*a)
    time.sleep(0.05)
journal.Journal.add = add
kvprune.prune(sys.argv[1], sys.argv[2], ratio=0.5, **json.loads(sys.argv[3]))
"""


def test_kill_and_resume_gives_the_same_plan(checkpoint, texts, tmp_path, monkeypatch):
    options = {**COARSE, "allocation": "sensitivity", "probes": "measured", "calibration_tokens": 4096 * 3}
    options |= {"repair_tokens": 65536, "windows": [32, 64]}
    command = [sys.executable, "-c", RUN, str(checkpoint), str(tmp_path / "cut"), json.dumps(options)]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    losses = tmp_path / "cut" / ".resume" / "losses.jsonl"
    deadline = time.monotonic() + 120
    while not (losses.exists() and losses.read_text().count("\n") >= 7):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = losses.read_text()
    with pytest.raises(errors.UnknownSource, match="unfinished"):
        kvprune.load(tmp_path / "cut")
    options["windows"] = (32, 64)
    with pytest.raises(errors.OutputExists, match="--resume"):
        kvprune.prune(checkpoint, tmp_path / "cut", ratio=0.5, **options)
    text = texts / "wikitext2-valid.txt"
    whole = text.read_text()
    lines = whole.splitlines(keepends=True)  # what refit reads behind what is calibrated on is another text now
    text.write_text("".join(lines[: len(lines) // 2] + lines[: len(lines) // 2]))
    with pytest.raises(errors.OutputExists, match="calibration_text"):
        kvprune.prune(checkpoint, tmp_path / "cut", ratio=0.5, resume=True, **options)
    text.write_text(whole)
    with monkeypatch.context() as patch:
        patch.setattr("kvprune.channels.evidence.moments.enter", stop)  # nothing is scored again
        kvprune.prune(checkpoint, tmp_path / "cut", ratio=0.5, resume=True, **options)
    assert found.count("\n") >= 7
    kvprune.prune(checkpoint, tmp_path / "whole", ratio=0.5, **options)
    layers = [(tmp_path / name / "plan.json").read_text().split('"layers": [')[-1] for name in ("cut", "whole")]
    assert layers[0] == layers[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0.99}, errors.UnreachableRatio, "0 to 0.75"),
        ({"ratio": -0.1}, errors.UnreachableRatio, "0 to 0.75"),
        ({"ratio": 1.0}, errors.UnreachableRatio, "0 to 0.75"),
        ({"ratio": float("nan")}, errors.UnreachableRatio, "0 to 0.75"),
        ({"ratio": 0.6, "merge": 1}, errors.UnreachableRatio, "0 to 0.5"),
        ({"importance": "l3"}, errors.BadOption, "energy, taylor, l1, l2"),
        ({"preset": "x"}, errors.BadOption, "kvpruner"),
        ({"repair": "magic"}, errors.BadOption, "none"),
        ({"calibration": "nosuch"}, errors.UnknownText, "wikitext2, ptb"),
        ({"eval": ("nosuch",)}, errors.UnknownText, "nosuch"),
        ({"calibration_tokens": 10**6}, errors.TextTooShort, "1000000|tokens"),
        ({"eval_tokens": 10**6}, errors.TextTooShort, "tokens"),
        ({"align": 3}, errors.BadOption, "--align 3"),
        ({"device": "nosuch"}, errors.BadOption, "nosuch"),
        ({"dtype": "int3"}, errors.BadOption, "int3"),
        ({"plan": "nosuch.json"}, errors.PlanMismatch, "nosuch.json"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(checkpoint, texts, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        kvprune.prune(checkpoint, tmp_path / "out", **{**QUICK, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_not_overwritten(checkpoint, texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    for resume in (False, True):
        with pytest.raises(errors.OutputExists):
            kvprune.prune(checkpoint, tmp_path / "out", resume=resume, **QUICK)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_pruned_folder_is_not_pruned_again(checkpoint, texts, tmp_path):
    kvprune.prune(checkpoint, tmp_path / "once", ratio=0.5, **COARSE)
    with pytest.raises(errors.BadOption, match="pruned already"):
        kvprune.prune(tmp_path / "once", tmp_path / "twice", **COARSE)


def test_nan_weights_are_named_and_leave_nothing(texts, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    kvprune.load_tokenizer(checkpoint).save_pretrained(tmp_path / "nan")
    with pytest.raises(errors.NotFinite, match=r"layer 2: .*k_proj\.weight holds NaN"):
        kvprune.prune(tmp_path / "nan", tmp_path / "out", **COARSE)
    assert not (tmp_path / "out").exists()


def test_nan_that_only_the_evaluation_meets_leaves_nothing(texts, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises(errors.NotFinite):
        kvprune.prune(tmp_path / "nan", tmp_path / "out", importance="l1", allocation="uniform", **COARSE)
    with pytest.raises(errors.NotFinite, match="layer 1"):
        kvprune.prune(tmp_path / "nan", tmp_path / "out", importance="l1", **COARSE)
    assert not (tmp_path / "out").exists()


def test_a_run_on_other_text_is_not_resumed(checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("kvprune.channels.prune.refit", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        kvprune.prune(checkpoint, tmp_path / "out", **COARSE)
    (texts / "wikitext2-valid.txt").write_text((texts / "ptb-valid.txt").read_text())
    with pytest.raises(errors.OutputExists, match="calibration_text"):
        kvprune.prune(checkpoint, tmp_path / "out", resume=True, **COARSE)


def test_a_run_that_was_stopped_behind_its_probes_goes_on_to_the_same_plan(checkpoint, texts, tmp_path, monkeypatch):
    options = {**COARSE, "ratio": 0.5, "allocation": "budget"}
    whole = kvprune.prune(checkpoint, **options)
    with monkeypatch.context() as patch:
        patch.setattr("kvprune.channels.prune.refit", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            kvprune.prune(checkpoint, tmp_path / "out", **options)
    monkeypatch.setattr("kvprune.models.backward.enter", stop)  # they are not estimated again
    found = kvprune.prune(checkpoint, tmp_path / "out", resume=True, **options)
    assert found.plan.layers == whole.plan.layers
    assert found.plan.sensitivity == whole.plan.sensitivity


def test_a_run_that_an_older_kvprune_began_is_not_resumed(checkpoint, texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("kvprune.channels.prune.refit", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            kvprune.prune(checkpoint, tmp_path / "out", **COARSE)
    path = tmp_path / "out" / ".resume" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["probes"]
    path.write_text(json.dumps(settings))
    with pytest.raises(errors.OutputExists, match="older kvprune began; remove it"):
        kvprune.prune(checkpoint, tmp_path / "out", resume=True, **COARSE)


def test_a_small_ratio_still_probes_something(checkpoint, texts):
    plan = kvprune.prune(checkpoint, ratio=0.02, allocation="budget", **{**COARSE, "min_width": 2}).plan
    assert any(change != 0 for change in plan.sensitivity)


def test_tied_embeddings_no_head_dim_no_pad_token(texts, tmp_path):
    """As Qwen2.5 has them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=300, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "qwen")
    options = {**COARSE, "min_width": 2}
    result = kvprune.prune(tmp_path / "qwen", tmp_path / "out", ratio=0.5, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ids = torch.randint(3, 300, (1, 9))
    assert torch.equal(model(ids).logits, result.model(ids).logits)
    assert sum(result.plan.widths) == 4 * 2 * 12 // 2


@pytest.mark.parametrize("layout", ["per-layer", "portable"])
def test_a_head_that_the_config_calls_tied_stays_the_checkpoints_own(checkpoint, texts, tmp_path, layout):
    """tie_word_embeddings is true, but the file has an lm_head of its own: transformers 5 loads both."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(dense.lm_head.weight, dense.model.embed_tokens.weight)
    out, recovered = tmp_path / "out", tmp_path / "recovered"
    kvprune.prune(source, out, ratio=0.0, layout=layout, **QUICK)
    kvprune.recover(out, recovered, steps=0, eval_tokens=512, eval_windows=(64,), tokens=2048, held_out=512, window=64)
    ids = torch.randint(3, 300, (2, 9))
    for folder in (out, recovered):
        for load in (kvprune.load, AutoModelForCausalLM.from_pretrained):
            torch.testing.assert_close(load(folder)(ids).logits, dense(ids).logits, rtol=0, atol=1e-6)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "how", [{}, {"allocation": "budget"}, {"allocation": "budget", "probes": "measured"}, {"depth": 1}]
)
def test_bfloat16(checkpoint, texts, how):
    result = kvprune.prune(checkpoint, ratio=0.5, dtype="bfloat16", **COARSE, **how)
    assert result.model.dtype == torch.bfloat16
    assert result.record["kv_bytes_per_token"]["dense"] == 2 * 4 * 2 * 32 * 2


def test_other_models_are_refused(tmp_path, texts):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=30))
    model.save_pretrained(tmp_path / "bloom")
    with pytest.raises(errors.UnsupportedArchitecture, match="its attention has no interface"):
        kvprune.prune(tmp_path / "bloom", tmp_path / "out", **QUICK)


@pytest.mark.parametrize(("options", "message"), [
    ({"repair_tokens": 2}, "--repair-tokens"),
    ({"allocation": "budget", "probe": 0.5}, "--probe says nothing to --allocation budget.*sensitivity or rank"),
    ({"probe": 0.5}, "--probe says nothing to --allocation uniform.*sensitivity or rank"),
    ({"tau": 5.0}, "--tau says nothing to --allocation uniform.*add --allocation sensitivity"),
    ({"allocation": "rank", "tau": 5.0}, "--tau says nothing to --allocation rank"),
    ({"allocation": "uniform", "probes": "measured"}, "--probes says nothing to --allocation uniform"),
    ({"layout": "uniform", "probe_tokens": 64}, "--probe-tokens says nothing to --allocation uniform"),
    ({"layout": "portable", "allocation": "budget"}, "--layout portable has one width for all layers"),
    ({"allocation": "budget", "probes": "guessed"}, "unknown probes 'guessed'; choose estimated, measured"),
    ({"repair": "turn"}, "unknown repair"),
    ({"allocation": "budget", "probe_tokens": 1}, "probe_tokens"),
])  # fmt: skip
def test_repair_options_are_refused_before_any_work(checkpoint, texts, tmp_path, options, message):
    with pytest.raises(errors.KVPruneError, match=message):
        kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, **{**COARSE, **options})
    assert not (tmp_path / "out").exists()


def test_evaluation_text_is_never_the_calibration_text(checkpoint, texts, monkeypatch):
    monkeypatch.chdir(texts)
    for calibration, judged in (("ptb-valid.txt", "./ptb-valid.txt"), ("ptb", str(texts / "ptb-valid.txt"))):
        with pytest.raises(errors.BadOption, match="is the calibration text"):
            kvprune.prune(checkpoint, ratio=0.5, calibration=calibration, eval=(judged,), **COARSE)
    (texts / "test.txt").write_text((texts / "ptb-test.txt").read_text())
    with pytest.raises(errors.UnknownText, match="test split"):
        kvprune.prune(checkpoint, ratio=0.5, calibration="test.txt", eval=("ptb",), **COARSE)


def test_the_end_of_a_file_is_not_repaired_on(checkpoint, tmp_path, monkeypatch):
    """A file's end judges: refit must take less than it would like."""
    from kvprune.channels.evidence import texts as texts_module
    from kvprune.channels.settings import Settings
    from kvprune.progress import Progress
    from tiny import words

    path = tmp_path / "own.txt"
    path.write_text(words(2000))
    settings = Settings(source="", calibration=str(path), **COARSE)
    tokenizer = tiny_tokenizer()
    model = tiny_model_like(checkpoint)
    found = texts_module.prepare(settings, find_text(path), (), model, tokenizer, True, 4096, Progress())
    total = len(tokenizer(path.read_text())["input_ids"])
    repaired = sum(batch.numel() for batch in found.repaired)
    assert 512 < repaired <= total - settings.eval_tokens < settings.repair_tokens
    ids = tokenizer(path.read_text())["input_ids"]
    assert torch.cat(found.repaired).flatten().tolist() == ids[:repaired]
    for _, judged in found.evaluated:
        assert judged.flatten().tolist() == ids[-settings.eval_tokens :][: judged.numel()]
