"""Folders go to the hub and come back whole. The hub is a stand-in on this machine (hub_server.py), its client the real
one, in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import serving
from huggingface_hub import ModelCard
from safetensors.torch import load

import kvprune
from kvprune import errors
from kvprune.runtime import checkpoint
from kvprune.runtime.hub import push_model
from tiny import COARSE, tiny_model, tiny_tokenizer

SOURCES = Path(kvprune.__file__).parents[1]
IDS = list(range(3, 12))
LOOK = """
import json, sys
import torch
name, how = sys.argv[1:]
ids = torch.arange(3, 12)[None]
if how == "kvprune":
    import kvprune
    model, tokenizer = kvprune.load(name, device="cpu"), kvprune.load_tokenizer(name)
else:
    if how == "imported":
        import kvprune
    from transformers import AutoModelForCausalLM, AutoTokenizer
    trust = {"trust_remote_code": True} if how == "alone" else {}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name, **trust), AutoTokenizer.from_pretrained(name)
    assert how == "imported" or "kvprune" not in sys.modules
with torch.no_grad():
    print(json.dumps([model(ids).logits[0, -1].tolist(), tokenizer("the cat saw").input_ids, type(model).__module__]))
"""


@pytest.fixture(scope="module")
def hub():
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Runs Python's arguments in a process that knows this hub: (exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("home")

    def run(*arguments, **variables):
        known = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "writes"}
        known |= {"PYTHONPATH": str(SOURCES), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        wanted = {name: value for name, value in {**os.environ, **known, **variables}.items() if value is not None}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=wanted, capture_output=True, text=True, cwd=home)
        return done.returncode, done.stdout, done.stderr

    return run


SAY = """
import contextlib, io, json, os, sys
from kvprune import cli
said = []
for arguments, variables in json.loads(sys.argv[1]):
    for name, value in variables.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    sys.argv = ["kvprune", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    said.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""


def kvprune_says(client, *commands, **variables):
    """Of each command, (arguments, changed variables), its exit code, stdout and stderr; in one process."""
    commands = [[list(map(str, arguments)), changed] for arguments, changed in commands]
    code, out, err = client("-c", SAY, json.dumps(commands), **variables)
    assert code == 0, err
    return json.loads(out)


def look(client, name, how, **variables):
    """((last logits, tokens, module of the model's class), what was noted) of a repository."""
    code, out, err = client("-c", LOOK, name, how, **variables)
    assert code == 0, err
    return json.loads(out), err


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def pushed(hub, client, pruned_half, tmp_path_factory):
    """(the folder that was pushed to me/half, what the command said)"""
    folder = Path(shutil.copytree(pruned_half, tmp_path_factory.mktemp("pushed") / "half"))
    (folder / "README.md").write_text((folder / "README.md").read_text() + "My own words.\n")
    (folder / ".resume").mkdir()
    (folder / ".resume" / "state").write_text("no part of the model")
    ((code, out, err),) = kvprune_says(client, (("push", folder, "me/half", "--private", "--json"), {}))
    assert code == 0, err
    return folder, json.loads(out)


@torch.no_grad()
def last_logits(folder):
    return kvprune.load(folder, device="cpu")(torch.tensor([IDS])).logits[0, -1].tolist()


def expected(folder):
    """Last logits and tokens of the folder, read here."""
    return last_logits(folder), kvprune.load_tokenizer(folder)("the cat saw").input_ids


def test_the_repository_is_the_folder(hub, pushed):
    folder, said = pushed
    assert hub.files("me/half") == contents(folder)
    assert said["repository"] == "me/half"
    assert said["url"].endswith(said["commit"])
    assert hub.heads["me/half", "main"] == said["commit"]
    asked = hub.created["me/half"]
    assert "private" in (asked.get("visibility"), *(["private"] if asked.get("private") else []))


@pytest.mark.parametrize("how", ["kvprune", "imported", "alone"])
def test_it_loads_by_its_name(hub, client, pushed, how):
    (logits, tokens, module), err = look(client, "me/half", how)
    assert (logits, tokens) == expected(pushed[0])
    assert module.startswith("transformers_modules" if how == "alone" else "kvprune.")
    assert "kvprune" not in err or how == "alone"


def test_it_loads_without_a_network_then(client, pushed):
    code, _, err = client("-c", "import huggingface_hub; huggingface_hub.snapshot_download('me/half')")
    assert code == 0, err
    (logits, _, _), _ = look(client, "me/half", "kvprune", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert logits == last_logits(pushed[0])


def test_a_repository_is_checked_as_a_folder_is(hub, client, pushed, tmp_path):
    files = hub.files("me/half")
    cases = {
        "plan": ({"plan.json": files["plan.json"].replace(b"0", b"1", 1)}, "not what was saved"),
        "weights": ({"model.safetensors": files["model.safetensors"][:-8]}, "damaged"),
        "tokenizer": ({"tokenizer.json": None}, "missing"),
    }
    for name, (changes, _) in cases.items():
        hub.repositories[f"me/{name}"] = {"": files}
        hub.heads[f"me/{name}", "main"] = ""
        hub.commit(f"me/{name}", "main", changes)
    commands = [(("generate", f"me/{name}", "the cat"), {}) for name in cases]
    commands.append((("prune", "me/half", "--out", tmp_path / "out"), {}))
    commands.append((("fit", "me/half", "--memory", "1GiB", "--context", "64"), {}))
    says = [*(words for _, words in cases.values()), "pruned already", "pruned already"]
    for words, (code, out, err) in zip(says, kvprune_says(client, *commands), strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert words in err


def test_weights_of_other_names_go(hub, client, pruned_half, tmp_path, monkeypatch):
    """They would be read in place of the new ones."""
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    source, pieces = kvprune.load(pruned_half, device="cpu"), tmp_path / "pieces"
    plan, record = (pruned_half / "plan.json").read_text(), kvprune.read_record(pruned_half)
    checkpoint.save(source, kvprune.load_tokenizer(pruned_half), plan, lambda: record, pieces)
    first, then = ("push", pruned_half, "me/pieces"), ("push", pieces, "me/pieces", "--revision", "next")
    assert [code for code, _, _ in kvprune_says(client, (first, {}), (then, {}))] == [0, 0]
    assert hub.files("me/pieces", "next") == contents(pieces)
    assert "model.safetensors" not in hub.files("me/pieces", "next")
    assert hub.files("me/pieces") == contents(pruned_half)


PUSH = """
import sys
import kvprune
from transformers import AutoModelForCausalLM
folder, trained = sys.argv[1:]
done = kvprune.load(folder).push_to_hub("me/loaded", commit_message="Mine", private=True)
assert done.commit_message == "Mine"
model = AutoModelForCausalLM.from_pretrained("me/loaded")
model.push_to_hub("me/again", tags=["mine"])
model.lm_head.weight.data *= 1.5
model.push_to_hub("me/trained")
model.save_pretrained(trained)
"""


def test_push_to_hub_of_a_loaded_model(hub, client, pushed, tmp_path):
    """From a folder and from the hub: everything is there again, to the byte."""
    folder, _ = pushed
    code, _, err = client("-c", PUSH, folder, tmp_path / "trained")
    assert code == 0, err
    assert hub.files("me/loaded") == contents(folder)
    again = hub.files("me/again")
    assert {n: d for n, d in again.items() if n != "README.md"} == {
        n: d for n, d in contents(folder).items() if n != "README.md"
    }
    card = ModelCard(again["README.md"].decode())
    assert card.data.tags == ["kvprune", "kv-cache", "pruned", "llama", "mine"]
    assert "My own words." in card.text
    (logits, _, _), err = look(client, "me/trained", "kvprune")
    assert logits == last_logits(tmp_path / "trained")
    assert "the weights are not those that kvprune measured" in err
    assert "not those" not in look(client, "me/loaded", "kvprune")[1]


MAKE = """
import json, sys
import kvprune
source, options = sys.argv[1], json.loads(sys.argv[2])
made = kvprune.prune(source, ratio=0.5, **options)
made.model.push_to_hub("me/made")
made = kvprune.prune(source, sys.argv[3], ratio=0.5, **options)
made.model.push_to_hub("me/saved")
"""


def test_push_to_hub_of_a_model_that_was_just_pruned(hub, client, checkpoint, texts, tmp_path):
    """Never saved, and saved."""
    out = tmp_path / "saved"
    code, _, err = client("-c", MAKE, checkpoint, json.dumps(COARSE), out, KVPRUNE_DATA=str(texts))
    assert code == 0, err
    assert hub.files("me/saved") == contents(out)
    made = hub.files("me/made")
    assert set(made) == set(contents(out))
    for name in set(made) - {"kvprune.json", "README.md"}:
        assert made[name] == (out / name).read_bytes(), name
    record = json.loads(made["kvprune.json"])
    assert record["files"] == kvprune.read_record(out)["files"]
    (logits, _, _), err = look(client, "me/made", "kvprune")
    assert logits == last_logits(out)
    assert "not those" not in err


def test_a_stock_layout_needs_no_code_of_ours(hub, client, tmp_path, texts):
    tiny_model("llama", kv_heads=4, groups=2, head_dim=32).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    options = {**COARSE, "ratio": 0.5, "layout": "stock"}
    kvprune.prune(tmp_path / "dense", tmp_path / "stock", **options)
    ((code, _, err),) = kvprune_says(client, (("push", tmp_path / "stock", "me/stock"), {}))
    assert code == 0, err
    for how in ("plain", "kvprune"):
        (logits, tokens, module), _ = look(client, "me/stock", how)
        assert module == "transformers.models.llama.modeling_llama"
        assert tokens == expected(tmp_path / "stock")[1]
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(last_logits(tmp_path / "stock")))


PUSH_STOCK = """
import sys
import kvprune
from transformers import AutoModelForCausalLM
folder, trained, name = sys.argv[1:]
kvprune.push(kvprune.load(folder), f"me/{name}-loaded", private=True)
model = AutoModelForCausalLM.from_pretrained(folder)
model.lm_head.weight.data *= 1.5
print(kvprune.push(model, f"me/{name}-trained", revision="next")["repository"])
model.save_pretrained(trained)
"""


@pytest.mark.parametrize("layout", ["stock", "portable"])
def test_a_model_of_transformers_own_class_goes_whole(hub, client, tmp_path, texts, layout):
    """As its folder, to the byte; and with other weights."""
    tiny_model("llama", kv_heads=4, groups=2, head_dim=32).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    folder = tmp_path / layout
    kvprune.prune(tmp_path / "dense", folder, **{**COARSE, "ratio": 0.5, "layout": layout})
    code, out, err = client("-c", PUSH_STOCK, folder, tmp_path / "trained", layout)
    assert (code, out.splitlines()[-1]) == (0, f"me/{layout}-trained"), err
    assert hub.files(f"me/{layout}-loaded") == contents(folder)
    trained = hub.files(f"me/{layout}-trained", "next")
    assert {name for name, data in trained.items() if data != contents(folder)[name]} == {"model.safetensors"}
    assert load(trained["model.safetensors"]).keys() == load(contents(folder)["model.safetensors"]).keys()
    wanted = load((tmp_path / "trained" / "model.safetensors").read_bytes())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load(trained["model.safetensors"]).items())


REFUSED = {
    "set HF_TOKEN, or run: hf auth login": ({"HF_TOKEN": None}, "half", "me/x"),
    "the token is not known": ({"HF_TOKEN": "wrong"}, "half", "me/x"),
    "may not write to me/x": ({"HF_TOKEN": "reads"}, "half", "me/x"),
    "may not write to me/half": ({"HF_TOKEN": "reads"}, "half", "me/half"),
    "give one as user/name": ({"HF_TOKEN": "writes"}, "half", "me/half/x"),
    "mend README.md": ({}, "no-yaml", "me/half"),
}


def test_what_the_hub_refuses_is_one_line(hub, client, pushed, tmp_path):
    folders = {name: Path(shutil.copytree(pushed[0], tmp_path / name)) for name in ("half", "no-yaml")}
    (folders["no-yaml"] / "README.md").write_text("---\nlicense: [mit\n---\n")
    before = {known: dict(commits) for known, commits in hub.repositories.items()}
    commands = [(("push", folders[which], name), variables) for variables, which, name in REFUSED.values()]
    for words, (code, out, err) in zip(REFUSED, kvprune_says(client, *commands), strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert words in err
    assert hub.repositories == before


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")],
)
def test_no_network_is_one_line(client, pushed, variables, words):
    ((code, out, err),) = kvprune_says(client, (("push", pushed[0], "me/x"), {}), **variables)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err


def test_what_is_no_pruned_folder_is_refused(checkpoint, pruned_half, tmp_path):
    broken = Path(shutil.copytree(pruned_half, tmp_path / "broken"))
    (broken / "plan.json").unlink()
    for folder, says in ((checkpoint, "not a folder that kvprune wrote"), (broken, "missing"), ("me/x", "no folder")):
        with pytest.raises(errors.KVPruneError, match=says):
            kvprune.push(folder, "me/x")


def test_a_model_of_which_there_is_no_record_goes_as_transformers_does_it(pruned_half, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, PreTrainedModel

    model = AutoModelForCausalLM.from_pretrained(pruned_half)
    model.save_pretrained(tmp_path / "bare")
    bare, calls = AutoModelForCausalLM.from_pretrained(tmp_path / "bare"), []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda *args, **options: calls.append((args, options)))
    push_model(bare, "me/bare", private=True)
    with pytest.raises(errors.UnknownSource, match="there is no record of it"):
        kvprune.push(bare, "me/bare")
    ((args, options),) = calls
    assert args == (bare, "me/bare")
    assert options["private"] is True
