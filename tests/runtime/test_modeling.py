"""A saved folder loads three ways and runs as the dense model does."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, StaticCache

import kvprune
from kvprune.channels.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime.checkpoint import save
from kvprune.runtime.modeling import CACHE
from tiny import VOCABULARY, make_plan, mask_dense, random_layers, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def saved(request, tmp_path_factory):
    """(masked dense, pruned, folder)"""
    dense = tiny_model(request.param, groups=3, layers=3)
    layers = random_layers(dense, (8, 16, 12))
    plan = make_plan(dense, layers)
    pruned = cut(ModelView(dense), plan)
    folder = tmp_path_factory.mktemp(request.param) / "pruned"
    save(pruned, tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths}, folder)
    return mask_dense(dense, layers), pruned, folder


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 10))


@torch.no_grad()
def test_reload_is_exact_with_kvprune(saved, ids):
    _, pruned, folder = saved
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), kvprune.load(folder, device="cpu")):
        assert type(loaded) is type(pruned)
        assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base(ids).last_hidden_state, pruned.base_model(ids).last_hidden_state)


def test_reload_is_exact_without_kvprune(saved, ids, tmp_path):
    """In a process where importing kvprune fails."""
    _, pruned, folder = saved
    code = """
import sys, json
sys.modules["kvprune"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
torch.save(model(ids).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""
    command = [sys.executable, "-c", code, str(folder), json.dumps(ids.tolist())]
    command += [str(tmp_path / "logits"), str(tmp_path / "again")]
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "logits"), pruned(ids).logits)
    assert (tmp_path / "again" / "modeling.py").exists()
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }


@torch.no_grad()
def test_outputs_and_attentions(saved, ids):
    masked, _, folder = saved
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    out = eager(ids, output_attentions=True, output_hidden_states=True)
    masked.set_attn_implementation("eager")
    expected = masked(ids, output_attentions=True, output_hidden_states=True)
    masked.set_attn_implementation("sdpa")
    for mine, theirs in ((out.attentions, expected.attentions), (out.hidden_states, expected.hidden_states)):
        assert len(mine) == len(theirs) > 0
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


GENERATION = {
    "greedy": {},
    "beam search": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("how", GENERATION.values(), ids=GENERATION)
def test_generate_as_the_masked_dense_model(saved, how):
    """Batched, left-padded."""
    masked, pruned, folder = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["the cat saw a house", "river"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    assert batch["attention_mask"].sum(1).unique().numel() == 2
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True, **how}
    outputs = []
    for model in (masked, pruned):
        torch.manual_seed(0)
        outputs.append(model.generate(**batch, **options))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_static_cache_has_each_layers_width(saved, ids):
    _, pruned, _ = saved
    cache = StaticCache(config=pruned.config, max_cache_len=16)
    logits = pruned(ids, **{CACHE: cache}).logits
    torch.testing.assert_close(logits, pruned(ids).logits, rtol=0, atol=1e-5)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [8, 16, 12]
    assert [layer.values.shape[-1] for layer in cache.layers] == [8, 16, 12]


def test_gradient_checkpointing_gives_the_same_gradients(saved, ids):
    _, _, folder = saved
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_compiled_forward(saved, ids):
    _, pruned, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, pruned(ids).logits, rtol=0, atol=1e-5)


def test_tensor_parallel_heads_are_refused(saved, ids):
    _, pruned, _ = saved
    attention = pruned.model.layers[0].self_attn
    cos = torch.ones(1, 10, 16)
    with pytest.raises(ValueError, match="tensor parallelism"):
        attention._rotate(torch.zeros(2, 3, 10, 8), torch.zeros(2, 1, 10, 8), cos, cos)
