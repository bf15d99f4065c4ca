"""What vLLM says of a folder, and how far that is from transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

PROMPTS = ["the cat saw the old house near the river and then a small green dog", "the new house of"]


def ask(model: Path, work: Path, *how: str, prompts: list[str] = PROMPTS, **environment: str) -> dict:
    """The answers of a vLLM in a process of its own; how: CODE and RANKS of serve.py."""
    (work / "prompts.json").write_text(json.dumps(prompts))
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, str(script), str(model), str(work / "prompts.json"), str(work / "answers.json")]
    subprocess.run([*command, *how], check=True, env=os.environ | environment)
    return json.loads((work / "answers.json").read_text())


@torch.no_grad()
def gaps(model: Path, answers: dict) -> tuple[float, float]:
    """Against transformers with the folder's own code: the largest difference of a prompt's log-probabilities, and how
    much likelier the best token was than the one that vLLM chose, at most. Both in nats."""
    reference = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, dtype=torch.float32)
    of_prompt, of_new = [], []
    for prompt, seen, new in zip(answers["prompt_ids"], answers["prompt_logprobs"], answers["new_ids"], strict=True):
        ids = torch.tensor(prompt + new)
        table = reference(ids[None]).logits[0, :-1].float().log_softmax(-1)
        chosen = table.gather(1, ids[1:, None]).squeeze(1)
        end = len(prompt) - 1
        of_prompt.append((torch.tensor(seen) - chosen[:end]).abs().max().item())
        of_new.append((table[end:].max(-1).values - chosen[end:]).max().item())
    return max(of_prompt), max(of_new)
