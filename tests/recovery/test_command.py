"""`kvprune recover` as scripts see it, and every mistake a user can make: exit code 2, one line, nothing written."""

import json
import subprocess
import sys

import pytest

from tiny import words

QUICK = [
    "--steps",
    "4",
    "--window",
    "32",
    "--rank",
    "4",
    "--checkpoint-every",
    "2",
    "--held-out",
    "256",
    "--eval-tokens",
    "256",
    "--eval-window",
    "32",
]


def test_recover_and_show(command, pruned, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("kvprune.progress.LONG", 0)
    code, out, err = command("recover", pruned, "--out", tmp_path / "out", *QUICK, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record == json.loads((tmp_path / "out" / "kvprune.json").read_text())
    assert "tok/s" in err
    assert "before recovery" in command("show", tmp_path / "out")[1]


MISTAKES = {
    "too short": (["--text", "short.txt"], "too few"),
    "too few tokens": (["--tokens", "1000000"], "1000000"),
    "not text": (["--text", "binary.txt"], "UTF-8"),
    "no such text": (["--text", "nosuch"], "unknown text"),
    "empty": (["--text", "empty.txt"], "empty"),
    "a test split": (["--text", "texts/ptb-test.txt"], "test split"),
    "an Alpaca test split": (["--text", "alpaca_test.json"], "test split"),
    "broken JSON": (["--text", "broken.json"], "neither a JSON list"),
    "evaluated on what is trained on": (["--text", "long.txt", "--eval", "./long.txt"], "trained on"),
    "evaluated on a named text's valid split": (["--eval", "texts/wikitext2-valid.txt"], "trained on"),
    "zero bytes": (["--text", "zeros.txt"], "zero bytes"),
    "rank above the width": (["--rank", "25"], "--rank 25 is above the 24 channels of model.layers.1.self_attn"),
    "rank 0": (["--rank", "0"], "--rank"),
    "unknown loss": (["--loss", "nosuch"], "next-token, logits"),
    "unknown target": (["--targets", "nosuch"], "q_proj"),
    "unknown preset": (["--preset", "nosuch"], "kvpruner"),
    "preset and option": (["--preset", "kvpruner"], "--rank"),
    "steps and epochs": (["--epochs", "2"], "not both"),
    "no such teacher": (["--teacher", "/nosuch"], "--teacher"),
    "teacher for nothing": (["--loss", "next-token", "--teacher", "/nosuch"], "--teacher"),
    "negative lr": (["--lr", "-1"], "--lr"),
    "lr nan": (["--lr", "nan"], "--lr"),
    "dropout": (["--dropout", "1"], "--dropout"),
    "device": (["--device", "nosuch"], "nosuch"),
    "word": (["--steps", "many"], "--steps"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(command, pruned, texts, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text(words(200))
    (tmp_path / "long.txt").write_text(words(5000))
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "zeros.txt").write_bytes(b"some text\0" * 5000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "alpaca_test.json").write_text("[]")
    (tmp_path / "broken.json").write_text("[{")
    before = sorted(tmp_path.rglob("*"))
    refuses(command("recover", pruned, "--out", "out", *QUICK, *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before


def refuses(result, message):
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("kvprune:")]
    assert said == err.splitlines()[-1:]


def test_folders(command, pruned, checkpoint, texts, tmp_path):
    refuses(command("recover", checkpoint, "--out", tmp_path / "out", *QUICK), "is not a pruned folder")
    refuses(command("recover", "/nosuch", "--out", tmp_path / "out", *QUICK), "no folder")
    refuses(command("recover", pruned, "--out", pruned, *QUICK), "choose another --out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    refuses(command("recover", pruned, "--out", tmp_path / "full", *QUICK), "not empty")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]


def test_two_processes_train_as_one(command, pruned, texts, tmp_path, monkeypatch):
    """accelerate launch, DDP over gloo: the same curve up to rounding."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    two = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
    ]

    def launched(*arguments):
        result = subprocess.run(
            [*two, "kvprune.cli", *map(str, arguments)], capture_output=True, text=True, timeout=120
        )
        return result.returncode, result.stdout, result.stderr

    curves = []
    for name, run in (("one", command), ("two", launched)):
        code, out, err = run("recover", pruned, "--out", tmp_path / name, *QUICK, "--json")
        assert code == 0, err
        record = json.loads(out)
        curves.append(record["recovered"]["curve"] + record["recovered"]["held_out_curve"])
        assert record["recovered"]["processes"] == (1 if name == "one" else 2)
        assert (tmp_path / name / "config.json").exists()
    assert len(curves[0]) == 7
    for (step, loss), (other, value) in zip(*curves, strict=True):
        assert step == other
        assert loss == pytest.approx(value, rel=1e-4)
