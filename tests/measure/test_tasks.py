"""Tasks against a plain loop over Hugging Face's own logits, and against lm-eval's own config."""

import json
import math
from functools import partial
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml

import kvprune
from kvprune.errors import BadOption, TokenizerMismatch
from kvprune.measure.tasks import PIQA, _checked_ids, load_tasks, run_tasks
from tiny import Counted, words

ROWS = 12


@pytest.fixture
def piqa(tmp_path, monkeypatch):
    """$KVPRUNE_DATA with a PIQA of random words: [(question, two answers, which is right)]."""
    found = []
    for i in range(ROWS):
        goal, first, second = (words(n, seed=100 * i + n) for n in (8, 3, 5))
        found.append((goal, (first, second), i % 2))
    rows = [json.dumps({"goal": goal, "sol1": one, "sol2": two}) for goal, (one, two), _ in found]
    (tmp_path / "piqa-valid.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "piqa-valid-labels.lst").write_text("\n".join(str(label) for *_, label in found) + "\n")
    monkeypatch.setenv("KVPRUNE_DATA", str(tmp_path))
    return found


@torch.no_grad()
def log_probability(model, tokenizer, prompt: str, answer: str) -> float:
    """Of the answer's tokens behind the prompt, one at a time."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    scores = model(ids).logits[0].log_softmax(-1)
    return sum(scores[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


def test_piqa_against_a_plain_loop(checkpoint, piqa, capsys):
    """With a pad token that the model has no embedding for, and does not need."""
    model, tokenizer = kvprune.load(checkpoint, dtype="float32"), kvprune.load_tokenizer(checkpoint)
    tokenizer.add_special_tokens({"pad_token": "<new-pad>"})
    hits = {"acc": 0, "acc_norm": 0}
    for goal, answers, label in piqa:
        scores = [log_probability(model, tokenizer, f"Question: {goal}\nAnswer:", a) for a in answers]
        hits["acc"] += (scores[1] > scores[0]) == label
        hits["acc_norm"] += (scores[1] / len(answers[1]) > scores[0] / len(answers[0])) == label
    assert 0 < hits["acc"] < ROWS
    assert hits["acc"] != hits["acc_norm"]
    progress = Counted()
    rows = run_tasks(model, tokenizer, load_tasks(["piqa"]), phase=partial(progress.phase, "piqa"))
    assert progress.phases == [["piqa", 2 * ROWS, 2 * ROWS]]  # in place of lm-eval's bars
    assert "%|" not in capsys.readouterr().err
    assert [row["metric"] for row in rows] == ["acc", "acc_norm"]
    for row in rows:
        share = hits[row["metric"]] / ROWS
        assert (row["task"], row["samples"], row["value"]) == ("piqa", ROWS, pytest.approx(share))
        assert row["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (ROWS - 1)))


def test_piqa_is_asked_as_lm_eval_asks_it():
    theirs = yaml.safe_load((Path(lm_eval.__path__[0]) / "tasks" / "piqa" / "piqa.yaml").read_text())
    assert {key: theirs[key] for key in PIQA} == PIQA


def test_eval_puts_tasks_of_both_models_into_one_table(command, checkpoint, piqa, monkeypatch):
    asked = ["eval", str(checkpoint), "--against", str(checkpoint), "--tasks", "piqa", "--task-limit", "4"]
    code, out, _ = command(*asked, "--json")
    assert code == 0
    result = json.loads(out)  # and nothing of lm-eval's is among it
    assert result["perplexity"] == []
    assert [(row["task"], row["metric"], row["samples"]) for row in result["tasks"]] == [
        ("piqa", "acc", 4),
        ("piqa", "acc_norm", 4),
    ]
    for row in result["tasks"]:
        assert row["values"][0] == row["values"][1]
        assert row["stderr"][0] > 0
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, _ = command(*asked)
    assert code == 0
    assert "piqa, acc_norm, 4 samples" in shown
    assert "±" in shown


def test_a_task_file_with_local_data(checkpoint, piqa, tmp_path):
    rows = [json.dumps({"q": goal, "a": list(answers), "right": label}) for goal, answers, label in piqa]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    config = {
        **PIQA,
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "own.jsonl")},
    }
    config |= {"validation_split": "train", "doc_to_text": "Question: {{q}}\nAnswer:", "doc_to_target": "right"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**config, "doc_to_choice": "{{a}}"}))
    model, tokenizer = kvprune.load(checkpoint, dtype="float32"), kvprune.load_tokenizer(checkpoint)
    own, known = (run_tasks(model, tokenizer, load_tasks([name])) for name in (str(tmp_path / "own.yaml"), "piqa"))
    assert [row["value"] for row in own] == [row["value"] for row in known]


def test_other_metrics_are_reported_and_stdout_is_ours(checkpoint, piqa, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kvprune.measure.tasks.RESAMPLES", 100)
    rows = [json.dumps({"goal": g, "sol1": a, "sol2": b, "label": label}) for g, (a, b), label in piqa]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    own = {**PIQA, "task": "own", "dataset_path": "json", "validation_split": "train"}
    own |= {"dataset_kwargs": {"data_files": str(tmp_path / "own.jsonl")}, "metric_list": [{"metric": "mcc"}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    model, tokenizer = kvprune.load(checkpoint, dtype="float32"), kvprune.load_tokenizer(checkpoint)
    (row,) = run_tasks(model, tokenizer, load_tasks([str(tmp_path / "own.yaml")]))
    assert (row["task"], row["metric"], row["samples"]) == ("own", "mcc", ROWS)
    assert -1 <= row["value"] <= 1
    assert capsys.readouterr().out == ""


def test_too_little_memory_for_one_models_tasks_leaves_the_rest(command, checkpoint, tmp_path, monkeypatch):
    row = {"task": "t", "metric": "acc", "samples": 9, "value": 0.5, "stderr": 0.25}
    answers = [[row], RuntimeError("DefaultCPUAllocator: can't allocate memory")] * 2

    def run(*args):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("kvprune.measure.evaluate.load_tasks", lambda names: names)
    monkeypatch.setattr("kvprune.measure.evaluate.run_tasks", run)
    (tmp_path / "text.txt").write_text(words(600, seed=0))
    found = kvprune.evaluate(checkpoint, checkpoint, tasks="t", texts=[str(tmp_path / "text.txt")], tokens=512)
    assert found["tasks"] == [
        {"task": "t", "metric": "acc", "samples": 9, "values": [0.5, None], "stderr": [0.25, None]}
    ]
    assert found["errors"] == [f"{checkpoint}, t: out of memory"]
    assert None not in found["perplexity"][0]["values"]
    asked = ["eval", checkpoint, "--against", checkpoint, "--tasks", "t"]
    code, shown, _ = command(*asked)
    assert code == 0
    assert "│ 0.5000 ± 0.2500 │ - │" in " ".join(shown.split())
    assert "out of memory" in shown


def test_what_cannot_be_run(checkpoint, piqa, tmp_path, monkeypatch):
    with pytest.raises(BadOption, match="unknown task 'none'"):
        kvprune.evaluate(checkpoint, tasks="none")
    with pytest.raises(BadOption, match="--task-limit"):
        kvprune.evaluate(checkpoint, tasks="piqa", task_limit=1)
    with pytest.raises(BadOption, match="without a cache"):
        kvprune.evaluate(checkpoint, tasks="piqa", kv_bits=8)
    good = (tmp_path / "piqa-valid.jsonl").read_text()
    for rows, labels in (
        (good, "0\n1\n"),
        (good, "2\n" * ROWS),
        ("[1]\n" * ROWS, "1\n" * ROWS),
        ('{"a": 1}\n' * ROWS, "1\n" * ROWS),
    ):
        (tmp_path / "piqa-valid.jsonl").write_text(rows)
        (tmp_path / "piqa-valid-labels.lst").write_text(labels)
        with pytest.raises(BadOption, match="PIQA's questions and answers"):
            load_tasks(["piqa"])
    with pytest.raises(BadOption, match="did not load"):
        load_tasks(["boolq"])  # the hub is off in the tests


def test_tokens_that_the_model_has_not_are_named(checkpoint):
    model = kvprune.load(checkpoint, dtype="float32")
    with _checked_ids(model, "a text"):
        model(torch.tensor([[5, 299]]))
        with pytest.raises(TokenizerMismatch, match=r"a text has the token id 300, .* 300 rows"):
            model(torch.tensor([[5, 300]]))
    with pytest.raises(IndexError):  # outside, the model is as it was
        model(torch.tensor([[5, 300]]))
