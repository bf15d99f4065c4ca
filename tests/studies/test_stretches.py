"""Stretches: apart where the text is long enough, each as long as it must be, the first at the beginning."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprune import errors
from kvprune.studies import stretches
from kvprune.text.given import Documents, find_text
from kvprune.text.windows import token_ids
from tiny import tiny_tokenizer, words

TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
LONGEST_WORD = 10  # tokens; the words of `words` have fewer


def find_stretches(text, tokenizer, tokens, seeds, what):
    """Of characters."""
    pieces = stretches.pieces_of(Documents("text", documents=(text,)), tokenizer)
    return stretches.find_stretches(pieces, tokens, seeds, what)


def uneven(count, seed, one_line):
    """Words, then as many lines of figures, which have more tokens per character."""
    text = words(count, seed) + "\n".join("1 9 8 4 0 x" for _ in range(count // 6)) + "\n\n"
    return text.replace("\n", " ") if one_line else text


@settings(max_examples=60)
@given(
    count=st.integers(30, 500),
    seed=st.integers(0, 5),
    tokens=st.integers(2, 300),
    seeds=st.integers(1, 5),
    one_line=st.booleans(),
)
def test_stretches(count, seed, tokens, seeds, one_line):
    text = uneven(count, seed, one_line)
    total = len(token_ids(text, TOKENIZER))
    if total < tokens:
        with pytest.raises(errors.TextTooShort, match=f"this has {total} tokens"):
            find_stretches(text, TOKENIZER, tokens, seeds, "this")
        return
    found = find_stretches(text, TOKENIZER, tokens, seeds, "this")
    assert len(found.spans) == seeds
    assert found.spans[0][0] == 0
    if total >= seeds * (tokens + LONGEST_WORD):
        assert found.overlap == 0
    apart = all(end <= start for (_, end), (start, _) in pairwise(found.spans))
    assert apart == (found.overlap == 0)
    for start, end in found.spans:
        assert len(token_ids(text[start:end], TOKENIZER)) >= tokens
        read = TOKENIZER.decode(token_ids(text[start:], TOKENIZER, tokens))  # what prune reads
        assert text[start:].startswith(read)
        assert len(read) <= end - start


def test_long_text_is_cut_into_parts_and_sizes_begin_alike():
    text = words(6000)
    small, large = (find_stretches(text, TOKENIZER, tokens, 3, "this").spans for tokens in (50, 500))
    assert [start for start, _ in small] == [start for start, _ in large]
    assert small[2][0] >= len(text) * 2 // 3


def test_overlap_is_the_share_of_the_neighbour():
    text = words(100)
    total = len(token_ids(text, TOKENIZER))
    found = find_stretches(text, TOKENIZER, total * 3 // 4, 2, "this")
    (_, end), (start, last) = found.spans
    assert found.overlap == (end - start) / end
    assert 0.5 < found.overlap < 0.75
    assert last >= len(text) - 10
    assert find_stretches(text, TOKENIZER, total, 3, "this").overlap == 1


def test_an_empty_text():
    with pytest.raises(errors.UnknownText, match="empty"):
        find_stretches(" \n", TOKENIZER, 2, 1, "this")


def chats(sizes):
    """Conversations of so many words, and the number of tokens that transformers makes of each."""
    found = [[{"role": "user", "content": words(size, seed)}] for seed, size in enumerate(sizes)]
    return found, [len(TOKENIZER.apply_chat_template(one, return_dict=False)) for one in found]


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), tokens=st.integers(2, 200), seeds=st.integers(1, 4))
def test_stretches_of_conversations(sizes, tokens, seeds):
    """Each is the shortest run of whole conversations that is long enough."""
    given, lengths = chats(sizes)
    pieces = stretches.pieces_of(find_text(given), TOKENIZER)
    if sum(lengths) < tokens:
        with pytest.raises(errors.TextTooShort, match=f"this has {sum(lengths)} tokens"):
            stretches.find_stretches(pieces, tokens, seeds, "this")
        return
    found = stretches.find_stretches(pieces, tokens, seeds, "this")
    assert len(found.spans) == seeds
    assert found.spans[0][0] == 0
    for start, end in found.spans:
        assert sum(lengths[start:end]) >= tokens > sum(lengths[start : end - 1])
        assert list(pieces.behind(start).conversations) == given[start:]
    assert (found.overlap == 0) == all(end <= start for (_, end), (start, _) in pairwise(found.spans))


@pytest.mark.parametrize("row", [None, 6])
def test_stretches_of_token_ids(row):
    ids = torch.arange(60)
    pieces = stretches.pieces_of(find_text(ids if row is None else ids.view(-1, row)), None)
    size = row or 1
    assert pieces.unit == ("token" if row is None else "window")
    found = stretches.find_stretches(pieces, 12, 3, "this")
    expected = [(0, 12), (20, 32), (40, 52)] if row is None else [(0, 2), (3, 5), (6, 8)]
    assert (found.spans, found.overlap) == (expected, 0)
    for start, end in found.spans:
        assert torch.equal(pieces.ids(start, end), ids[start * size : end * size])
        assert torch.equal(pieces.behind(start).ids(None), ids[start * size :])
        assert pieces.behind(start).row == row
    assert stretches.find_stretches(pieces, 48, 2, "this").overlap == pytest.approx(0.75)
    with pytest.raises(errors.TextTooShort, match="this has 60 tokens, but 66"):
        stretches.find_stretches(pieces, 66, 1, "this")
