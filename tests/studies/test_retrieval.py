"""Numbers hidden in a text: the samples in words, the answers against generate, and the study whole."""

import json

import pytest
import torch

import kvprune
from kvprune import errors
from kvprune.studies.retrieval import CITIES, TASKS, ask, sample_of
from tiny import VOCABULARY, tiny_model, tiny_tokenizer, words


class Letters:
    """A tokenizer of one id a letter."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}


def said(ids):
    return "".join(map(chr, ids.tolist()))


@pytest.mark.parametrize("number", range(8))
def test_one_number_is_said_once_and_moves_through_the_text(number):
    hay = torch.full((900,), ord("."))
    sample = sample_of(TASKS[0], hay, 800, number, 8, Letters(), 0)
    assert len(sample.context) + len(sample.question) + len(sample.answer) == 800
    question, answer = said(sample.question), said(sample.answer)
    assert said(sample.context).count(question + answer + ".") == 1
    assert int(answer) >= 10**4
    at = said(sample.context).index(question) / (800 - len(question) * 2 - len(answer) * 2)
    assert at == pytest.approx((number + 0.5) / 8, abs=0.05)
    others = {said(sample_of(TASKS[0], hay, 800, n, 8, Letters(), 0).answer) for n in range(8)}
    assert len(others) == 8


def test_many_numbers_are_those_of_all_cities():
    hay = torch.full((900,), ord("."))
    asked = set()
    for number in range(8):
        sample = sample_of(TASKS[1], hay, 800, number, 8, Letters(), 0)
        text = said(sample.context)
        assert all(text.count(f" The secret number of {city} is ") == 1 for city in CITIES)
        assert said(sample.question) + said(sample.answer) + "." in text
        asked.add(text.index(said(sample.question)) * 8 // len(text))
    assert asked == set(range(8))  # one at each eighth


@torch.no_grad()
def test_an_answer_is_what_generate_says():
    model = tiny_model("llama", positions=512)
    ids = torch.randint(3, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    for context in ids:
        question = context[:4]
        whole = torch.cat((context, question))[None]
        written = model.generate(whole, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, -3:]
        sample = type(sample_of(TASKS[0], torch.full((900,), 46), 800, 0, 1, Letters(), 0))(context, question, written)
        exact, loss = ask(model, sample, None, None)
        logits = model(torch.cat((whole[0], written))[None]).logits[0, -4:-1].log_softmax(-1)
        assert exact
        assert loss == pytest.approx(-logits[range(3), written].mean().item(), abs=1e-4)
        wrong = written.clone()
        wrong[1] = (wrong[1] + 1) % VOCABULARY
        assert not ask(model, type(sample)(context, question, wrong), None, None)[0]


@pytest.fixture
def longer(tmp_path):
    """A tiny checkpoint that takes 1,024 tokens."""
    tiny_model("llama", groups=2, positions=1024).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(words(3000, 0))
    return tmp_path / "model", tmp_path / "text.txt"


def test_the_study_and_its_command(longer, tmp_path, command):
    model, text = longer
    given = {"text": text, "contexts": (800,), "keeps": (1.0, 0.5), "samples": 2}
    report = kvprune.study_retrieval(model, tmp_path / "out", against=model, **given)
    rows = report["rows"]
    assert len(rows) == 2 * 2 * 2
    assert [r["loss"] for r in rows if r["source"] == 0] == [r["loss"] for r in rows if r["source"] == 1]
    losses = [r["loss"] for r in rows if r["keep"] == 1.0], [r["loss"] for r in rows if r["keep"] == 0.5]
    assert losses[0] != losses[1]
    assert json.loads((tmp_path / "out" / "study.json").read_text())["rows"] == rows
    assert (tmp_path / "out" / "study.png").read_bytes()[1:4] == b"PNG"
    options = ("--text", text, "--context", 800, "--keep", 1, "--keep", 0.5, "--samples", 2)
    code, shown, _ = command("study", "retrieval", model, "--out", tmp_path / "again", *options)
    assert code == 0
    assert "50% kept" in shown
    assert json.loads((tmp_path / "again" / "study.json").read_text())["rows"] == rows[:4]


def test_what_cannot_be_asked(longer, tmp_path):
    model, text = longer
    for given, message in (
        ({"contexts": (1100,)}, "more than the 1024 tokens"),
        ({"contexts": (20,)}, "no room"),
        ({"samples": 0}, "at least one sample"),
        ({"keeps": (0.0,)}, "above 0 and at most 1"),
    ):
        with pytest.raises(errors.BadOption, match=message):
            kvprune.study_retrieval(model, tmp_path / "out", **{"text": text, "contexts": (800,), **given})
        assert not (tmp_path / "out").exists()
