"""Tokenizers that are missing, cannot be read, or know more tokens than the model."""

import importlib.util
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import errors
from kvprune.models.tokenizer import check_ids
from tiny import COARSE, tiny_model, tiny_tokenizer, words

ROWS = 300
ADDED = "<extra>"  # the first token that the embedding has no row for


@pytest.fixture
def changed(checkpoint, tmp_path):
    """Copies of the checkpoint, with values of its JSON files changed."""

    def copy(name="changed", files=(), **changes):
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        for file in files:
            path = folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return copy


@pytest.fixture(scope="session")
def enlarged(checkpoint, tmp_path_factory):
    """The checkpoint, for longer texts, with a tokenizer that knows a token and a pad token more than the model."""
    folder = tmp_path_factory.mktemp("enlarged") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([ADDED])
    tokenizer.add_special_tokens({"pad_token": "<new-pad>"})
    assert (tokenizer.convert_tokens_to_ids(ADDED), tokenizer.pad_token_id) == (ROWS, ROWS + 1)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def strange(texts):
    """A text in which the added token occurs, and one in which it does not."""
    (texts / "strange.txt").write_text(words(3000).replace("river", ADDED, 1))
    (texts / "plain.txt").write_text(words(6000))
    return str(texts / "strange.txt"), str(texts / "plain.txt")


def test_check_ids():
    check_ids(torch.tensor([[0, ROWS - 1]]), ROWS, "x")
    check_ids(torch.empty(0, dtype=torch.long), ROWS, "x")
    with pytest.raises(errors.TokenizerMismatch, match=r"id 301.* 300 rows"):
        check_ids(torch.tensor([[0], [301]]), ROWS, "x")


@pytest.mark.parametrize("pad", [-1, ROWS, 10 * ROWS])
def test_a_pad_token_outside_the_vocabulary_changes_nothing(changed, checkpoint, texts, tmp_path, pad):
    folder = changed(files=["config", "generation_config"], pad_token_id=pad)
    ids = torch.randint(3, ROWS, (2, 7))
    assert torch.equal(kvprune.load(folder)(ids).logits, kvprune.load(checkpoint)(ids).logits)
    kvprune.prune(folder, tmp_path / "out", ratio=0.5, repair="none", **COARSE)
    kvprune.prune(checkpoint, tmp_path / "same", ratio=0.5, repair="none", **COARSE)
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("out", "same"))
    assert torch.equal(found, expected)
    answers = [kvprune.generate(tmp_path / name, "the cat", max_new_tokens=5)["text"] for name in ("out", "same")]
    assert answers[0] == answers[1]


def test_more_tokens_than_rows_are_nothing_where_they_do_not_occur(enlarged, checkpoint, strange, tmp_path):
    _, plain = strange
    found, expected = (
        kvprune.evaluate(s, texts=[plain], tokens=1024, window_lengths=[64]) for s in (enlarged, checkpoint)
    )
    assert found["perplexity"] == expected["perplexity"]
    kvprune.prune(enlarged, tmp_path / "out", ratio=0.5, repair="none", **COARSE)
    examples = [{"instruction": f"find {w}", "output": w * n} for n, w in enumerate(["the ", "a cat "] * 10, 1)]
    (tmp_path / "alpaca.json").write_text(json.dumps(examples))
    settings = {"steps": 1, "window": 260, "batch": 2, "held_out": 100, "device": "cpu", "rank": 2}
    train = {"text": str(tmp_path / "alpaca.json"), "eval": plain, "eval_tokens": 100, "eval_windows": (32,)}
    assert kvprune.recover(tmp_path / "out", **train, **settings, loss="next-token").record["recovered"]["steps"] == 1
    text = kvprune.generate(enlarged, "the cat", max_new_tokens=5)["text"]
    assert text == kvprune.generate(checkpoint, "the cat", max_new_tokens=5)["text"]


def calls(source, strange, plain, tmp_path):
    """Every verb that reads a text, on one with a token too many."""
    both = {"texts": [strange], "tokens": 1024, "window_lengths": [64]}
    study = {"tokens": [512], "seeds": 1, "window": 32, "eval_tokens": 512, "calibration_window": 64, "device": "cpu"}
    return {
        "generate": lambda: kvprune.generate(source, f"the {ADDED}"),
        "evaluate": lambda: kvprune.evaluate(source, **both),
        "calibrate": lambda: kvprune.prune(source, calibration=strange, eval=plain, **COARSE),
        "judge": lambda: kvprune.prune(source, calibration=plain, eval=strange, **COARSE),
        "layers": lambda: kvprune.study_layers(source, text=strange, window=64, tokens=2048),
        "robustness": lambda: kvprune.study_robustness(source, tmp_path / "r", text=strange, tokens=2048),
        "study": lambda: kvprune.study_calibration(source, tmp_path / "c", texts=[strange], eval=[plain], **study),
    }


VERBS = ("generate", "evaluate", "calibrate", "judge", "layers", "robustness", "study")


@pytest.mark.parametrize("verb", VERBS)
def test_where_they_occur_the_id_and_the_rows_are_named(enlarged, strange, texts, tmp_path, verb):
    (texts / "strange.txt").write_text(ADDED + (texts / "strange.txt").read_text())
    with pytest.raises(errors.TokenizerMismatch, match=f"id {ROWS}, .* {ROWS} rows") as error:
        calls(enlarged, *strange, tmp_path)[verb]()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "c").exists()


def test_recover_names_them_too(enlarged, strange, tmp_path):
    kvprune.prune(enlarged, tmp_path / "out", ratio=0.5, repair="none", **COARSE)
    settings = {"window": 64, "batch": 2, "held_out": 100, "device": "cpu", "eval_tokens": 512, "eval_windows": (32,)}
    with pytest.raises(errors.TokenizerMismatch, match=f"id {ROWS}"):
        kvprune.recover(tmp_path / "out", tmp_path / "out2", text=strange[0], loss="next-token", **settings)
    assert not (tmp_path / "out2").exists()


def test_a_model_samples_from_a_start_token_that_it_has(enlarged):
    from kvprune.text.sampled import sample_ids

    tokenizer = kvprune.load_tokenizer(enlarged)
    tokenizer.bos_token = ADDED
    model = kvprune.load(enlarged, dtype="float32")
    expected = sample_ids(model, tiny_tokenizer(), 64, 8, 0, lambda n: None)
    assert torch.equal(sample_ids(model, tokenizer, 64, 8, 0, lambda n: None), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", [None, "LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_folder_without_a_tokenizer_says_what_belongs_there(tmp_path, family, settings):
    """Some classes come up without any file, and with no vocabulary."""
    tiny_model(family, layers=1).save_pretrained(tmp_path)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": settings}))
    with pytest.raises(errors.BrokenCheckpoint, match=r"no tokenizer; copy tokenizer\.json") as error:
        kvprune.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


DAMAGED = [("tokenizer.json", content) for content in ("", "{", "{}", "[]", '{"model": 1, "added_tokens": []}')]


@pytest.mark.parametrize(("name", "content"), [*DAMAGED, ("tokenizer_config.json", "{")])
def test_a_damaged_tokenizer(changed, name, content):
    folder = changed()
    (folder / name).write_text(content)
    with pytest.raises(errors.BrokenCheckpoint, match=r"cannot be read: .*; copy tokenizer\.json") as error:
        kvprune.load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_sentencepiece_model_names_the_packages(changed, monkeypatch):
    folder = changed()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    for installed, expected in ({}, "sentencepiece protobuf"), ({"sentencepiece": 1}, "protobuf"):
        found = {"sentencepiece": None, "google.protobuf": None} | installed
        monkeypatch.setattr("kvprune.models.tokenizer.find_spec", found.get)
        with pytest.raises(errors.UnknownSource, match=f"pip install {expected}$"):
            kvprune.load_tokenizer(folder)
    monkeypatch.setattr("kvprune.models.tokenizer.find_spec", importlib.util.find_spec)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # what tiktoken reads
    with pytest.raises(errors.BrokenCheckpoint, match="tiktoken"):
        kvprune.load_tokenizer(folder)


@pytest.mark.parametrize("verb", ["prune", "recover", "generate", "evaluate", "layers"])
def test_a_tokenizer_is_read_before_any_weights(checkpoint, texts, tmp_path, monkeypatch, verb):
    """`recover` needs a pruned folder, and so one with a tokenizer at first."""
    folder = tmp_path / "model"
    if verb == "recover":
        kvprune.prune(checkpoint, folder, ratio=0.5, repair="none", **COARSE)
        record = json.loads((folder / "kvprune.json").read_text())
        record["files"] = {name: sum for name, sum in record["files"].items() if "token" not in name}
        (folder / "kvprune.json").write_text(json.dumps(record))
    else:
        shutil.copytree(checkpoint, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()

    def never(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    verbs = {
        "prune": lambda: kvprune.prune(folder, **COARSE),
        "recover": lambda: kvprune.recover(folder, device="cpu"),
        "generate": lambda: kvprune.generate(folder, "the cat"),
        "evaluate": lambda: kvprune.evaluate(folder, window_lengths=[64]),
        "layers": lambda: kvprune.study_layers(folder, window=64),
    }
    with pytest.raises(errors.BrokenCheckpoint, match="no tokenizer"):
        verbs[verb]()
