"""`recover` from end to end on a tiny pruned folder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvprune
from ggufs import write_gguf
from kvprune import errors
from kvprune.measure.memory import weight_bytes
from kvprune.measure.perplexity import perplexity
from kvprune.models.source import load_model, resolve
from kvprune.models.tokenizer import load_tokenizer
from kvprune.progress import Progress
from kvprune.recovery import alpaca, train
from kvprune.recovery.recover import merge
from kvprune.recovery.settings import PRESETS, Settings
from kvprune.recovery.teacher import Room
from kvprune.recovery.train import learning_rate
from kvprune.recovery.trainee import Trainee, add_adapters
from kvprune.runtime.files import verify_files
from tiny import COARSE, tiny_model, tiny_tokenizer, words

IDS = torch.arange(3, 43).view(2, 20)


def weights(folder):
    return load_model(resolve(folder), "cpu").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options", [{"loss": "logits"}, {"loss": "logits+attention"}, {"text": "self", "tokens": 1024}]
)
def test_a_teacher_that_comes_block_by_block(pruned, texts, tmp_path, quick, options, monkeypatch):
    """The same weights as with the whole teacher in memory, whose blocks are never there together."""
    whole = kvprune.recover(pruned, tmp_path / "whole", **{**quick, "steps": 4} | options)
    seen = []

    def spied(lm, teacher, settings):
        seen.append(teacher)
        return Trainee(lm, teacher, settings)

    monkeypatch.setattr("kvprune.recovery.recover.Trainee", spied)
    result = kvprune.recover(pruned, tmp_path / "out", memory="1KiB", **{**quick, "steps": 4} | options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert result.record["recovered"]["curve"] == whole.record["recovered"]["curve"]
    assert result.record["perplexity"] == whole.record["perplexity"]
    assert all(p.is_meta for block in seen[0].model.layers for p in block.parameters())


def test_a_teacher_of_which_some_blocks_stay(pruned, texts, tmp_path, quick, monkeypatch):
    """As many as the memory that is left holds."""
    options = {**quick, "steps": 3, "loss": "logits"}
    kvprune.recover(pruned, tmp_path / "whole", **options)
    dense = load_model(resolve(json.loads((pruned / "kvprune.json").read_text())["source"]), "cpu")
    block, whole = weight_bytes(dense.model.layers[0]), weight_bytes(dense)
    outside, layers = whole - block * len(dense.model.layers), len(dense.model.layers)
    monkeypatch.setattr(Room, "left", lambda room: outside + block + int(1.5 * block))
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, line: said.append(line))
    kvprune.recover(pruned, tmp_path / "out", **options)
    assert f"the teacher's blocks stay on disk, but for 1 of {layers}: there is no room" in said[0]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_teacher_that_is_a_gguf_file(checkpoint, texts, tmp_path, quick):
    """Unpacked, and its blocks come from there: the same weights as with the whole of it in memory."""
    model = tiny_model("llama", groups=2, head_dim=32, layers=3, hidden=64)
    path = write_gguf(model, tmp_path / "t.gguf", kind="Q8_0")
    kvprune.prune(path, tmp_path / "pruned", tokenizer=tiny_tokenizer(), **{**COARSE, "ratio": 0.5})
    options = {**quick, "steps": 3, "loss": "logits"}
    kvprune.recover(tmp_path / "pruned", tmp_path / "whole", **options)
    result = kvprune.recover(tmp_path / "pruned", tmp_path / "out", memory="1KiB", **options)
    assert "unpack" in result.record["seconds"]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert not (tmp_path / "out" / ".dense").exists()


@pytest.mark.parametrize("loss", ["next-token", "logits", "logits+attention"])
def test_it_recovers_and_the_record_says_how(pruned, texts, tmp_path, quick, loss):
    out = tmp_path / "out"
    result = kvprune.recover(pruned, out, loss=loss, **{**quick, "steps": 16})
    old, record = kvprune.read_record(pruned), kvprune.read_record(out)
    assert record == result.record
    recovered = record["recovered"]
    assert (recovered["text"], recovered["steps"], recovered["loss"]) == ("wikitext2", 16, loss)
    assert recovered["tokens"] == 16 * 4 * 32
    assert [step for step, _ in recovered["curve"]] == list(range(1, 17))
    held_out = dict(recovered["held_out_curve"])
    assert list(held_out) == [0, 4, 8, 12, 16]
    assert held_out[recovered["best_step"]] == min(held_out.values()) < held_out[0] - 0.02
    (row,) = record["perplexity"]
    assert row["pruned"] < row["before"]
    if loss == "next-token":
        assert row["dense"] == 123.0  # of the same text, window and tokens in the old record
    else:
        dense = load_model(resolve(old["source"]), "cpu")
        ids = load_tokenizer(resolve(pruned))((texts / "wikitext2-test.txt").read_text())["input_ids"]
        assert row["dense"] == perplexity(dense, torch.tensor(ids[:512]).view(-1, 32)).value
    assert set(old) <= set(record)
    for name in ("source", "widths", "ratio", "kv_bytes_per_token", "parameters", "seed"):
        assert record[name] == old[name]
    assert {"peft", "accelerate"} <= set(record["versions"])
    assert (out / "plan.json").read_bytes() == (pruned / "plan.json").read_bytes()
    assert not (out / ".resume").exists()
    assert not (out / ".partial").exists()
    verify_files(out)


def test_layers_without_attention_and_without_block(checkpoint, texts, tmp_path, quick):
    """They have nothing that an adapter could stand beside, and are as they were."""
    options = {"calibration_tokens": 512, "repair_tokens": 4096, "eval_tokens": 512, "windows": (32,), "device": "cpu"}
    options |= {"calibration_window": 64, "ratio": 0.5, "align": 2, "min_width": 4}
    made = kvprune.prune(checkpoint, tmp_path / "pruned", depth=1, drop_blocks=1, **options)
    result = kvprune.recover(tmp_path / "pruned", tmp_path / "out", loss="logits+attention", **{**quick, "steps": 16})
    held_out = dict(result.record["recovered"]["held_out_curve"])
    assert min(held_out.values()) < held_out[0]
    assert result.record["dropped_blocks"] == made.record["dropped_blocks"]
    gone = [i for i, width in enumerate(made.record["widths"]) if not width]
    assert len(gone) == 2
    for layer in gone:
        old, new = (m.model.layers[layer].self_attn.state_dict() for m in (made.model, result.model))
        assert same(old, new)


def test_a_folder_that_was_trained_further(pruned, texts, tmp_path, quick):
    """What was there before is measured, not taken from the record."""
    folder = shutil.copytree(pruned, tmp_path / "trained")
    model = load_model(resolve(folder), "cpu")
    model.lm_head.weight.data *= 1.5
    model.save_pretrained(folder)
    record = kvprune.recover(folder, tmp_path / "out", loss="next-token", **quick).record
    ids = load_tokenizer(resolve(pruned))((texts / "wikitext2-test.txt").read_text())["input_ids"]
    expected = perplexity(model, torch.tensor(ids[:512]).view(-1, 32)).value
    assert record["perplexity"][0]["before"] == pytest.approx(expected, rel=1e-6)
    verify_files(tmp_path / "out")


def test_the_folder_loads_in_all_three_ways(pruned, texts, tmp_path, quick):
    result = kvprune.recover(pruned, tmp_path / "out", **quick)
    with torch.no_grad():
        expected = result.model(IDS).logits
        for model in (kvprune.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
            assert torch.equal(model.eval()(IDS).logits, expected)
    code = (
        "import sys, torch\nsys.modules['kvprune'] = None\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "torch.save(model(torch.arange(3, 43).view(2, 20)).logits.detach(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "logits"], check=True, capture_output=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)
    assert all(p.requires_grad for p in result.model.parameters())
    generated = result.model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_neither_logits_nor_dtype(pruned, dtype):
    settings = Settings(folder="x", rank=4)
    lm = load_model(resolve(pruned), "cpu", str(dtype).removeprefix("torch."))
    peft_model = add_adapters(lm, settings)
    adapter = {}
    for name, parameter in Trainee(lm, None, settings).named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            adapter[name] = torch.randn_like(parameter) * 0.05
    assert len(adapter) == 2 * 7 * 4
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(adapter["lm." + name])
        unmerged = lm(IDS).logits
        merged = merge(peft_model, lm, adapter)
        assert not any("lora" in name for name in merged.state_dict())
        assert {p.dtype for p in merged.parameters()} == {dtype}
        exact = dtype == torch.float32
        torch.testing.assert_close(merged(IDS).logits, unmerged, rtol=0, atol=1e-5 if exact else 0.1)
        assert not torch.allclose(unmerged, load_model(resolve(pruned), "cpu").to(dtype)(IDS).logits, atol=0.3)


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"lr": 0.0}])
def test_no_training_leaves_the_weights(pruned, texts, tmp_path, quick, nothing):
    kvprune.recover(pruned, tmp_path / "out", **{**quick, **nothing})
    assert same(weights(tmp_path / "out"), weights(pruned))


def test_the_same_settings_give_the_same_weights_and_a_seed_others(pruned, texts, quick):
    runs = [kvprune.recover(pruned, dropout=0.1, seed=seed, **quick).model.state_dict() for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("loss", ["next-token", "logits", "logits+attention"])
def test_pieces_of_a_batch_change_nothing(pruned, texts, quick, monkeypatch, loss):
    whole = kvprune.recover(pruned, **{**quick, "loss": loss})
    monkeypatch.setattr(train, "MICRO_TOKENS", 32)
    pieces = kvprune.recover(pruned, **{**quick, "loss": loss})
    curves = [torch.tensor(r.record["recovered"]["curve"]) for r in (whole, pieces)]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


def test_early_stop_keeps_the_best(pruned, texts, quick):
    """A learning rate that only does harm."""
    options = {**quick, "lr": 3.0, "warmup": 0, "steps": 40, "checkpoint_every": 2, "patience": 2}
    recovered = kvprune.recover(pruned, **options).record["recovered"]
    assert recovered["stopped_early"]
    losses = dict(recovered["held_out_curve"])
    best = recovered["best_step"]
    assert losses[best] == min(losses.values())
    assert list(losses)[-1] == best + 4 == recovered["steps"] < 40


def test_gradient_checkpointing_and_bfloat16(pruned, texts, tmp_path, quick):
    options = {**quick, "dtype": "bfloat16", "gradient_checkpointing": True, "loss": "logits+attention"}
    kvprune.recover(pruned, tmp_path / "out", **options)
    model = load_model(resolve(tmp_path / "out"), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert kvprune.read_record(tmp_path / "out")["dtype"] == "bfloat16"


def test_epochs_and_targets(pruned, texts, quick):
    options = {**quick, "steps": None, "epochs": 2, "tokens": 2048, "targets": ("k_proj",), "checkpoint_every": 100}
    result = kvprune.recover(pruned, **options)
    assert result.record["recovered"]["steps"] == 2 * (2048 - 512) // 32 // 4
    before, after = weights(pruned), result.model.state_dict()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"k_proj"}


def test_instruction_data(pruned, texts, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(alpaca, "WITHOUT_INPUT", "Q: {instruction} A: ")  # the tiny model's context is short
    path = tmp_path / "alpaca.jsonl"
    lines = words(1200).splitlines()
    path.write_text("\n".join(json.dumps({"instruction": line[:20], "output": line[20:]}) for line in lines))
    result = kvprune.recover(pruned, text=str(path), loss="logits+attention", **{**quick, "window": 64})
    assert result.record["perplexity"][0]["text"] == "wikitext2"  # a named text of the folder's record
    held_out = [loss for _, loss in result.record["recovered"]["held_out_curve"]]
    assert min(held_out) < held_out[0]


def test_a_text_file_is_judged_on_the_records_texts_or_on_its_end(pruned, texts, tmp_path, quick):
    text = texts / "ptb-valid.txt"
    result = kvprune.recover(pruned, tmp_path / "a", text=text, **quick)
    assert [row["text"] for row in result.record["perplexity"]] == ["wikitext2"]
    folder = tmp_path / "a"
    record = json.loads((folder / "kvprune.json").read_text())
    (folder / "kvprune.json").write_text(json.dumps({**record, "perplexity": []}))
    again = kvprune.recover(folder, text=text, loss="next-token", **quick).record
    assert [row["text"] for row in again["perplexity"]] == [f"{text} (its held-out end)"]
    assert again["perplexity"][0]["dense"] is None
    assert again["recovered"]["earlier"] == record["recovered"]


def test_a_preset_decides(pruned, texts, quick):
    assert PRESETS["kvpruner"]["rank"] == 8
    with pytest.raises(errors.BadOption, match="--rank"):
        kvprune.recover(pruned, preset="kvpruner", rank=4)
    with pytest.raises(errors.BadOption, match="--steps"):
        kvprune.recover(pruned, preset="kvpruner", steps=4)
    with pytest.raises(errors.BadOption, match="kvpruner"):
        kvprune.recover(pruned, preset="nosuch")
    given = {name: quick[name] for name in ("held_out", "eval_tokens", "eval_windows", "device")}
    result = kvprune.recover(pruned, preset="kvpruner", **given)
    settings = result.record["recovered"]["settings"]
    before, after = weights(pruned), result.model.state_dict()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    expected = {"rank": 8, "alpha": 16, "dropout": 0.05, "lr": 1e-4, "epochs": 2, "batch": 64, "window": 256}
    expected["loss"] = "next-token"
    assert {name: settings[name] for name in expected} == expected


def test_learning_rate():
    assert Settings(folder="x").loss == "logits"
    assert (Settings(folder="x").highest_lr, Settings(folder="x", loss="next-token").highest_lr) == (1e-3, 5e-4)
    assert Settings(folder="x").as_json()["lr"] == 1e-3
    assert [Settings(folder="x").for_cut(ratio).highest_lr for ratio in (0.25, 0.5)] == [5e-4, 1e-3]
    assert Settings(folder="x", lr=1e-2).for_cut(0.25).highest_lr == 1e-2
    assert Settings(folder="x", loss="next-token").for_cut(0.25).highest_lr == 5e-4
    settings = Settings(folder="x", lr=1.0, warmup=3, steps=11)
    rates = [learning_rate(step, 11, settings) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.5)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[11] == pytest.approx(0)


def test_importing_kvprune_imports_neither_peft_nor_accelerate():
    look = "print('peft' in sys.modules, 'accelerate' in sys.modules)"
    code = f"import sys, transformers; {look}; import kvprune; {look}"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n" * 2


def test_recovery_on_sampled_text(pruned, tmp_path, monkeypatch):
    """From the dense model; judged on its end where no named text is known."""
    record_file = pruned / "kvprune.json"
    monkeypatch.setattr("kvprune.recovery.recover.read_shown", lambda *_: without_texts(record_file))
    options = {"tokens": 2048, "window": 32, "steps": 2, "batch": 2, "held_out": 256, "eval_tokens": 256}
    result = kvprune.recover(pruned, tmp_path / "out", text="self", eval_windows=(32,), **options)
    assert [row["text"] for row in result.record["perplexity"]] == ["self (its held-out end)"]
    assert result.record["recovered"]["text"] == "self"


def without_texts(path):
    return {**json.loads(path.read_text()), "perplexity": []}
