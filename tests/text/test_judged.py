"""What a model is judged on, beside a name and a file: the same tokens, however they are given."""

import json

import pytest
import torch

import kvprune
from kvprune import errors
from kvprune.measure.perplexity import perplexity
from kvprune.text.judged import find_texts, judged_windows
from tiny import COARSE, tiny_tokenizer, words

DOCUMENTS = [words(300, seed) for seed in range(9)]
WHOLE = "\n\n".join(DOCUMENTS)


@pytest.fixture(scope="module")
def ids():
    return torch.tensor(tiny_tokenizer()(WHOLE)["input_ids"])


def test_every_kind_gives_the_file_that_says_the_same(checkpoint, tmp_path, ids):
    """And transformers' tokens in a plain loop give the figure."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "own.txt").write_text(WHOLE)
    column = datasets.Dataset.from_dict({"text": DOCUMENTS})["text"]
    given = [tmp_path / "own.txt", DOCUMENTS, ids, tuple(column)]
    found = kvprune.evaluate(checkpoint, texts=given, window_lengths=(64,), tokens=1000)
    rows = found["perplexity"]
    assert [row["text"].split(", sha256 ")[0] for row in rows] == [
        str(tmp_path / "own.txt"), "9 strings", f"{len(ids)} token ids",
    ]  # fmt: skip
    wanted = perplexity(kvprune.load(checkpoint), torch.stack([ids[64 * i : 64 * i + 64] for i in range(15)]))
    for row in rows:
        assert (row["values"], row["tokens"]) == ([wanted.value], 15 * 63)
    if isinstance(getattr(column, "column_name", None), str):
        (alone,) = find_texts(column)
        assert alone.name == "a column 'text'"
        assert alone.documents == tuple(DOCUMENTS)


def test_windows_that_were_given_are_cut_and_not_joined(ids):
    rows = ids[:960].view(20, 48)
    found = judged_windows(find_texts(rows), None, (20, 48, 128), None)
    assert [pages.shape for _, pages in found] == [(40, 20), (20, 48)]
    assert torch.equal(found[0][1], rows[:, :40].reshape(-1, 20))
    assert torch.equal(found[1][1], rows)


def test_a_column_and_conversations_by_their_names(checkpoint, texts, tmp_path, command, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    (tmp_path / "own.txt").write_text(WHOLE)
    name = f"hub:{tmp_path / 'data'}:test:text"
    small = ["--window", 64, "--tokens", 640, "--json"]
    code, out, err = command("eval", checkpoint, "--text", name, "--text", tmp_path / "own.txt", *small)
    assert code == 0, err
    by_name, by_file = json.loads(out)["perplexity"]
    assert by_name["text"] == name
    assert by_name["values"] == by_file["values"]
    code, _, err = command("eval", checkpoint, "--text", f"chat:{tmp_path / 'own.txt'}", *small)
    assert (code, err.count("\n")) == (2, 1)
    assert "neither a JSON list nor JSON lines" in err


def test_prune_judges_on_what_was_given(checkpoint, texts, tmp_path, ids):
    options = {**COARSE, "ratio": 0.5, "windows": (64,)}
    (tmp_path / "own.txt").write_text(WHOLE)
    wanted = kvprune.prune(checkpoint, eval=tmp_path / "own.txt", **options).record["perplexity"]
    found = kvprune.prune(checkpoint, eval=["ptb", DOCUMENTS, ids], **options).record["perplexity"]
    assert [row["text"].split(",")[0] for row in found] == ["ptb", "9 strings", f"{len(ids)} token ids"]
    for row in found[1:]:
        assert (row["dense"], row["pruned"]) == (wanted[0]["dense"], wanted[0]["pruned"])
    assert found[0]["dense"] != found[1]["dense"]
    for same in (ids, ids.int()):
        with pytest.raises(errors.BadOption, match="is the calibration text"):
            kvprune.prune(checkpoint, calibration=ids, eval=same, **options)


def test_names_tell_texts_apart():
    names = [text.known_as for text in find_texts([DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS])]
    assert len(names) == len(set(names)) == 2  # one given twice counts once
    assert names == [text.known_as for text in find_texts([DOCUMENTS, DOCUMENTS[::-1]])]  # and not by their order
    assert all(name.startswith("9 strings, sha256 ") for name in names)


MISTAKES = {
    "text as a string": (WHOLE, errors.BadOption, "is a string, which is a text's name or a file; give text itself as"),
    "a number": (3, errors.BadOption, "the evaluation text is a int"),
    "texts that are no names": (DOCUMENTS, errors.BadOption, "give text itself as a list of strings"),
    "conversations": ([{"messages": []}], errors.BadOption, "give it in a list, as one text of several"),
    "floats": (torch.rand(9000), errors.BadOption, "the evaluation text is a tensor of torch.float32"),
    "too few": ([["the cat"]], errors.TextTooShort, "the evaluation text 1 string has"),
    "no such text": ("nosuch", errors.UnknownText, "unknown text 'nosuch'"),
    "nothing in it": ([[]], errors.UnknownText, "the evaluation text is empty"),
    "sampled": ("self", errors.UnknownText, "is sampled from the model and is none to judge on"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_judged_on_says_so_in_one_line(checkpoint, texts, name):
    given, error, message = MISTAKES[name]
    with pytest.raises(error, match=message) as caught:
        kvprune.evaluate(checkpoint, texts=given, window_lengths=(64,))
    assert "\n" not in str(caught.value)
