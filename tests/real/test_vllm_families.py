"""vLLM's CPU build serves a pruned tiny model of each mechanism, with the folder's own code; in float32.

Runs in an environment that has no kvprune; tiny_folders.py has made the folders in one that has it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

FOLDERS = Path(os.environ.get("KVPRUNE_TEST_TINY", "missing"))
PROMPTS = ["the cat saw the old house near the river and then a small green dog", "the new house of"]
FAMILIES = ["gemma3_text", "phi3", "glm", "hunyuan_v1_dense", "ministral3"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_log_probabilities_and_greedy_text_are_those_of_transformers(family, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, str(script), str(FOLDERS / family), str(tmp_path / "prompts.json")]
    subprocess.run([*command, str(tmp_path / "answers.json")], check=True)
    answers = json.loads((tmp_path / "answers.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(FOLDERS / family, trust_remote_code=True, dtype=torch.float32)
    assert model.config.model_type == f"kvprune_{family}"
    for prompt, seen, new in zip(answers["prompt_ids"], answers["prompt_logprobs"], answers["new_ids"], strict=True):
        ids = torch.tensor(prompt + new)
        table = model(ids[None]).logits[0].float().log_softmax(-1)
        of_prompt = table[: len(prompt) - 1].gather(1, ids[1 : len(prompt), None]).squeeze(1)
        assert (torch.tensor(seen) - of_prompt).abs().max() < 1e-3
        of_new = table[len(prompt) - 1 : -1]
        gap = of_new.max(-1).values - of_new.gather(1, ids[len(prompt) :, None]).squeeze(1)
        assert gap.max() < 1e-3  # the best, or as good as that within rounding
