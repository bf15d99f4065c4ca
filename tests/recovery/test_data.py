"""What is trained on and what is held out, against plain loops."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune import errors
from kvprune.recovery import alpaca
from kvprune.recovery.data import batch_rows, read_data
from kvprune.text.given import find_text
from tiny import tiny_tokenizer, words

TOKENIZER = tiny_tokenizer()
EXAMPLES = [
    {"instruction": f"find the {w}", "input": "near a river" if i % 2 else "", "output": f"the {w} " * (i % 5 * 8 + 1)}
    for i, w in enumerate(["cat", "dog", "house", "river"] * 5)
]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(words(3000))
    return str(path)


@pytest.fixture(params=["list", "lines"])
def examples(request, tmp_path):
    path = tmp_path / "alpaca.json"
    lines = "\n".join(json.dumps(e) for e in EXAMPLES) + "\n"
    path.write_text(json.dumps(EXAMPLES, indent=1) if request.param == "list" else lines)
    return str(path)


@given(window=st.integers(2, 200), held_out=st.integers(2, 900), batch=st.integers(1, 8), tokens=st.integers(0, 2500))
def test_held_out_windows_follow_those_that_are_trained_on(text, window, held_out, batch, tokens):
    with open(text) as file:
        ids = TOKENIZER(file.read())["input_ids"]
    usable = (min(max(tokens // window, 1) * window, len(ids)) if tokens else len(ids)) // window
    enough = usable - max(held_out // window, 1) >= batch
    settings = {"window": window, "held_out": held_out, "batch": batch, "tokens": tokens}
    if not enough:
        with pytest.raises(errors.TextTooShort):
            read_data(find_text(text), TOKENIZER, **settings)
        return
    train, held = read_data(find_text(text), TOKENIZER, **settings)
    assert train.ids.flatten().tolist() + held.ids.flatten().tolist() == ids[: usable * window]
    assert len(held) == max(held_out // window, 1)
    assert torch.equal(train.labels, train.ids)
    assert train.tokens == train.ids.numel()


@given(batch=st.integers(1, 9), count=st.integers(9, 40), seed=st.integers(0, 3))
def test_every_window_comes_once_an_epoch(batch, count, seed):
    steps = -(-3 * count // batch)
    order = [row for step in range(steps) for row in batch_rows(step, batch, count, seed).tolist()]
    epochs = [order[i : i + count] for i in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = [row for step in range(steps) for row in batch_rows(step, batch, count, seed + 1).tolist()]
    assert other != order


def test_examples_learn_the_answer_only(examples):
    train, held = read_data(find_text(examples), TOKENIZER, window=260, held_out=600, batch=2, tokens=0)
    assert len(train) + len(held) == len(EXAMPLES)
    held_tokens = 0
    for i, example in enumerate(EXAMPLES):
        head = "Below is an instruction that describes a task"
        if example["input"]:
            head += ", paired with an input that provides further context"
        prompt = head + ". Write a response that appropriately completes the request.\n\n"
        prompt += "### Instruction:\n" + example["instruction"] + "\n\n"
        if example["input"]:
            prompt += "### Input:\n" + example["input"] + "\n\n"
        prompt += "### Response:\n"
        part, row = (train, i) if i < len(train) else (held, i - len(train))
        length = int(part.lengths[row])
        ids, labels = part.ids[row].tolist(), part.labels[row].tolist()
        before, after = TOKENIZER(prompt)["input_ids"], [*TOKENIZER(example["output"])["input_ids"], 2]
        expected = (before + after)[:260]
        assert length == len(expected)
        assert ids[:length] == expected
        for place, label in enumerate(labels):
            learnt = len(before) <= place < length
            assert label == (expected[place] if learnt else -100)
        assert all(0 <= i < len(TOKENIZER) for i in ids[length:])
        held_tokens += length if part is held else 0
    assert train.lengths.min() < 260 == train.lengths.max()
    assert train.left_out == 0
    assert held_tokens >= 600 > held_tokens - int(held.lengths[0])


def test_rows_are_cut_to_the_longest(examples):
    train, _ = read_data(find_text(examples), TOKENIZER, window=260, held_out=600, batch=2, tokens=0)
    short = train.rows(train.lengths.argsort()[:2])
    assert short.ids.shape[1] == int(short.lengths.max()) <= train.ids.shape[1]
    assert short.scored == sum(label != -100 for row in short.labels.tolist() for label in row[1:])


def test_tokens_limits_examples(examples):
    text = find_text(examples)
    whole, few = (
        sum(part.tokens for part in read_data(text, TOKENIZER, window=260, held_out=100, batch=1, tokens=n))
        for n in (0, 1000)
    )
    assert 1000 <= few < 1260 < whole
    with pytest.raises(errors.TextTooShort):
        read_data(text, TOKENIZER, window=260, held_out=100, batch=1, tokens=10**6)
    with pytest.raises(errors.BadOption, match="--window"):
        read_data(find_text(examples), TOKENIZER, window=20, held_out=10, batch=1, tokens=0)


def test_examples_without_room_for_an_answer_are_counted(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([*EXAMPLES, {"instruction": "the cat " * 300, "output": "no"}]))
    train, held = read_data(find_text(path), TOKENIZER, window=260, held_out=100, batch=1, tokens=0)
    assert (train.left_out, len(train) + len(held)) == (1, len(EXAMPLES))


def test_examples_without_instruction_or_output_are_counted(tmp_path):
    empty = [{"instruction": "the cat", "output": " \n"}, {"instruction": "", "output": "no"}]
    empty += [{"instruction": "a dog", "input": "", "output": None}]
    mixed, only, plain = (tmp_path / name for name in ("mixed.json", "only.jsonl", "plain.json"))
    mixed.write_text(json.dumps([empty[0], *EXAMPLES[:9], *empty[1:], *EXAMPLES[9:]]), encoding="utf-8-sig")
    plain.write_text(json.dumps(EXAMPLES))
    settings = {"window": 260, "held_out": 100, "batch": 1, "tokens": 0}
    found, expected = (read_data(find_text(path), TOKENIZER, **settings) for path in (mixed, plain))
    assert (found[0].empty, found[0].left_out, expected[0].empty) == (3, 0, 0)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, expected, strict=True))
    only.write_text("\n".join(map(json.dumps, empty)))
    with pytest.raises(errors.UnknownText, match="no example with an instruction and an output"):
        read_data(find_text(only), TOKENIZER, **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\xff\xfe\x00", "UTF-16; convert"),
        (b"\xff", "UTF-8"),
        (b"once upon a time", "neither a JSON list nor JSON lines"),
        (b"[{]", "neither"),
        (b"[3]", "example 1"),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "example 2 has no output"),
        (b'[{"instruction": ["a"], "output": "b"}]', "no string"),
    ],
)
def test_broken_examples(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(errors.UnknownText, match=message) as error:
        alpaca.read_examples(str(path))
    assert "\n" not in str(error.value)


NAMES = ["ptb-test.txt", "wiki.test.raw", "test.jsonl", "alpaca_test.json", "Test-1.txt"]
NAMES += ["testset.txt", "ptbtest.txt", "wikitest.json", "wikitexttest.txt", "test/data.txt"]


@pytest.mark.parametrize("name", NAMES)
def test_test_splits_are_refused(tmp_path, name):
    path = tmp_path / name
    (tmp_path / "train").mkdir()
    path.parent.mkdir(exist_ok=True)
    path.write_text(words(100))
    with pytest.raises(errors.UnknownText, match="test split"):
        find_text(path, "recovery")
    link = tmp_path / "innocent.txt"
    link.symlink_to(path)
    with pytest.raises(errors.UnknownText, match="test split"):
        find_text(link, "recovery")


@pytest.mark.parametrize("name", ["latest.txt", "contest.json", "wikitext2-valid.txt", "test/mine.txt"])
def test_other_names_are_not(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a")
    find_text(tmp_path / name, "recovery")
