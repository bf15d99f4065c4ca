"""vLLM's CPU build serves SmolLM2 pruned to mixed widths, its KV heads merged, and to a stock Llama; all in float32.

Runs in an environment that has no kvprune.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

FOLDERS = {name: Path(os.environ.get(f"KVPRUNE_TEST_{name.upper()}", "missing")) for name in ("dense", "pruned")}
STOCK = Path(os.environ.get("KVPRUNE_TEST_STOCK", "missing"))
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
    for name, model in FOLDERS.items():
        script = Path(__file__).with_name("serve.py")
        command = [sys.executable, str(script), str(model), str(folder / "prompts.json")]
        subprocess.run([*command, str(folder / f"{name}.json")], check=True)
        answers[name] = json.loads((folder / f"{name}.json").read_text())
    return answers


def logprobs(model, ids):
    """Log-probability of every token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


def test_kvprune_is_not_here_and_merged_heads_have_mixed_widths():
    """Three KV heads of 64 became one; some layers are factored."""
    with pytest.raises(ImportError):
        import kvprune  # noqa: F401
    widths = json.loads((FOLDERS["pruned"] / "kvprune.json").read_text())["widths"]
    config = json.loads((FOLDERS["pruned"] / "config.json").read_text())
    assert len(set(widths)) > 1
    assert max(widths) > config["dense_head_dim"] == 64
    assert (config["dense_kv_heads"], config["num_key_value_heads"]) == (3, 1)
    assert any(layer.get("factored") for layer in config["per_layer_config"].values())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDERS["pruned"], trust_remote_code=True, dtype=torch.float32)


@torch.no_grad()
def test_prompt_logprobs_equal_transformers(served, model):
    answers = served["pruned"]
    pairs = zip(answers["prompt_ids"], answers["prompt_logprobs"], strict=True)
    seen = torch.cat([torch.tensor(found) - logprobs(model, ids) for ids, found in pairs]).abs()
    print(f"\nlog-probabilities, vLLM against transformers: {seen.mean():.2e} on average, {seen.max():.2e} at most")
    assert seen.max() <= 1e-3


@torch.no_grad()
def test_greedy_text_agrees(served, model):
    """Every token vLLM chose is transformers' best, or as good as that within float32 rounding."""
    answers = served["pruned"]
    for prompt, new in zip(answers["prompt_ids"], answers["new_ids"], strict=True):
        logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        gap = logits.max(-1).values - logits.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
        assert gap.max() <= 1e-3
        assert (gap == 0).float().mean() >= 0.95


def test_the_cache_holds_more_tokens_by_the_bytes_saved(served):
    kv = json.loads((FOLDERS["pruned"] / "kvprune.json").read_text())["kv_bytes_per_token"]
    found = served["pruned"]["cache_tokens"] / served["dense"]["cache_tokens"]
    print(f"\ncache tokens: dense {served['dense']['cache_tokens']:,}, pruned {served['pruned']['cache_tokens']:,}")
    assert kv["dense"] / kv["pruned"] == pytest.approx(4 / 3, rel=0.01)
    assert found == pytest.approx(kv["dense"] / kv["pruned"], rel=0.01)  # a cache holds whole blocks


@torch.no_grad()
def test_vllms_own_llama_serves_a_stock_folder(served, tmp_path):
    """Without code from the folder: the log-probabilities are transformers' own Llama's, the cache holds thrice the
    tokens."""
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    script, answers_file = Path(__file__).with_name("serve.py"), tmp_path / "stock.json"
    command = [sys.executable, str(script), str(STOCK), str(tmp_path / "prompts.json"), str(answers_file), "vllm"]
    subprocess.run(command, check=True)
    answers = json.loads(answers_file.read_text())
    model = AutoModelForCausalLM.from_pretrained(STOCK, dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    pairs = zip(answers["prompt_ids"], answers["prompt_logprobs"], strict=True)
    seen = torch.cat([torch.tensor(found) - logprobs(model, ids) for ids, found in pairs]).abs()
    print(f"\nlog-probabilities, stock Llama: {seen.mean():.2e} on average, {seen.max():.2e} at most")
    assert seen.max() <= 1e-3
    assert answers["cache_tokens"] / served["dense"]["cache_tokens"] == pytest.approx(3, rel=0.01)
