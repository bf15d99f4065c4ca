"""As a new user does it: an empty environment, `pip install .`, the README's example elsewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUICK = ["--calibration", "wiki", "--calibration-tokens", "1024", "--eval-tokens", "1024", "--window", "512"]


def test_install_and_first_example(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *shlex.split(os.environ["TORCH"])], check=True)
    subprocess.run([*pip, f"{ROOT}[gguf]"], check=True)
    block = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = [line[2:] for text in block for line in text.splitlines() if line.startswith("$ kvprune")]
    seen = set()
    for command in commands:
        words = shlex.split(command.replace(HUB_ID, os.environ["KVPRUNE_TEST_MODEL"]))
        if words[1] in seen or words[1] == "eval":
            continue
        seen.add(words[1])
        words += QUICK if words[1] == "prune" else []
        subprocess.run([python.with_name("kvprune"), *words[1:]], check=True, cwd=tmp_path)
    assert seen == {"prune", "show", "generate"}
    size = (tmp_path / "pruned" / "model.safetensors").stat().st_size
    assert 0.8 * 269e6 < size < 0.95 * 269e6  # bfloat16: a tenth of the parameters is gone
