"""The command line as scripts see it: exit codes, one JSON object on stdout, one line on stderr."""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest

from tiny import tiny_model, tiny_tokenizer

SMALL = ["--calibration-tokens", "512", "--repair-tokens", "4096", "--eval-tokens", "512"]
QUICK = [*SMALL, "--window", "64", "--align", "2", "--min-width", "4"]


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(command):
    """What `command` returns, as from a process."""
    return lambda *arguments: Result(*command(*arguments))


def test_prune_show_eval_generate(run, checkpoint, texts, tmp_path):
    out = tmp_path / "out"
    words = ["prune", checkpoint, "--out", out, "--ratio", "0.5", "--allocation", "budget", "--json", *QUICK]
    code = "from kvprune import cli, progress; progress.LONG = 0; cli.main()"
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record == json.loads((out / "kvprune.json").read_text())
    assert "sensitivity: done in" in result.stderr  # each phase is told of

    shown = run("show", out, "--json")
    assert json.loads(shown.stdout) == record
    table = run("show", out).stdout
    assert "is written" not in table
    for part in ("KV bytes per token", "parameters", "perplexity", "layer 3", "sensitivity", "peak memory"):
        assert part in table

    evaluated = run("eval", checkpoint, "--against", out, "--text", "ptb", "--window", 32, "--tokens", 256, "--json")
    (row,) = json.loads(evaluated.stdout)["perplexity"]
    assert (row["text"], row["window"], row["tokens"], len(row["values"])) == ("ptb", 32, 248, 2)
    assert "KV bytes" in run("eval", out, "--text", "ptb", "--window", 32, "--tokens", 256).stdout

    generated = json.loads(run("generate", out, "the cat", "--max-new-tokens", 5, "--json").stdout)
    assert 0 < generated["new_tokens"] <= 5
    assert generated["cache_bytes"] == generated["cache_tokens"] * record["kv_bytes_per_token"]["pruned"]
    assert run("generate", out, "the cat", "--max-new-tokens", 5).stdout.startswith("the cat")
    skipping = ("generate", out, "the cat sat " * 12, "--max-new-tokens", 20, "--skip", 0.25)
    report = json.loads(run(*skipping, "--json").stdout)["filter"]
    assert report["ratio_asked"] == 0.25
    assert 0 < report["kv_bytes"] < report["kv_bytes_dense"] / 2
    assert "skipped" in run(*skipping).stderr
    refused = run(*skipping[:-1], 0.9)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "at most" in refused.stderr
    refused = run("generate", out, "the cat", "--skip-preset", "paper")
    assert refused.returncode == 2
    assert "needs --skip" in refused.stderr
    study = ("study", "layers", out, "--text", "ptb", "--tokens", 128, "--window", 64)
    order = json.loads(run(*study, "--json").stdout)["layers"]
    assert sorted(order) == [0, 1, 2, 3]
    chosen = ",".join(map(str, order))
    assert f"--skip-layers {chosen}" in run(*study).stdout
    rates = json.loads(run(*skipping, "--skip-layers", chosen, "--json").stdout)["filter"]["per_layer"]
    assert {layer for layer, rate in enumerate(rates) if rate} == set(order[:2])
    for wrong, says in (("a,b", "numbers"), ("4", "no 4")):
        refused = run(*skipping, "--skip-layers", wrong)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert says in refused.stderr
    refused = run(*study[:-1], 16)
    assert refused.returncode == 2
    assert "too short" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "2"], "0 to 0.9375"),
        (["--calibration", "nosuch"], "unknown text"),
        (["--preset", "kvpruner", "--importance", "l1"], "--importance"),
        (["--device", "nosuch"], "nosuch"),
        (["--ratio", "half"], "--ratio"),
        (["--nosuch"], "--nosuch"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(run, checkpoint, texts, tmp_path, arguments, message):
    result = run("prune", checkpoint, "--out", tmp_path / "out", *QUICK, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("kvprune:")]
    assert said == result.stderr.splitlines()[-1:]
    assert not (tmp_path / "out").exists()


def test_our_faults_exit_with_1_and_a_traceback(checkpoint):
    code = "import sys, kvprune; from kvprune import cli\ndef broken(*a, **k): raise KeyError('ours')\n"
    code += f"kvprune.generate = broken; sys.argv = ['kvprune', 'generate', '{checkpoint}', 'x']; cli.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_ctrl_c_is_no_success(checkpoint):
    code = "import sys, kvprune; from kvprune import cli\ndef stop(*a, **k): raise KeyboardInterrupt\n"
    code += f"kvprune.generate = stop; sys.argv = ['kvprune', 'generate', '{checkpoint}', 'x']; cli.main()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 130


def test_no_verb_shows_the_help(run):
    assert "prune" in run().stdout
    assert "--ratio" in run("prune", "--help").stdout


def test_the_help_shows_defaults_and_the_verbs_in_order(run):
    """What stands in brackets is no markup."""
    words = " ".join(run("prune", "--help").stdout.replace("│", " ").split())
    assert "fraction of the KV bytes to remove [default: 0.5]" in words
    assert "variance, energy, taylor, l1 or l2 [default: variance]" in words
    verbs = [line.split()[1] for line in run().stdout.splitlines() if line.startswith("│ ") and line[2] != " "]
    assert verbs[2:] == [
        *("prune", "recover", "generate", "show", "refresh", "report"),
        *("eval", "bench", "fit", "doctor", "export", "push", "study"),
    ]


def test_a_text_too_short_for_keep_says_so(run, tmp_path):
    tiny_model("llama", positions=300).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = run("generate", tmp_path, "the cat", "--keep", "0.5", "--max-new-tokens", "5")
    assert found.returncode == 0
    assert "(--keep left out none of so short a text: the first tokens are decided on behind 128)" in found.stderr


def test_the_version(run):
    found = run("--version")
    assert found.returncode == 0
    assert found.stdout.startswith("kvprune ")
    assert "transformers" in found.stdout


PLAUSIBLE = {
    "percents": (("prune", "dense", "--out", "out", "--ratio", "50"), "50 % is --ratio 0.5"),
    "no number": (("prune", "dense", "--out", "out", "--ratio", "half"), "prune --help"),
    "no unit": (("fit", "dense", "--memory", "8", "--context", "64"), "8 is so many bytes; say its unit, as 8GiB"),
    "no file": (("prune", "dense", "--out", "out", "--calibration", "own.txt"), "there is no file own.txt; give one"),
    "no folder": (("show", "nosuch"), "there is no folder nosuch"),
    "no such verb": (("squeeze", "dense"), "No such command 'squeeze'. See:"),
}


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_plausible_mistakes_are_mended_in_the_message(run, checkpoint, texts, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").symlink_to(checkpoint)
    words, message = PLAUSIBLE[name]
    found = run(*words)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


def test_importing_is_light():
    """No model code is loaded before it is needed; the time itself is measured in benchmarks."""
    code = "import sys, kvprune; print('kvprune.runtime.modeling' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
