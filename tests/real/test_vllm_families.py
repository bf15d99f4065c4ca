"""vLLM's CPU build serves a pruned tiny model of each mechanism, with the folder's own code; in float32.

Runs in an environment that has no kvprune; tiny_folders.py has made the folders in one that has it.
"""

import json
import os
from pathlib import Path

import pytest
from served import PROMPTS, ask, gaps

FOLDERS = Path(os.environ.get("KVPRUNE_TEST_TINY", "missing"))
LONG = " ".join(PROMPTS[:1] * 25)  # of more tokens than a merged model reads at the kept width in transformers
FAMILIES = [
    "gemma3_text",
    "gemma4_text",
    "gemma4_text-shared",
    "phi3",
    "glm",
    "hunyuan_v1_dense",
    "ministral3",
    "llama-merged",
    "gpt_oss",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_greedy_text_are_those_of_transformers(family, tmp_path):
    folder = FOLDERS / family
    assert json.loads((folder / "config.json").read_text())["model_type"] == f"kvprune_{family.split('-')[0]}"
    difference, gap = gaps(folder, ask(folder, tmp_path, prompts=[*PROMPTS, LONG]))
    assert difference < 1e-3
    assert gap < 1e-3  # the best, or as good as that within rounding


def test_vllms_own_llama_serves_a_portable_folder_with_yarn(tmp_path):
    """It does not read longrope's attention_factor; with YaRN's scale there log-probabilities were 0.3 off."""
    folder = FOLDERS / "portable-yarn"
    difference, gap = gaps(folder, ask(folder, tmp_path, "vllm"))
    assert difference < 1e-4
    assert gap < 1e-4


def test_experts_that_transformers_runs_are_compiled(tmp_path):
    """As vLLM serves where nobody asks for --enforce-eager. It has no experts of its own for gpt-oss's, which have
    biases, and compiles no loop over them."""
    folder = FOLDERS / "gpt_oss"
    difference, gap = gaps(folder, ask(folder, tmp_path, KVPRUNE_TEST_COMPILE="1"))
    assert difference < 1e-3
    assert gap < 1e-3
