"""What can be calibrated on beside a name and a file: strings, columns, token ids, conversations."""

import json

import pytest
import torch
from tokenizers import processors

import kvprune
from kvprune import errors
from kvprune.errors import BadOption, UnknownText
from kvprune.text.conversations import cut_conversations, end_of_turn
from kvprune.text.corpus import read_text
from kvprune.text.given import find_text
from kvprune.text.windows import windows
from tiny import COARSE, tiny_tokenizer, words

HALF = {**COARSE, "ratio": 0.5, "windows": (64,)}
DOCUMENTS = [words(400, seed) for seed in range(40)]
# As most have it, but for the beginning, which some templates write
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = TURNS
WITH_START = "{{ bos_token }}" + TURNS
CHATS = [
    [{"role": "user", "content": words(30, seed)}, {"role": "assistant", "content": words(60, seed + 1000)}]
    for seed in range(150)
]


def chat_tokenizer(template=WITH_START, starts=False):
    """starts: whether the tokenizer puts the start token before a text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if starts:
        start = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=start
        )
    return tokenizer


def stream(template=WITH_START, chats=CHATS):
    """The ids that transformers makes of them, one after the other."""
    tokenizer = chat_tokenizer(template)
    return [
        i for chat in chats for i in tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def dense(checkpoint):
    return kvprune.load(checkpoint)


def calibrated(dense, calibration, tokenizer=None, **options):
    return kvprune.prune(dense, tokenizer=tokenizer or tiny_tokenizer(), calibration=calibration, **{**HALF, **options})


def test_strings_are_the_file_with_an_empty_line_between_them(dense, tmp_path):
    (tmp_path / "x.txt").write_text("\n\n".join(DOCUMENTS))
    of_file = calibrated(dense, tmp_path / "x.txt")
    of_list = calibrated(dense, DOCUMENTS)
    of_others = calibrated(dense, (text for text in [*DOCUMENTS[:3], "", " \n", *DOCUMENTS[3:]]))  # blank ones
    assert of_list.plan.layers == of_file.plan.layers == of_others.plan.layers
    (judged,), (again,) = of_list.record["perplexity"], of_file.record["perplexity"]
    assert (judged["dense"], judged["pruned"]) == (again["dense"], again["pruned"])
    assert judged["text"] == "40 strings (its end)"
    assert of_list.record["calibration"]["text"] == "40 strings"
    assert of_list.record["calibration"]["sha256"] == of_file.record["calibration"]["sha256"]


def test_a_column_of_a_data_set(dense):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": DOCUMENTS, "chat": CHATS[: len(DOCUMENTS)]})
    found, of_list = calibrated(dense, data["text"]), calibrated(dense, DOCUMENTS)
    assert found.plan.layers == of_list.plan.layers
    assert find_text(data["text"]).documents == tuple(DOCUMENTS)
    assert find_text(data["chat"]).conversations == tuple(CHATS[: len(DOCUMENTS)])
    assert find_text(data["text"]).name == "a column 'text'" or isinstance(data["text"], list)  # as in datasets 3
    with pytest.raises(errors.BadOption, match=r"whole data set; give one of its columns \(chat, text\)"):
        find_text(data)
    assert find_text(data.rename_column("chat", "messages")).conversations == tuple(CHATS[: len(DOCUMENTS)])


def test_a_column_by_its_name(dense, tmp_path, command, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    lines = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(DOCUMENTS))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(lines)
    found = calibrated(dense, f"hub:{folder}:text")
    assert found.plan.layers == calibrated(dense, DOCUMENTS).plan.layers
    assert found.record["calibration"]["text"] == f"hub:{folder}:text"
    assert find_text(f"hub:{folder}:test:text").documents == tuple(DOCUMENTS)
    assert find_text(f"hub:{folder}:default:train:text").documents == tuple(DOCUMENTS)
    for name, message in {
        f"hub:{folder}:nosuch": "has no column 'nosuch'; there are: id, text",
        f"hub:{folder}:nosuch:text": "cannot be read",
        f"hub:{folder}": "names no column",
        "hub:a:b:c:d:e": "names no column",
        f"hub:{folder}:id": "row 1 of the calibration text is a int",
        "hub:/nosuch:text": "cannot be read",
    }.items():
        with pytest.raises(errors.UnknownText, match=message) as caught:
            find_text(name)
        assert "\n" not in str(caught.value)


def test_ids_are_the_text_that_they_are_of(dense, tmp_path):
    (tmp_path / "x.txt").write_text("".join(DOCUMENTS))
    ids = tiny_tokenizer()("".join(DOCUMENTS), return_tensors="pt").input_ids[0]
    of_file = calibrated(dense, tmp_path / "x.txt")
    for given in (ids, ids.int(), ids.clone().requires_grad_(False)):
        found = calibrated(dense, given)
        assert found.plan.layers == of_file.plan.layers
        assert found.record["perplexity"][0]["pruned"] == of_file.record["perplexity"][0]["pruned"]


def test_windows_of_ids_are_read_as_they_are(dense):
    """As many whole ones as asked; what is judged on are the last, cut within them."""
    ids = torch.randint(3, 300, (120, 48), generator=torch.Generator().manual_seed(0))
    text = find_text(ids)
    assert (text.whole(100), text.whole(5), text.at_end(100)) == (96, 48, 144)
    assert torch.equal(text.cut(text.ids(None), 48, None), ids)
    assert torch.equal(text.cut(text.ids(None), 20, None), ids[:, :40].reshape(-1, 20))
    result = calibrated(dense, ids, windows=(20, 48, 64), repair_tokens=2000)
    assert result.record["calibration"]["tokens"] == 512 // 48 * 48
    assert result.record["perplexity"][0]["tokens"] == 11 * 2 * 19  # of ceil(512 / 48) windows, two of 20 in each
    assert [row["window"] for row in result.record["perplexity"]] == [20, 48]
    again = calibrated(dense, ids.flatten(), calibration_window=48, windows=(48,), repair_tokens=2000)
    assert again.plan.layers == result.plan.layers


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("template", [PLAIN, WITH_START], ids=["plain", "with start"])
def test_conversations_are_what_transformers_makes_of_them(template, starts):
    """Each window begins with the start token, if texts do; none has it twice; nothing else is added or lost."""
    tokenizer = chat_tokenizer(template, starts)
    text = find_text(CHATS)
    ids = text.ids(tokenizer)
    wanted = stream(template)
    assert ids.tolist() == wanted
    assert text.ids(tokenizer, 100).tolist() == wanted[:100]
    start = tokenizer.bos_token_id
    found = text.cut(ids, 64, tokenizer)
    plain, at = [], 0  # by a loop
    while at < len(wanted):
        own = [] if not starts or wanted[at] == start else [start]
        window = own + wanted[at : at + 64 - len(own)]
        at += 64 - len(own)
        if len(window) == 64:
            plain.append(window)
    assert found.tolist() == plain
    if starts:
        assert (found[:, 0] == start).all()
    assert not ((found[:, 1:] == start) & (found[:, :-1] == start)).any()
    assert (ids == start).sum() == (len(CHATS) if template == WITH_START else 0)


def test_a_conversation_that_begins_with_the_window_keeps_its_one_start():
    start = 1
    ids = torch.tensor([1, 5, 6, 7, 8, 9, 1, 10, 11, 12, 13])
    assert cut_conversations(ids, 4, start).tolist() == [[1, 5, 6, 7], [1, 8, 9, 1], [1, 10, 11, 12]]
    assert cut_conversations(ids, 4, None).tolist() == [[1, 5, 6, 7], [8, 9, 1, 10]]
    assert cut_conversations(ids[:0], 4, start).shape == (0, 4)


def write(path, values, lines=True):
    path.write_text("\n".join(map(json.dumps, values)) if lines else json.dumps(values))
    return path


def test_conversations_from_files_and_lists_are_the_same(dense, tmp_path):
    tokenizer = chat_tokenizer()
    ids = torch.tensor(stream())
    wanted = calibrated(dense, ids, tokenizer)
    files = {
        "lists.jsonl": CHATS,
        "messages.jsonl": [{"messages": chat, "id": 3} for chat in CHATS],
        "alpaca.jsonl": [{"instruction": chat[0]["content"], "output": chat[1]["content"]} for chat in CHATS],
    }
    for name, values in files.items():
        for lines in (True, False):
            path = write(tmp_path / name, values, lines)
            assert find_text(f"chat:{path}").conversations == tuple(CHATS)
    one = write(tmp_path / "one.json", CHATS[0], lines=False)
    assert find_text(f"chat:{one}").conversations == (CHATS[0],)
    found = calibrated(dense, f"chat:{tmp_path / 'messages.jsonl'}", tokenizer)
    assert found.plan.layers == wanted.plan.layers
    assert found.record["calibration"]["text"] == f"chat:{tmp_path / 'messages.jsonl'}"
    assert found.record["perplexity"][0]["pruned"] == wanted.record["perplexity"][0]["pruned"]
    assert calibrated(dense, [{"messages": chat} for chat in CHATS], tokenizer).plan.layers == wanted.plan.layers


def test_an_alpaca_input_follows_its_instruction(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "Say it.", "input": "the cat", "output": "cat"}])
    (found,) = find_text(f"chat:{path}").conversations
    assert found == [{"role": "user", "content": "Say it.\n\nthe cat"}, {"role": "assistant", "content": "cat"}]


def test_the_command_calibrates_on_conversations(checkpoint, tmp_path, command):
    tokenizer = chat_tokenizer()
    kvprune.load(checkpoint).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    path = write(tmp_path / "x.jsonl", CHATS)
    small = ["--calibration-tokens", 512, "--repair-tokens", 4096, "--eval-tokens", 512, "--window", 64]
    small += ["--align", 2, "--min-width", 4, "--json", "--calibration", f"chat:{path}"]
    code, out, err = command("prune", tmp_path / "dense", "--out", tmp_path / "a", *small)
    assert code == 0, err
    assert json.loads(out)["calibration"]["text"] == f"chat:{path}"
    code, _, err = command("prune", checkpoint, "--out", tmp_path / "b", *small)
    assert (code, err.splitlines()[-1]) == (
        2,
        "kvprune: the tokenizer has no chat template; give plain text, or a tokenizer with one",
    )
    assert not (tmp_path / "b").exists()


def test_another_text_of_the_same_name_does_not_continue_a_run(dense, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvprune.channels.prune.refit", stop)
        with pytest.raises(KeyboardInterrupt):
            kvprune.prune(dense, tmp_path / "x", tokenizer=tiny_tokenizer(), calibration=DOCUMENTS, **HALF)
    given = {"tokenizer": tiny_tokenizer(), "resume": True, **HALF}
    with pytest.raises(errors.OutputExists, match="calibration_text"):
        kvprune.prune(dense, tmp_path / "x", calibration=DOCUMENTS[::-1], **given)
    with pytest.raises(errors.OutputExists, match="calibration='40 strings', not '39 strings'"):
        kvprune.prune(dense, tmp_path / "x", calibration=DOCUMENTS[1:], **given)
    found = kvprune.prune(dense, tmp_path / "x", calibration=DOCUMENTS, **given)
    assert found.plan.layers == calibrated(dense, DOCUMENTS).plan.layers


USER = [{"role": "user", "content": "the cat"}]
MISTAKES = {
    "nothing in it": ([], errors.UnknownText, "is empty"),
    "blank": ([" ", "\n"], errors.UnknownText, "the text is empty"),
    "no strings": (["the cat", 3], errors.UnknownText, "row 2 of the calibration text is a int"),
    "a list of ids": ([3, 4, 5], errors.UnknownText, "token ids as a tensor"),
    "None": ([None], errors.UnknownText, "is a NoneType"),
    "strings and conversations": (["the cat", USER], errors.UnknownText, "row 1 of the calibration text is a str"),
    "a number": (3, errors.BadOption, "the calibration text is a int"),
    "bytes": (b"the cat", errors.BadOption, "the calibration text is a bytes"),
    "a dict": ({"text": ["the cat"]}, errors.BadOption, "the calibration text is a dict"),
    "floats": (torch.rand(9000), errors.BadOption, "float32; give token ids as int64"),
    "booleans": (torch.ones(9000, dtype=torch.bool), errors.BadOption, "torch.bool"),
    "three dimensions": (torch.ones(2, 2, 2, dtype=torch.long), errors.BadOption, r"the shape \(2, 2, 2\)"),
    "no ids": (torch.ones(0, dtype=torch.long), errors.BadOption, r"the shape \(0,\)"),
    "one a window": (torch.ones(9, 1, dtype=torch.long), errors.BadOption, "windows of one token"),
    "padding": (torch.full((9000,), -100), errors.BadOption, "the token id -100"),
    "beyond the vocabulary": (torch.full((9000,), 300), errors.TokenizerMismatch, "the token id 300"),
    "too few ids": (torch.ones(600, dtype=torch.long), errors.BadOption, "600 token ids has 600 tokens, too few"),
    "windows too long": (
        torch.ones(9, 200, dtype=torch.long),
        errors.BadOption,
        "9 windows of 200 token ids: the model takes windows of",
    ),
    "too few strings": (["the cat saw a house"], errors.BadOption, "1 string has 9 tokens, too few"),
    "no messages": ([{"text": "the cat"}], errors.UnknownText, "row 1 of the calibration text is no conversation"),
    "a message without content": ([[{"role": "user"}]], errors.UnknownText, "without a role and a content"),
    "content that is no text": ([[{"role": "user", "content": [1]}]], errors.UnknownText, "a content in words"),
    "an empty conversation": ([USER, []], errors.UnknownText, "row 2 of the calibration text is no conversation"),
    "no file": ("chat:nosuch.jsonl", errors.UnknownText, "there is no file nosuch.jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_read_says_so_in_one_line(dense, tmp_path, name):
    given, error, message = MISTAKES[name]
    with pytest.raises(error, match=message) as caught:
        kvprune.prune(dense, tmp_path / "out", tokenizer=chat_tokenizer(), calibration=given, **HALF)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("the cat", "neither a JSON list nor JSON lines"),
        ('{"messages": []}', "conversation 1 is no conversation"),
        ('[[{"role": "user", "content": "a"}], 3]', "conversation 2 is no conversation"),
        ('{"instruction": "a", "output": 3}', "a content in words"),
        ("[" * 100_000, "neither a JSON list nor JSON lines"),
    ],
)
def test_files_without_conversations(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(errors.UnknownText, match=message) as caught:
        find_text(f"chat:{tmp_path / 'x.jsonl'}")
    assert "\n" not in str(caught.value)


def test_test_splits_of_conversations_are_refused(tmp_path):
    with pytest.raises(errors.UnknownText, match="test split"):
        find_text(f"chat:{write(tmp_path / 'chats-test.jsonl', CHATS)}")


def test_what_a_template_refuses(dense):
    refusing = "{{ raise_exception('no system here') if messages[0]['role'] == 'system' else 'x' }}"
    chats = [[{"role": "system", "content": "Be brief."}, *chat] for chat in CHATS]
    with pytest.raises(errors.BadOption, match="the chat template refuses the conversation: no system here"):
        calibrated(dense, chats, chat_tokenizer(refusing))


def test_the_token_that_ends_a_turn():
    tokenizer = chat_tokenizer()
    assert end_of_turn(tokenizer, USER) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer, USER) is None  # a plain new line ends no turn
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <end>{% endfor %}"
    assert end_of_turn(tokenizer, USER) == tokenizer.convert_tokens_to_ids("<end>")


def test_files_and_names_are_cut_as_before(texts):
    tokenizer = chat_tokenizer(starts=True)
    text = find_text("ptb")
    content = (texts / "ptb-valid.txt").read_text()
    assert torch.equal(text.cut(text.ids(tokenizer), 64, tokenizer), windows(content, tokenizer, 64))


def in_turn(streams):
    """A plain loop: 1,024 ids of each that has some left."""
    found, at = [], 0
    while any(at < len(ids) for ids in streams):
        for ids in streams:
            found += ids[at : at + 1024]
        at += 1024
    return found


def whole_text(name, split="valid"):
    return tiny_tokenizer()(read_text(name, split), verbose=False)["input_ids"]


def test_several_texts_are_read_in_turn(dense, texts, tmp_path):
    (tmp_path / "x.txt").write_text("\n\n".join(DOCUMENTS))
    expected = in_turn([whole_text("wikitext2"), whole_text("ptb"), whole_text(str(tmp_path / "x.txt"))])
    name = f"mix:wikitext2,ptb,{tmp_path / 'x.txt'}"
    text = find_text(name)
    assert text.ids(tiny_tokenizer()).tolist() == expected
    assert text.ids(tiny_tokenizer(), 1500).tolist() == expected[:1500]
    assert len({len(whole_text(part)) for part in ("wikitext2", "ptb")}) == 2  # one goes on behind the other's end
    options = {"calibration_tokens": 2048, "eval": [DOCUMENTS[:9]]}
    mixed = calibrated(dense, "mix:wikitext2,ptb", **options)
    ids = torch.tensor(in_turn([whole_text("wikitext2"), whole_text("ptb")]))
    assert mixed.plan.layers == calibrated(dense, ids, **options).plan.layers
    assert mixed.plan.layers != calibrated(dense, "wikitext2", **options).plan.layers
    assert mixed.record["calibration"]["text"] == "mix:wikitext2,ptb"


def test_several_texts_are_judged_on_the_test_split_of_each(dense, texts):
    mixed = calibrated(dense, "mix:wikitext2,ptb")
    assert [row["text"] for row in mixed.record["perplexity"]] == ["wikitext2", "ptb"]
    alone = calibrated(dense, DOCUMENTS, eval=["wikitext2", "ptb"])
    assert [row["dense"] for row in mixed.record["perplexity"]] == [row["dense"] for row in alone.record["perplexity"]]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("mix:wikitext2", UnknownText, "names no two different texts; give mix:A,B"),
        ("mix:wikitext2,wikitext2", UnknownText, "names no two different texts"),
        ("mix:wikitext2,,ptb", UnknownText, "names no two different texts"),
        ("mix:wikitext2,self", UnknownText, "'self' cannot be mixed with others"),
        ("mix:wikitext2,mix:ptb", UnknownText, "'mix:ptb' cannot be mixed"),
        ("mix:wikitext2,nosuch", UnknownText, "unknown text 'nosuch'"),
        ("mix:wikitext2,chat:nosuch.json", UnknownText, "no file nosuch.json with conversations"),
        ("mix:wikitext2,{folder}/ptb-test.txt", UnknownText, "is a test split"),
    ],
)
def test_texts_that_cannot_be_mixed(name, error, message, texts):
    with pytest.raises(error, match=message):
        find_text(name.format(folder=texts))


def test_a_part_of_several_texts_is_none_to_judge_on(dense, texts, tmp_path):
    (tmp_path / "x.txt").write_text("\n\n".join(DOCUMENTS))
    with pytest.raises(BadOption, match=r"x.txt is the calibration text; leave --eval out"):
        calibrated(dense, f"mix:wikitext2,{tmp_path / 'x.txt'}", eval=str(tmp_path / "x.txt"))
    with pytest.raises(BadOption, match="a study compares texts, and --text mix:wikitext2,ptb is several"):
        kvprune.study_calibration(tmp_path, tmp_path / "out", texts=["mix:wikitext2,ptb"])
