"""The model card: what the hub's own library reads from it, and that people may edit it."""

import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import kvprune
from ggufs import write_gguf
from kvprune import errors
from kvprune.models.origin import origin
from kvprune.models.source import resolve
from kvprune.pages.card import card
from tiny import COARSE, tiny_model

RECORD = {
    "source": "/home/jane/secret/base-7b",
    "base_model": None,
    "license": None,
    "ratio_achieved": 0.5,
    "kv_bytes_per_token": {"dense": 2048, "pruned": 1024},
    "parameters": {"dense": 5000000, "pruned": 4000000},
    "kv_heads": {"dense": 2, "pruned": 2},
    "widths": [16, 0, 24],
    "dropped_blocks": [1],
    "head_dim": 32,
    "merge": 1,
    "layout": "per-layer",
    "dtype": "bfloat16",
    "method": {"importance": "variance", "tau": None},
    "calibration": {"text": "/home/jane/texts/mine.txt", "tokens": 512, "sha256": "0"},
    "perplexity": [
        {"text": "wikitext2", "window": 128, "tokens": 1024, "dense": 10.0, "pruned": 12.5},
        {"text": "wikitext2", "window": 2048, "tokens": 1024, "dense": 8.0, "pruned": 9.5},
        {"text": "/home/jane/texts/a|b.txt", "window": 128, "tokens": 1024, "dense": None, "pruned": 7.25},
    ],
    "versions": {"kvprune": "0.1.0"},
    "seed": 3,
}
RECOVERED = {
    "text": "self",
    "tokens": 4096,
    "steps": 7,
    "settings": {"text": "/home/jane/x.json", "steps": 7, "epochs": None, "rank": 4, "lr": 0.001, "loss": "logits"},
}


def changed(**fields):
    return copy.deepcopy(RECORD) | fields


def rows(text):
    """The card's table, cell by cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_metadata():
    """As huggingface_hub reads it back."""
    data = ModelCard(card(RECORD, "kvprune_qwen2")).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["kvprune", "kv-cache", "pruned", "qwen2"]
    assert data.base_model is None
    assert data.license is None
    first, second, third = data.eval_results
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert (first.metric_type, first.metric_value) == ("perplexity", 12.5)
    assert first.metric_args == {"window": 128, "tokens": 1024, "dense": 10.0}
    assert (second.metric_value, second.metric_args["window"]) == (9.5, 2048)
    assert (third.dataset_type, third.metric_value) == ("a/b.txt", 7.25)
    assert third.metric_args == {"window": 128, "tokens": 1024}


def test_of_a_hub_id():
    licence = {"license": "other", "license_name": "mine", "license_link": "https://example.org/licence"}
    text = card(changed(source="me/base", base_model="me/base", revision="v2", license=licence), "kvprune_llama")
    data = ModelCard(text).data
    assert data.base_model == "me/base"
    assert {name: getattr(data, name) for name in licence} == licence
    assert "[me/base](https://huggingface.co/me/base)" in text
    assert "kvprune prune me/base --out DIR --plan plan.json" in text
    assert "--revision v2 --seed 3" in text


def test_figures_are_the_records():
    found = rows(card(RECORD, "kvprune_llama"))
    assert found[0] == ["", "dense", "pruned"]
    assert found[2:] == [
        ["KV bytes a token", "2,048", "1,024"],
        ["parameters", "5,000,000", "4,000,000"],
        ["perplexity, wikitext2, windows of 128 (1,024 tokens)", "10.00", "12.50"],
        ["perplexity, wikitext2, windows of 2048 (1,024 tokens)", "8.00", "9.50"],
        ["perplexity, a/b.txt, windows of 128 (1,024 tokens)", "", "7.25"],
    ]
    assert len({len(row) for row in found}) == 1


def test_after_a_recovery():
    trained = [{**row, "before": 20.0} for row in RECORD["perplexity"]]
    earlier = {**RECOVERED, "settings": {**RECOVERED["settings"], "loss": "next-token"}}
    record = changed(perplexity=trained, recovered={**RECOVERED, "earlier": earlier})
    text = card(record, "kvprune_llama")
    found = rows(text)
    assert found[0] == ["", "dense", "pruned", "recovered"]
    assert found[4] == ["perplexity, wikitext2, windows of 128 (1,024 tokens)", "10.00", "20.00", "12.50"]
    assert len({len(row) for row in found}) == 1
    commands = re.findall(r"^kvprune recover .*", text, re.M)
    assert [line.partition("--loss ")[2] for line in commands] == ["next-token", "logits"]  # the first one first
    assert "--text x.json --steps 7 --rank 4 --lr 0.001" in commands[1]
    assert "7 steps), with the loss logits" in text


@pytest.mark.parametrize("model_type", ["kvprune_llama", "llama"])
def test_how_to_load(model_type):
    """A stock checkpoint needs no code of ours."""
    text = card(changed(layout="stock"), model_type)
    assert ("trust_remote_code" in text, "trust-remote-code" in text) == (model_type != "llama",) * 2
    assert "vllm serve DIR" in text
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, "card", "exec")


def test_no_path_of_this_machine():
    record = changed(recovered=RECOVERED)
    text = card(record, "kvprune_llama")
    assert "jane" not in text
    assert "secret" not in text
    assert "# base-7b, 50% of the KV cache removed" in text


def test_no_figures_no_table():
    assert not rows(card({"widths": [8]}, "kvprune_llama"))
    assert "Figures" not in card({}, "llama")
    without = changed(perplexity=[])
    assert ModelCard(card(without, "llama")).data.eval_results is None
    assert len(rows(card(without, "llama"))) == 4


def test_the_folder_has_it(pruned_half):
    """From what was measured, the same again from the same folder, and in no list of checksums."""
    record = kvprune.read_record(pruned_half)
    text = (pruned_half / "README.md").read_text()
    assert text == card(record, "kvprune_llama")
    assert "README.md" not in record["files"]
    assert str(pruned_half.parent) not in text
    found = ModelCard.load(pruned_half / "README.md")
    assert [r.metric_value for r in found.data.eval_results] == [row["pruned"] for row in record["perplexity"]]


@torch.no_grad()
@pytest.mark.parametrize("how", ["edited", "gone", "no metadata"])
def test_a_card_may_be_edited_or_taken_away(pruned_half, tmp_path, caplog, how):
    folder = Path(shutil.copytree(pruned_half, tmp_path / "half"))
    path, mine = folder / "README.md", "# My own words\n"
    if how == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text() + mine if how == "edited" else mine)
    before = path.read_bytes() if how != "gone" else None
    ids = torch.arange(3, 12)[None]
    logits = kvprune.load(folder, device="cpu")(ids).logits
    assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    found = kvprune.refresh(folder)
    assert (found["changed"], found["card"]) == (False, how == "gone")
    assert path.read_bytes() == (before or (pruned_half / "README.md").read_bytes())
    assert not [record for record in caplog.records if record.name == "kvprune"]


def test_a_card_that_was_there_before_is_kept(checkpoint, texts, tmp_path, monkeypatch):
    """Someone wrote it while an unfinished run was waiting."""
    from kvprune.channels import prune as module

    real = module.save

    def save(model, tokenizer, plan, record, folder):
        (folder / "README.md").write_text("mine")
        return real(model, tokenizer, plan, record, folder)

    monkeypatch.setattr(module, "save", save)
    kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, **COARSE)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "ratio", [["--ratio", "0.5"], ["--ratio", "0.4", "--allocation", "budget", "--repair", "refit"]]
)
def test_its_command_makes_the_same_again(checkpoint, texts, tmp_path, command, monkeypatch, ratio):
    options = shlex.split("--calibration-tokens 640 --repair-tokens 2048 --align 2 --min-width 4 --seed 1")
    judged = ["--eval-tokens", "512", "--window", "64"]
    assert command("prune", checkpoint, "--out", tmp_path / "first", *ratio, *options, *judged)[0] == 0
    (line,) = re.findall("^kvprune prune .*", (tmp_path / "first" / "README.md").read_text(), re.M)
    monkeypatch.chdir(tmp_path / "first")
    words = {"SOURCE": checkpoint, "DIR": tmp_path / "again"}
    assert command(*[words.get(word, word) for word in line.split()[1:]], *judged)[0] == 0
    first, again = (kvprune.read_record(tmp_path / name) for name in ("first", "again"))
    assert again["files"] == first["files"]


def test_refresh_says_so(pruned_half, tmp_path, command):
    folder = Path(shutil.copytree(pruned_half, tmp_path / "half"))
    (folder / "README.md").unlink()
    code, out, _ = command("refresh", folder)
    assert (code, "wrote a model card" in out, "up to date" in out) == (0, True, True)
    assert "wrote" not in command("refresh", folder)[1]


def test_refresh_of_a_damaged_record(pruned_half, tmp_path, command):
    folder = Path(shutil.copytree(pruned_half, tmp_path / "half"))
    (folder / "README.md").unlink()
    record = json.loads((folder / "kvprune.json").read_text())
    for damage in ({"perplexity": 3}, {"kv_bytes_per_token": {}}, {"method": []}, {"recovered": "x"}, {"widths": "a"}):
        (folder / "kvprune.json").write_text(json.dumps({**record, **damage}))
        code, out, err = command("refresh", folder)
        assert (code, out, err.count("\n")) == (2, "", 1), damage
        assert "kvprune.json is damaged" in err
        assert not (folder / "README.md").exists()


def with_card(checkpoint, tmp_path, text):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "with-card"))
    (folder / "README.md").write_text(text)
    return folder


LICENCES = {
    "---\nlicense: mit\n---\n# A model\n": {"license": "mit"},
    "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n": {
        "license": "other",
        "license_name": "mine",
    },
    "---\nlicense: other\nlicense_link: https://x.org/l\n---\n": {
        "license": "other",
        "license_link": "https://x.org/l",
    },
    "---\nlicense: [mit\n---\n": None,
    "---\n- license\n---\n": None,
    "# No metadata\n": None,
}


@pytest.mark.parametrize("text", LICENCES)
def test_the_licence_is_the_sources_own(checkpoint, tmp_path, text, caplog):
    found = origin(resolve(with_card(checkpoint, tmp_path, text)))
    assert found == {"base_model": None, "license": LICENCES[text]}
    assert not caplog.records


def test_the_licence_in_config_json(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "licensed"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "license": "apache-2.0"}))
    assert origin(resolve(folder))["license"] == {"license": "apache-2.0"}


def test_the_licence_of_a_gguf(tmp_path, monkeypatch):
    import gguf

    real = gguf.GGUFWriter.write_header_to_file

    def licensed(self, *args):
        self.add_license("apache-2.0")
        real(self, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", licensed)
    write_gguf(tiny_model("llama", groups=2, head_dim=32, layers=1), tmp_path / "tiny.gguf")
    assert origin(resolve(tmp_path / "tiny.gguf")) == {"base_model": None, "license": {"license": "apache-2.0"}}


def test_the_licence_of_a_hub_id(checkpoint, tmp_path, monkeypatch):
    """As it lies in the hub's cache."""
    from huggingface_hub import constants

    text = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.md\n---\n"
    repository = tmp_path / "hub" / "models--me--base"
    shutil.copytree(with_card(checkpoint, tmp_path, text), repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert origin(resolve("me/base")) == {
        "base_model": "me/base",
        "license": {
            "license": "other",
            "license_name": "mine",
            "license_link": "https://huggingface.co/me/base/blob/main/LICENSE.md",
        },
    }


def test_the_licence_stays_after_a_recovery(checkpoint, texts, tmp_path):
    folder = with_card(checkpoint, tmp_path, "---\nlicense: mit\n---\n")
    kvprune.prune(folder, tmp_path / "half", ratio=0.5, **COARSE)
    (tmp_path / "half" / "README.md").write_text("mine")
    options = {"steps": 1, "tokens": 2048, "held_out": 256, "window": 64, "eval_tokens": 512, "eval_windows": (64,)}
    kvprune.recover(tmp_path / "half", tmp_path / "out", **options, loss="next-token", device="cpu")
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.license == "mit"
    assert "kvprune recover DIR --out OUT --text wikitext2" in found.text
    assert (tmp_path / "half" / "README.md").read_text() == "mine"


def test_a_broken_folder_is_refused_before_a_card_is_written(checkpoint):
    with pytest.raises(errors.BrokenCheckpoint):
        kvprune.refresh(checkpoint)
    assert not (checkpoint / "README.md").exists()
