"""Text: where names lead, and windows of exactly the asked tokens."""

import sys
import types

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvprune import errors
from kvprune.text.corpus import read_text
from kvprune.text.windows import _sure_ids, start_token, token_ids, windows
from tiny import WORDS, tiny_tokenizer, words

TOKENIZER = tiny_tokenizer()
TEXT = words(3000)
WHOLE = TOKENIZER(TEXT)["input_ids"]


def test_names_are_files_in_the_data_folder(texts):
    assert read_text("ptb", "test") == (texts / "ptb-test.txt").read_text()
    assert read_text("ptb", "valid") == (texts / "ptb-valid.txt").read_text()
    assert read_text(str(texts / "ptb-test.txt"), "test") == (texts / "ptb-test.txt").read_text()


@pytest.mark.parametrize(("name", "split", "rows"), [("wikitext2", "validation", "text"), ("ptb", "test", "sentence")])
def test_names_come_from_the_hub_otherwise(monkeypatch, tmp_path, name, split, rows):
    monkeypatch.setenv("KVPRUNE_DATA", str(tmp_path))
    asked = {}

    def load_dataset(repository, configuration, revision, split):
        asked.update(repository=repository, split=split)
        return {rows: ["one\n", "two\n"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    text = read_text(name, "valid" if split == "validation" else "test")
    assert text.replace("\n", "") == "onetwo"
    assert asked["split"] == split
    assert "/" in asked["repository"]


def test_without_data_or_hub_the_message_says_both_ways(monkeypatch):
    monkeypatch.delenv("KVPRUNE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(errors.UnknownText, match="KVPRUNE_DATA") as error:
        read_text("wikitext2", "test")
    assert "pip install datasets" in str(error.value)


@pytest.mark.parametrize("name", ["nosuch", "wiki", ""])
def test_unknown_names(texts, name):
    with pytest.raises(errors.UnknownText):
        read_text(name, "valid")


def test_bytes_are_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(errors.UnknownText, match="UTF-8"):
        read_text(str(tmp_path / "x.txt"), "valid")


def test_a_byte_order_mark_is_no_text(texts):
    (texts / "ptb-test.txt").write_text("the cat", encoding="utf-8-sig")
    assert read_text("ptb", "test") == "the cat"
    assert read_text(str(texts / "ptb-test.txt"), "test") == "the cat"


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_other_encodings_are_refused(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes("\ufeffthe cat \u1234".encode(encoding))
    with pytest.raises(errors.UnknownText, match="is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8"):
        read_text(str(tmp_path / "x.txt"), "valid")
    (tmp_path / "x.txt").write_bytes("the cat".encode(encoding))  # without a mark, it is UTF-8 with zeros
    with pytest.raises(errors.UnknownText, match="convert it first"):
        read_text(str(tmp_path / "x.txt"), "valid")


@given(st.integers(2, 80), st.integers(2, 3000))
def test_windows_are_the_beginning_of_the_text(window, tokens):
    found = windows(TEXT, TOKENIZER, window, tokens)
    count = max(tokens // window, 1)
    assert found.shape == (count, window)
    assert found.flatten().tolist() == WHOLE[: count * window]


def test_the_whole_text_without_a_limit():
    assert windows(TEXT, TOKENIZER, 100).shape == (len(WHOLE) // 100, 100)
    assert torch.equal(token_ids(TEXT, TOKENIZER), torch.tensor(WHOLE))


def test_a_short_text_says_how_short():
    with pytest.raises(errors.TextTooShort, match=f"has {len(WHOLE)} tokens"):
        windows(TEXT, TOKENIZER, 100, len(WHOLE) + 100)
    with pytest.raises(errors.TextTooShort):
        windows("the cat", TOKENIZER, 100)
    with pytest.raises(errors.UnknownText, match="empty"):
        windows("  \n", TOKENIZER, 2)


PIECES = ["the", "cat", " ", "  ", "aa", "ä", "中文", "\U0001f469\u200d\U0001f467", "e\u0301", "<s>", "</s>", ".", "7"]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 60))
def test_a_line_may_be_cut_anywhere(pieces, length, margin):
    """The ids are those that begin the ids of the whole text, even if the cut falls into a word or a character; and
    but for the last few, they are all that the cut text has."""
    text = "".join(pieces) * 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvprune.text.windows._MARGIN", 24 + margin)
        found = _sure_ids(text, length, TOKENIZER)
    assert found == TOKENIZER(text)["input_ids"][: len(found)]
    assert len(found) >= len(TOKENIZER(text[:length])["input_ids"]) - 8


@given(st.integers(0, 3000), st.integers(1, 400))
def test_long_lines_give_the_same_ids(line, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvprune.text.windows._LONG_LINE", line)
        assert token_ids(TEXT, TOKENIZER, tokens).tolist() == WHOLE[:tokens]


@pytest.mark.parametrize("gap", [" ", ""])
def test_a_text_on_one_line_is_not_tokenised_whole(gap):
    """Nor is one without any white space."""
    text = (gap.join(WORDS) + gap) * 20_000  # 1.5 million characters and more
    read = []

    def tokenizer(part, **how):
        read.append(len(part))
        return TOKENIZER(part, **how)

    found = token_ids(text, tokenizer, 512)
    assert found.tolist() == TOKENIZER(text[:20_000])["input_ids"][:512]
    assert sum(read) < 20_000


def test_every_window_begins_with_the_start_token_that_its_tokenizer_puts():
    from tokenizers.processors import TemplateProcessing

    tokenizer, text = tiny_tokenizer(), words(2000)
    plain = windows(text, tokenizer, 16, 160)
    assert start_token(tokenizer) is None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert start_token(tokenizer) == 1
    found = windows(text, tokenizer, 16, 160)
    assert found.shape == plain.shape
    assert (found[:, 0] == 1).all()
    stream = found[:, 1:].flatten()
    assert torch.equal(stream, plain.flatten()[: len(stream)])  # the text goes on from window to window
    assert torch.equal(token_ids(text, tokenizer, 50), plain.flatten()[:50])
