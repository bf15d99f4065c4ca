"""Stretches: apart where the text is long enough, each as long as it must be, the first at the beginning."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprune import errors
from kvprune.studies.stretches import find_stretches
from kvprune.text.windows import token_ids
from tiny import tiny_tokenizer, words

TOKENIZER = tiny_tokenizer()
LONGEST_WORD = 10  # tokens; the words of `words` have fewer


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
