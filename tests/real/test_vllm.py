"""vLLM's CPU build serves SmolLM2 pruned to mixed widths; runs in an environment that has no kvprune."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

MODELS = Path(os.environ.get("KVPRUNE_VLLM_MODELS", "missing"))
PROMPTS = [
    "The capital of France is",
    "The Eiffel Tower was built by the engineer Gustave Eiffel, whose company designed the tower. It is",
    "Water boils at a temperature of",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    answers = {}
    for name in ("dense", "pruned"):
        script = Path(__file__).with_name("serve.py")
        command = [sys.executable, str(script), str(MODELS / name), str(folder / "prompts.json")]
        subprocess.run([*command, str(folder / f"{name}.json")], check=True)
        answers[name] = json.loads((folder / f"{name}.json").read_text())
    return answers


def logprobs(model, ids):
    """Log-probability of every token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


def test_kvprune_is_not_here_and_widths_are_mixed():
    with pytest.raises(ImportError):
        import kvprune  # noqa: F401
    assert set(json.loads((MODELS / "pruned" / "kvprune.json").read_text())["widths"]) == {32, 64}


@torch.no_grad()
def test_prompt_logprobs_equal_transformers_within_bfloat16_rounding(served):
    """The yardstick is what bfloat16 itself costs: transformers in bfloat16 against transformers in float32."""
    half, full = (
        AutoModelForCausalLM.from_pretrained(MODELS / "pruned", trust_remote_code=True, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    answers = served["pruned"]
    rounding, difference = [], []
    for ids, found in zip(answers["prompt_ids"], answers["prompt_logprobs"], strict=True):
        exact = logprobs(full, ids)
        rounding.append(logprobs(half, ids) - exact)
        difference.append(torch.tensor(found) - exact)
    allowed, seen = (torch.cat(parts).abs() for parts in (rounding, difference))
    print(f"\nlog-probabilities against float32: vLLM {seen.mean():.4f}, transformers in bfloat16 {allowed.mean():.4f}")
    assert seen.mean() <= 1.5 * allowed.mean()
    assert seen.max() <= 2 * allowed.max()


@torch.no_grad()
def test_greedy_text_agrees(served):
    """Every token vLLM chose is transformers' best, or as good as that within bfloat16 rounding."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / "pruned", trust_remote_code=True, dtype=torch.bfloat16)
    answers = served["pruned"]
    same = 0
    for prompt, new in zip(answers["prompt_ids"], answers["new_ids"], strict=True):
        logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].float()
        gap = logits.max(-1).values - logits.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
        same += int((gap == 0).sum())
        assert gap.max() <= 0.25  # one step of bfloat16 at these logits is 0.0625 to 0.125
    total = sum(map(len, answers["new_ids"]))
    print(f"\ngreedy tokens that agree: {same} of {total}")
    assert same >= 0.95 * total


def test_the_cache_holds_more_tokens_by_the_bytes_saved(served):
    kv = json.loads((MODELS / "pruned" / "kvprune.json").read_text())["kv_bytes_per_token"]
    found = served["pruned"]["cache_tokens"] / served["dense"]["cache_tokens"]
    print(f"\ncache tokens: dense {served['dense']['cache_tokens']:,}, pruned {served['pruned']['cache_tokens']:,}")
    assert kv["dense"] / kv["pruned"] == pytest.approx(4 / 3, rel=0.01)
    assert found == pytest.approx(kv["dense"] / kv["pruned"], rel=0.01)  # a cache holds whole blocks
