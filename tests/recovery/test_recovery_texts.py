"""What is trained on, beside a name and a file: the same tokens give the same weights."""

import json

import pytest
import torch

import kvprune
from kvprune import errors
from kvprune.recovery.data import read_data
from kvprune.text.given import find_text
from tiny import tiny_tokenizer, words

DOCUMENTS = [words(300, seed) for seed in range(12)]
TURNS = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
CHATS = [
    [{"role": "user", "content": words(30, seed)}, {"role": "assistant", "content": words(60, seed + 1000)}]
    for seed in range(60)
]


def same(a, b):
    return all(torch.equal(one, b.state_dict()[name]) for name, one in a.state_dict().items())


def test_strings_and_ids_train_as_the_file_that_says_the_same(pruned, texts, tmp_path, quick):
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    ids = torch.tensor(tiny_tokenizer()(path.read_text())["input_ids"])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    wanted = kvprune.recover(pruned, text=path, **quick)
    for given, name in ((DOCUMENTS, "12 strings, sha256 "), (ids, f"{len(ids)} token ids, "), (rows, "windows of 32")):
        window = 64 if given is rows else 32  # of windows that are given, nothing counts but their own
        found = kvprune.recover(pruned, text=given, **{**quick, "window": window})
        assert same(found.model, wanted.model)
        assert found.record["recovered"]["curve"] == wanted.record["recovered"]["curve"]
        assert name in found.record["recovered"]["text"] == found.record["recovered"]["settings"]["text"]
        assert found.record["perplexity"] == wanted.record["perplexity"]  # on the texts of the folder's record


@pytest.mark.parametrize("given", ["strings", "windows"])
def test_without_another_text_its_own_end_judges(pruned, texts, tmp_path, quick, given):
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in pruned.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    record = json.loads((pruned / "kvprune.json").read_text())
    (folder / "kvprune.json").write_text(json.dumps({**record, "perplexity": []}))
    (tmp_path / "own.txt").write_text("\n\n".join(DOCUMENTS))
    ids = torch.tensor(tiny_tokenizer()((tmp_path / "own.txt").read_text())["input_ids"])
    text = DOCUMENTS if given == "strings" else ids[: len(ids) // 32 * 32].view(-1, 32)
    (wanted,) = kvprune.recover(folder, text=tmp_path / "own.txt", **quick).record["perplexity"]
    (found,) = kvprune.recover(folder, text=text, **quick).record["perplexity"]
    assert found.pop("text") == f"{find_text(text).known_as} (its held-out end)"
    assert found.items() <= wanted.items()


def test_conversations_are_learnt_as_the_template_writes_them(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TURNS
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    wanted = [i for chat in CHATS for i in tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)]
    text = find_text(f"chat:{tmp_path / 'chats.json'}", "recovery")
    train, held = read_data(text, tokenizer, window=50, tokens=0, held_out=100, batch=2)
    assert train.ids.flatten().tolist() + held.ids.flatten().tolist() == wanted[: len(wanted) // 50 * 50]
    assert len(held) == 2
    assert torch.equal(train.labels, train.ids)


def test_the_command_trains_on_conversations(pruned, texts, tmp_path, command):
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    folder = tmp_path / "chatty"
    folder.mkdir()
    for file in pruned.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TURNS
    name = f"chat:{tmp_path / 'chats.json'}"
    small = ["--steps", 2, "--window", 32, "--rank", 4, "--checkpoint-every", 2, "--held-out", 256]
    small += ["--eval-tokens", 256, "--eval-window", 32, "--json", "--text", name]
    code, _, err = command("recover", folder, "--out", tmp_path / "a", *small)
    assert (code, err.splitlines()[-1]) == (
        2,
        "kvprune: the tokenizer has no chat template; give plain text, or a tokenizer with one",
    )
    tokenizer.save_pretrained(folder)
    code, out, err = command("recover", folder, "--out", tmp_path / "b", *small)
    assert code == 0, err
    assert json.loads(out)["recovered"]["text"] == name
    code, _, err = command("recover", folder, "--out", tmp_path / "c", *small, "--eval", name)
    assert code == 2
    assert "is the text that is trained on" in err


def test_other_strings_do_not_continue_a_run(pruned, texts, tmp_path, quick, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvprune.recovery.recover.merge", stop)
        with pytest.raises(KeyboardInterrupt):
            kvprune.recover(pruned, tmp_path / "x", text=DOCUMENTS, eval=[DOCUMENTS[::-1]], **quick)
    for text, judged in ((DOCUMENTS[::-1], [DOCUMENTS[:2]]), (DOCUMENTS, [DOCUMENTS[:5]])):
        with pytest.raises(errors.OutputExists, match="sha256"):
            kvprune.recover(pruned, tmp_path / "x", text=text, eval=judged, resume=True, **quick)
    found = kvprune.recover(pruned, tmp_path / "x", text=DOCUMENTS, eval=[DOCUMENTS[::-1]], resume=True, **quick)
    assert [row["text"] for row in found.record["perplexity"]] == [find_text(DOCUMENTS[::-1]).known_as]
    assert same(found.model, kvprune.recover(pruned, text=DOCUMENTS, **quick).model)
