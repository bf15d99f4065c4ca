"""A saved folder loads three ways and runs as the dense model does."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
)

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
options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
model.save_pretrained(sys.argv[4])
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
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


BATCHING = {
    "generation_config": GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0),
    "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32),
    "warmup": False,
}
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


HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
@torch.no_grad()
def test_other_heads(saved, ids, auto, tmp_path):
    """On the pruned model, with nothing but the head new; and again when that is saved."""
    masked, _, folder = saved
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert all(key.startswith(("score.", "qa_outputs.")) for key in info["missing_keys"])
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    dense = auto.from_config(masked.config).eval()
    dense.base_model.load_state_dict(masked.base_model.state_dict())
    (head,) = {key.split(".")[0] for key in info["missing_keys"]}
    getattr(dense, head).load_state_dict(getattr(model, head).state_dict())
    for mine in (model, again):
        for name, expected in dense(ids, return_dict=True).items():
            if "logits" in name:
                torch.testing.assert_close(mine(ids)[name], expected, rtol=0, atol=1e-5)
    assert auto.__name__ in json.loads((tmp_path / "config.json").read_text())["auto_map"]


@torch.no_grad()
def test_config_head_dim(saved):
    """The dense one where layers differ, the one where they do not; nothing raises."""
    _, pruned, folder = saved
    assert (pruned.config.head_dim, getattr(pruned.config, "head_dim", None)) == (16, 16)
    assert [layer.head_dim for layer in pruned.config.per_layer_config] == [8, 16, 12]
    written = json.loads((folder / "config.json").read_text())
    assert (written["head_dim"], written["dense_head_dim"]) == (16, 16)
    assert written["per_layer_config"] == {"0": {"head_dim": 8}, "2": {"head_dim": 12}}
    dense = tiny_model("llama")
    uniform = cut(ModelView(dense), make_plan(dense, random_layers(dense, (8, 8)))).config
    assert (uniform.head_dim, uniform.dense().head_dim, uniform.to_dict()["head_dim"]) == (8, 16, 16)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_continuous_batching_of_one_width(family):
    dense = tiny_model(family, groups=2)
    layers = random_layers(dense, (8, 8))
    pruned, masked = cut(ModelView(dense), make_plan(dense, layers)), mask_dense(dense, layers)
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    expected = [masked.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, len(p) :] for p in prompts]
    found = pruned.generate_batch(prompts, **BATCHING)
    assert [output.generated_tokens for output in found.values()] == [tokens.tolist() for tokens in expected]


def test_continuous_batching_of_mixed_widths_is_refused(saved):
    with pytest.raises(ValueError, match="--layout uniform"):
        saved[1].generate_batch([[5, 6, 7]], **BATCHING)


def test_an_engine_with_one_head_dim_for_all_layers_is_refused(saved, ids):
    _, pruned, _ = saved
    for width, refused in ((8, False), (16, True)):
        engine = {0: SimpleNamespace(head_size=width)}
        with pytest.raises(ValueError, match="update vLLM") if refused else nullcontext():
            pruned(ids, attention_instances=engine)


def test_tensor_parallel_heads_are_refused(saved, ids):
    _, pruned, _ = saved
    attention = pruned.model.layers[0].self_attn
    cos = torch.ones(1, 10, 16)
    with pytest.raises(ValueError, match="tensor parallelism"):
        attention._rotate(torch.zeros(2, 3, 10, 8), torch.zeros(2, 1, 10, 8), cos, cos)
