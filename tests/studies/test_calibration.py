"""`kvprune study calibration` from end to end on a tiny checkpoint, interrupted, and given wrong input."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch

import kvprune
from kvprune import cli, errors
from kvprune.studies import calibration
from tiny import tiny_tokenizer, words

SMALL = {"eval_tokens": 128, "window": 32, "device": "cpu", "allocation": "uniform"}
GRID = {"texts": ("ptb", "self"), "tokens": (512, 256), "seeds": 2, "eval": ("wikitext2",), **SMALL}
QUICK = ["--eval-tokens", 128, "--window", 32, "--device", "cpu", "--text", "ptb", "--tokens", 256, "--seeds", 1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line's own `main`; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def without_seconds(report):
    cells = [{name: value for name, value in cell.items() if name != "seconds"} for cell in report["cells"]]
    return {**report, "cells": cells, "seconds": None}


def test_a_study(checkpoint, texts, tmp_path):
    out = tmp_path / "out"
    report = kvprune.study_calibration(checkpoint, out, **GRID)
    assert json.loads((out / "study.json").read_text()) == report
    assert sorted(path.name for path in out.iterdir()) == ["study.json", "study.jsonl", "study.png"]
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (out / "study.jsonl").read_text().splitlines()]
    assert all(line.pop("crc32") for line in lines)
    assert lines[1:] == report["cells"]
    assert [(cell["text"], cell["tokens"], cell["seed"]) for cell in report["cells"]] == [
        (text, tokens, seed) for text in ("ptb", "self") for tokens in (256, 512) for seed in (0, 1)
    ]
    for cell in report["cells"]:
        assert (cell["merge"], sum(cell["widths"])) == (2, 4 * 64 / 2)
    assert len(report["summary"]) == 4
    assert all(row["overlap"] == 0 for row in report["summary"])
    assert report["dense"] == {"wikitext2": report["cells"][0]["perplexity"][0]["dense"]}

    def direct(text, tokens, seed):
        size = {"calibration_tokens": tokens, "repair_tokens": tokens, "windows": (32,), "eval_tokens": 128}
        return kvprune.prune(
            checkpoint, calibration=text, seed=seed, eval=("wikitext2",), device="cpu", allocation="uniform", **size
        ).record["perplexity"]

    for cell in report["cells"]:
        if cell["seed"] == 0 or cell["text"] == "self":
            assert cell["perplexity"] == direct(cell["text"], cell["tokens"], cell["seed"])
        else:
            text = (texts / "ptb-valid.txt").read_text()
            assert cell["first_character"] == pytest.approx(len(text) // 2, abs=10)
            (tmp_path / "rest.txt").write_text(text[cell["first_character"] :])
            assert cell["perplexity"] == direct(tmp_path / "rest.txt", cell["tokens"], 0)
    values = [cell["perplexity"][0]["pruned"] for cell in report["cells"]]
    assert len(set(values)) == len(values)


CHATS = [
    [{"role": "user", "content": words(30, seed)}, {"role": "assistant", "content": words(60, seed + 1000)}]
    for seed in range(20)
]
DOCUMENTS = [words(120, seed) for seed in range(15)]
IDS = torch.randint(3, 300, (1500,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def chatting(checkpoint, tmp_path):
    """The checkpoint, and its tokenizer with a chat template."""
    folder = shutil.copytree(checkpoint, tmp_path / "chatting")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_texts_of_every_kind(chatting, texts, tmp_path):
    """Each cell is what prune makes of the same text without what stands before the stretch, cut off here."""
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    given = [DOCUMENTS, CHATS, f"chat:{file}", IDS, IDS.view(-1, 50)]
    options = {"repair": "rotate", "tokens": (250,), "seeds": 2, **SMALL}
    report = kvprune.study_calibration(chatting, tmp_path / "out", texts=given, eval=[DOCUMENTS[:9], "ptb"], **options)
    names = [name.split(", sha256 ")[0] for name in report["texts"]]
    assert names == ["15 strings", "20 conversations", f"chat:{file}", "1500 token ids", "30 windows of 50 token ids"]
    assert [row["overlap"] for row in report["summary"]] == [0] * 10
    judged = report["eval"]
    assert [name.split(", sha256 ")[0] for name in judged] == ["9 strings", "ptb"]
    whole = "\n\n".join(DOCUMENTS)
    rest = (  # behind the first piece of a stretch
        lambda first: [whole[first:]],
        lambda first: CHATS[first:],
        lambda first: CHATS[first:],
        lambda first: IDS[first:],
        lambda first: IDS.view(-1, 50)[first:],
    )
    size = {"calibration_tokens": 250, "repair_tokens": 250, "windows": (32,), "eval_tokens": 128}
    more = {"repair": "rotate", "device": "cpu", "allocation": "uniform", "eval": [DOCUMENTS[:9], "ptb"]}
    found = []
    for number, cell in enumerate(report["cells"]):
        text, seed = number // 2, number % 2
        assert (cell["text"], cell["seed"]) == (report["texts"][text], seed)
        assert cell["unit"] == ("character", "conversation", "conversation", "token", "window")[text]
        parts = (len(whole), 20, 20, 1500, 30)[text]
        assert cell["first"] == pytest.approx(seed * parts // 2, abs=10 if text == 0 else 0)
        assert cell["first_character"] == (cell["first"] if text == 0 else None)
        pruned = kvprune.prune(chatting, calibration=rest[text](cell["first"]), **size, **more)
        assert cell["perplexity"] == pruned.record["perplexity"]
        found.append(cell["perplexity"][0]["pruned"])
    assert found[2:4] == found[4:6]  # the same conversations
    assert len(set(found)) == 8
    again = kvprune.study_calibration(
        chatting, tmp_path / "out", texts=(one for one in given), eval=[DOCUMENTS[:9], "ptb"], resume=True, **options
    )
    assert again == report
    with pytest.raises(errors.OutputExists, match="texts"):
        kvprune.study_calibration(
            chatting, tmp_path / "out", texts=[DOCUMENTS[1:], *given[1:]], eval=["ptb"], resume=True, **options
        )


WRONG = {
    "conversations, no template": ({"texts": [CHATS]}, "has no chat template"),
    "a whole conversation": ({"texts": [{"messages": CHATS[0]}]}, "the calibration text is a list of conversations"),
    "numbers": ({"texts": [[1, 2]]}, "row 1 of the calibration text is a int"),
    "floats": ({"texts": torch.zeros(3)}, "the calibration text is a tensor of torch.float32"),
    "an id too high": ({"texts": torch.full((900,), 300)}, "has the token id 300, but the model's embedding has 300"),
    "few ids": ({"texts": IDS[:200]}, "200 token ids, sha256 .* has 200 tokens, but 256 are needed"),
    "long windows": ({"texts": IDS.view(-1, 300)}, "the model takes windows of 128 tokens"),
    "one window alone": ({"texts": IDS[:1300].view(-1, 130)[:, :128], "tokens": (255,)}, "give at least 256"),
    "less than a window": ({"texts": IDS.view(-1, 100), "tokens": (99,), "repair": "rotate"}, "give at least 100"),
    "nothing to judge on": ({"texts": [DOCUMENTS], "eval": ()}, "give one to judge on with --eval"),
    "judged on the same strings": ({"texts": [DOCUMENTS], "eval": [DOCUMENTS]}, "is calibrated on; judge on another"),
    "judged on the file of them": ({"texts": [DOCUMENTS], "eval": "same.txt"}, "is calibrated on; judge on another"),
    "judged on the same ids": ({"texts": IDS, "eval": [IDS.clone()]}, "is calibrated on; judge on another"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_kinds_that_are_refused(checkpoint, texts, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same.txt").write_text("\n\n".join(DOCUMENTS))
    with pytest.raises(errors.KVPruneError, match=message) as caught:
        kvprune.study_calibration(
            checkpoint, tmp_path / "out", **{"eval": ("ptb",), "tokens": (256,), "seeds": 1, **SMALL, **options}
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_and_conversations(command, chatting, texts, tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    given = ["--text", f"chat:{tmp_path / 'chats.jsonl'}", "--seeds", 1, "--eval", "ptb", *SMALL_OPTIONS]
    code, out, err = command("study", "calibration", chatting, "--out", tmp_path / "a", *given)
    assert code == 0, err
    assert "chats.jsonl" in out
    assert (tmp_path / "a" / "study.png").stat().st_size > 0


def test_kill_and_resume(checkpoint, texts, tmp_path, monkeypatch):
    ran = []

    def counting(*args, **kwargs):
        if len(ran) == 3:
            raise RuntimeError("killed")
        result = kvprune.prune(*args, **kwargs)
        ran.append((kwargs["calibration_tokens"], kwargs["seed"]))
        return result

    out = tmp_path / "out"
    monkeypatch.setattr(calibration, "prune", counting)
    with pytest.raises(RuntimeError, match="killed"):
        kvprune.study_calibration(checkpoint, out, **GRID)
    lines = (out / "study.jsonl").read_text()
    assert lines.count("\n") == 1 + 3
    (out / "study.jsonl").write_text(lines + lines.splitlines()[-1][:40])  # cut short while it was written

    with pytest.raises(errors.OutputExists, match="--resume"):
        kvprune.study_calibration(checkpoint, out, **GRID)
    for other in ({"seeds": 3}, {"ratio": 0.25}, {"eval": ("ptb",)}, {"tokens": (256,)}, {"window": 64}):
        with pytest.raises(errors.OutputExists, match=next(iter(other))) as caught:
            kvprune.study_calibration(checkpoint, out, resume=True, **{**GRID, **other})
        assert "\n" not in str(caught.value)
    assert len(ran) == 3

    ran.clear()
    monkeypatch.setattr(calibration, "prune", lambda *a, **k: ran.append(0) or kvprune.prune(*a, **k))
    resumed = kvprune.study_calibration(checkpoint, out, resume=True, **GRID)
    assert len(ran) == 8 - 3
    assert (out / "study.jsonl").read_text().startswith(lines)
    assert kvprune.study_calibration(checkpoint, out, resume=True, **GRID) == resumed
    assert len(ran) == 8 - 3
    with pytest.raises(errors.OutputExists, match="finished"):
        kvprune.study_calibration(checkpoint, out, **GRID)
    whole = kvprune.study_calibration(checkpoint, tmp_path / "whole", **GRID)
    assert without_seconds(whole) == without_seconds(resumed)


def test_other_text_is_not_resumed(checkpoint, texts, tmp_path, monkeypatch):
    grid = {**GRID, "texts": ("ptb",), "tokens": (256,), "seeds": 1}
    kvprune.study_calibration(checkpoint, tmp_path / "out", **grid)
    (texts / "ptb-valid.txt").write_text((texts / "wikitext2-valid.txt").read_text())
    with pytest.raises(errors.OutputExists, match="calibration_sha256"):
        kvprune.study_calibration(checkpoint, tmp_path / "out", resume=True, **grid)


def test_a_mistake_in_the_first_cell_leaves_nothing(checkpoint, texts, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise errors.NotFinite("not finite")

    monkeypatch.setattr(calibration, "prune", broken)
    with pytest.raises(errors.NotFinite):
        kvprune.study_calibration(checkpoint, tmp_path / "out", **GRID)
    assert not (tmp_path / "out").exists()


def test_the_command_and_a_short_text(command, checkpoint, texts, tmp_path):
    text = " ".join((texts / "ptb-valid.txt").read_text().split()[:200])
    (tmp_path / "short.txt").write_text(text)
    given = ["--text", tmp_path / "short.txt", "--seeds", 2, "--eval", "ptb", *SMALL_OPTIONS]
    code, out, err = command("study", "calibration", checkpoint, "--out", tmp_path / "a", *given, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "a" / "study.json").read_text())
    assert "stretches overlap" in " ".join(err.split())
    assert 0 < report["summary"][0]["overlap"] < 1
    shown = command("study", "calibration", checkpoint, "--out", tmp_path / "a", *given, "--resume")[1]
    assert "short.txt *" in shown
    for part in ("stdev", "by seed", "they overlap", "perplexity on ptb"):
        assert part in shown


SMALL_OPTIONS = ["--tokens", 256, "--eval-tokens", 128, "--window", 32, "--device", "cpu", "--allocation", "uniform"]

MISTAKES = {
    "unknown text": (["--text", "nosuch"], "unknown text 'nosuch'"),
    "unknown eval": (["--eval", "nosuch"], "unknown text 'nosuch'"),
    "self to judge on": (["--eval", "self"], "none to judge on"),
    "no seeds": (["--seeds", "0"], "--seeds 0"),
    "too few tokens": (["--tokens", "1"], "--tokens 1"),
    "too few for refit": (["--tokens", "255"], "give at least 256"),
    "too short": (["--tokens", "1000000"], "the calibration text ptb has"),
    "eval too short": (["--eval-tokens", "1000000"], "the evaluation text ptb has"),
    "a test split": (["--text", "texts/ptb-test.txt"], "test split"),
    "judged on what is read": (["--text", "texts/ptb-valid.txt", "--eval", "./texts/ptb-valid.txt"], "calibrated on"),
    "judged on a valid split": (["--eval", "texts/ptb-valid.txt"], "calibrated on"),
    "ratio": (["--ratio", "0.9"], "0 to 0.75"),  # 16 of the 64 channels of two heads in one
    "ratio of heads apart": (["--ratio", "0.6", "--merge", "1"], "0 to 0.5"),  # 16 of 32
    "merge": (["--merge", "3"], "choose auto, 1, 2"),
    "no ratio": (["--ratio", "0"], "above 0"),
    "a ratio between": (["--ratio", "0.27"], "cannot be met"),
    "nan": (["--ratio", "nan"], "--ratio nan"),
    "repair": (["--repair", "magic"], "unknown repair"),
    "allocation": (["--allocation", "magic"], "unknown allocation"),
    "importance": (["--importance", "magic"], "unknown importance"),
    "preset and option": (["--preset", "kvpruner", "--repair", "none"], "--repair"),
    "unknown preset": (["--preset", "nosuch"], "kvpruner"),
    "window": (["--window", "1"], "window"),
    "device": (["--device", "nosuch"], "nosuch"),
    "dtype": (["--dtype", "int3"], "int3"),
    "word": (["--tokens", "many"], "--tokens"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(command, checkpoint, texts, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    refuses(command("study", "calibration", checkpoint, "--out", "out", *QUICK, *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before


def refuses(result, message):
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert message in " ".join(err.split())
    assert [line for line in err.splitlines() if line.startswith("kvprune:")] == err.splitlines()
    assert len(err.splitlines()) == 1


def test_folders_and_sources(command, checkpoint, texts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    for extra in ([], ["--resume"]):
        refuses(command("study", "calibration", checkpoint, "--out", tmp_path / "full", *QUICK, *extra), "not empty")
    refuses(command("study", "calibration", checkpoint, "--out", tmp_path / "full" / "precious", *QUICK), "is a file")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    refuses(command("study"), "Missing command")
    refuses(command("study", "calibration", "/nosuch", "--out", tmp_path / "out", *QUICK), "no folder")
    only_self = ["--text", "self", "--device", "cpu"]
    refuses(command("study", "calibration", checkpoint, "--out", tmp_path / "out", *only_self), "--eval")
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_missed_before_any_work(command, checkpoint, texts, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    refuses(command("study", "calibration", checkpoint, "--out", tmp_path / "out", *QUICK), "pip install matplotlib")
    assert not (tmp_path / "out").exists()
