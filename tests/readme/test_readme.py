"""The commands of README and quickstart run as they stand there, on a tiny model in place of the hub id."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALLER = {
    "prune": "--calibration-tokens 512 --repair-tokens 4096 --eval-tokens 512 --window 64 --align 2 --min-width 4",
    "recover": "--tokens 2048 --window 64 --steps 2 --batch 2 --rank 8 --held-out 256 --eval-tokens 512 "
    "--eval-window 64",
    "eval": "--tokens 512",
    "bench": "--batch 1,2 --context 8,16 --new-tokens 2 --rounds 1",
    "fit": "--context 64",
    "study": "--context 900 --samples 1",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


@pytest.fixture
def roomy(checkpoint, tmp_path):
    """The tiny checkpoint with a context that filters and haystacks fit into."""
    folder = tmp_path / "roomy"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


def commands_of(page: str) -> list[str]:
    return [
        line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ kvprune")
    ]


def test_readme_and_quickstart_have_every_verb_that_a_user_begins_with():
    verbs = {page: {shlex.split(line)[1] for line in commands_of(page)} for page in PAGES}
    assert verbs["README.md"] == {"prune", "generate"}
    assert verbs["docs/quickstart.md"] == {
        "prune", "recover", "eval", "bench", "fit", "generate", "show", "study", "report", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_console_commands(page, command, roomy, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in commands_of(page):
        words = shlex.split(line.replace(HUB_ID, str(roomy)))
        words += SMALLER.get(words[1], "").split()
        code, _, err = command(*words[1:])
        assert code == 0, f"{line}\n{err}"


@pytest.mark.parametrize("page", PAGES)
def test_python_example(page, roomy, texts, tmp_path, monkeypatch):
    code = "\n".join(blocks(page, "python"))
    assert code
    quick = "calibration_tokens=512, repair_tokens=4096, eval_tokens=512, windows=(64,), align=2, min_width=4"
    code = code.replace(HUB_ID, str(roomy)).replace("ratio=0.5", f"ratio=0.5, {quick}")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text()):
        assert f"\n{target}:" in makefile
