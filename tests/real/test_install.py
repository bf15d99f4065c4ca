"""As a new user does it: an empty environment, `pip install .`, the quickstart's commands elsewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FEWER = {
    "prune": "--calibration-tokens 1024 --repair-tokens 2048 --eval-tokens 1024 --window 512",
    "recover": "--tokens 8192 --steps 2 --held-out 1024 --eval-tokens 1024 --eval-window 512",
    "eval": "--tokens 1024",
    "bench": "--batch 1 --context 512 --new-tokens 8",
    "study": "--context 256 --samples 1",
}


def test_install_and_first_example(tmp_path):
    """The quickstart's console blocks as they stand, but for the hub id, the data folder and the number of tokens."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *shlex.split(os.environ["TORCH"])], check=True)

    data = tmp_path / "data"
    data.mkdir()
    for split in ("valid", "test"):
        for name in ("wikitext2", "ptb"):
            shutil.copy(Path(os.environ["KVPRUNE_DATA"]) / f"wiki-{split}.txt", data / f"{name}-{split}.txt")
    environment = os.environ | {"KVPRUNE_DATA": str(data)}

    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.S)
    verbs = set()
    for line in "".join(blocks).splitlines():
        program, *words = shlex.split(line.removeprefix("$ ").replace(HUB_ID, os.environ["KVPRUNE_TEST_MODEL"]))
        if program == "pip":
            subprocess.run([*pip, *words[1:]], check=True, cwd=ROOT)
            subprocess.run([*pip, "gguf"], check=True)  # the model at hand is a .gguf
            continue
        verbs.add(words[0])
        words += FEWER.get(words[0], "").split()
        subprocess.run([binaries / program, *words], check=True, cwd=tmp_path, env=environment)
    assert verbs == {"prune", "recover", "show", "eval", "bench", "report", "doctor", "fit", "study", "generate"}
    size = (tmp_path / "pruned" / "model.safetensors").stat().st_size
    # bfloat16, 30 layers: half of K and V is gone (3 heads of 64, hidden 576), and two mixes of 64 x 96 a KV head came
    expected = 2 * (134_515_008 - 30 * (2 * 96 * 576 - 2 * 3 * 64 * 96))
    assert expected < size < 1.001 * expected  # the header and rope_index
