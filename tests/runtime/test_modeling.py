"""A saved folder loads three ways and runs as the dense model does."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime.checkpoint import save
from kvprune.runtime.modeling import CACHE, MANY
from tiny import (
    VOCABULARY,
    make_plan,
    mask_dense,
    merged_plan,
    project_dense,
    random_bases,
    random_layers,
    tiny_model,
    tiny_tokenizer,
)

FAMILIES = ["llama", "mistral", "qwen2"]


@dataclass
class Saved:
    """masked: the dense model that `pruned` equals; order: of its query heads, layer by layer, in the pruned one."""

    masked: torch.nn.Module
    pruned: torch.nn.Module
    folder: Path
    widths: list[int]
    order: list[list[int]]


@pytest.fixture(scope="module", params=[(family, merge) for merge in (1, 2) for family in FAMILIES], ids=str)
def saved(request, tmp_path_factory):
    """Two KV heads; or four, of which two and two became one, with absorbed and factored layers."""
    family, merge = request.param
    widths, groups = [8, 16, 12 if merge == 1 else 28], 3
    dense = tiny_model(family, kv_heads=2 * merge, groups=groups, layers=3, hidden=72)
    if merge == 1:
        layers = random_layers(dense, widths)
        plan, bases, masked, heads = make_plan(dense, layers), None, mask_dense(dense, layers), [[0, 1]] * 3
    else:
        bases = random_bases(dense, merge)
        plan = merged_plan(dense, bases, widths)
        masked, heads = project_dense(dense, plan, bases), [basis.heads.flatten().tolist() for basis in bases]
        assert any(order != sorted(order) for order in heads)
    pruned = cut(ModelView(dense), plan, bases)
    assert [layer.factored for layer in pruned.config.per_layer_config] == [False, False, merge == 2]
    folder = tmp_path_factory.mktemp(family) / "pruned"
    save(pruned, tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths}, folder)
    order = [[head * groups + i for head in layer for i in range(groups)] for layer in heads]
    return Saved(masked, pruned, folder, widths, order)


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 10))


@torch.no_grad()
def test_reload_is_exact_with_kvprune(saved, ids):
    pruned, folder = saved.pruned, saved.folder
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), kvprune.load(folder, device="cpu")):
        assert type(loaded) is type(pruned)
        assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base(ids).last_hidden_state, pruned.base_model(ids).last_hidden_state)


def test_reload_is_exact_without_kvprune(saved, ids, tmp_path):
    """In a process where importing kvprune fails."""
    pruned, folder = saved.pruned, saved.folder
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
    masked = saved.masked
    eager = AutoModelForCausalLM.from_pretrained(saved.folder, attn_implementation="eager")
    out = eager(ids, output_attentions=True, output_hidden_states=True)
    masked.set_attn_implementation("eager")
    expected = masked(ids, output_attentions=True, output_hidden_states=True)
    masked.set_attn_implementation("sdpa")
    attentions = [weights[:, order] for weights, order in zip(expected.attentions, saved.order, strict=True)]
    for mine, theirs in ((out.attentions, attentions), (out.hidden_states, expected.hidden_states)):
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
    tokenizer = AutoTokenizer.from_pretrained(saved.folder)
    batch = tokenizer(["the cat saw a house", "river"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    assert batch["attention_mask"].sum(1).unique().numel() == 2
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True, **how}
    outputs = []
    for model in (saved.masked, saved.pruned):
        torch.manual_seed(0)
        outputs.append(model.generate(**batch, **options))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_static_cache_has_each_layers_width(saved, ids):
    pruned = saved.pruned
    cache = StaticCache(config=pruned.config, max_cache_len=16)
    logits = pruned(ids, **{CACHE: cache}).logits
    torch.testing.assert_close(logits, pruned(ids).logits, rtol=0, atol=1e-5)
    assert [(layer.keys.shape[1], layer.keys.shape[-1]) for layer in cache.layers] == [(2, w) for w in saved.widths]
    assert [layer.values.shape for layer in cache.layers] == [layer.keys.shape for layer in cache.layers]


def test_gradient_checkpointing_gives_the_same_gradients(saved, ids):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(saved.folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_compiled_forward(saved, ids):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, saved.pruned(ids).logits, rtol=0, atol=1e-5)


HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
@torch.no_grad()
def test_other_heads(saved, ids, auto, tmp_path):
    """On the pruned model, with nothing but the head new; and again when that is saved."""
    masked = saved.masked
    model, info = auto.from_pretrained(saved.folder, output_loading_info=True)
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
    config, merged = saved.pruned.config, saved.widths[2] == 28
    assert (config.head_dim, getattr(config, "head_dim", None)) == (16, 16)
    assert [layer.head_dim for layer in config.per_layer_config] == saved.widths
    written = json.loads((saved.folder / "config.json").read_text())
    assert (written["head_dim"], written["dense_head_dim"]) == (16, 16)
    last = {"head_dim": 28, "factored": True} if merged else {"head_dim": 12}
    assert written["per_layer_config"] == {"0": {"head_dim": 8}, "2": last}
    assert (written["num_key_value_heads"], written.get("dense_kv_heads")) == (2, 4 if merged else None)
    assert config.dense().num_key_value_heads == (4 if merged else 2)
    dense = tiny_model("llama")
    uniform = cut(ModelView(dense), make_plan(dense, random_layers(dense, (8, 8)))).config
    assert (uniform.head_dim, uniform.dense().head_dim, uniform.to_dict()["head_dim"]) == (8, 16, 16)


@pytest.mark.parametrize("widths", [(16, 16), (28, 28)], ids=["the dense head_dim", "factored"])
@torch.no_grad()
def test_merged_heads_of_one_width(widths, ids, tmp_path):
    """All layers alike, so that the config has no layer of its own to tell of."""
    dense = tiny_model("llama", kv_heads=4, groups=2)
    bases = random_bases(dense, 2)
    plan = merged_plan(dense, bases, widths)
    pruned = cut(ModelView(dense), plan, bases)
    save(pruned, tiny_tokenizer(), plan.to_json(), lambda: {"widths": plan.widths}, tmp_path)
    loaded = kvprune.load(tmp_path, device="cpu")
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    torch.testing.assert_close(loaded(ids).logits, project_dense(dense, plan, bases)(ids).logits, rtol=0, atol=1e-5)
    assert [block.self_attn.q_mix is not None for block in loaded.model.layers] == [widths[0] == 28] * 2
    assert loaded.config.head_dim == widths[0]
    assert torch.isfinite(AutoModelForCausalLM.from_config(loaded.config)(ids).logits).all()  # without weights


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_of_one_width(family, merge):
    dense = tiny_model(family, kv_heads=2 * merge, groups=2, hidden=48)
    if merge == 1:
        layers = random_layers(dense, (8, 8))
        pruned, masked = cut(ModelView(dense), make_plan(dense, layers)), mask_dense(dense, layers)
    else:
        bases = random_bases(dense, merge)
        plan = merged_plan(dense, bases, (24, 24))
        pruned, masked = cut(ModelView(dense), plan, bases), project_dense(dense, plan, bases)
        assert pruned.model.layers[0].self_attn.q_mix is not None
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    expected = [masked.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, len(p) :] for p in prompts]
    found = pruned.generate_batch(prompts, **BATCHING)
    assert [output.generated_tokens for output in found.values()] == [tokens.tolist() for tokens in expected]


def test_continuous_batching_of_mixed_widths_is_refused(saved):
    with pytest.raises(ValueError, match="--layout uniform"):
        saved.pruned.generate_batch([[5, 6, 7]], **BATCHING)


def test_an_engine_with_one_head_dim_for_all_layers_is_refused(saved, ids, monkeypatch):
    for width, refused in ((8, False), (16, True)):
        engine = {0: SimpleNamespace(head_size=width)}
        with pytest.raises(ValueError, match="update vLLM") if refused else nullcontext():
            saved.pruned(ids, attention_instances=engine)
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match="update vLLM") if refused else nullcontext(),
        ):
            patch.setattr(saved.pruned.model.layers[0].self_attn, "attn", engine[0], raising=False)
            saved.pruned(ids)


@pytest.mark.parametrize("how", ["handed over", "a part of the layer", "none"])
def test_an_engine_is_given_keys_of_the_kept_width_however_long_the_prompt(how, monkeypatch):
    dense = tiny_model("llama", kv_heads=4, groups=2, layers=1)
    bases = random_bases(dense, 2)
    pruned = cut(ModelView(dense), merged_plan(dense, bases, (28,)), bases)
    layer, seen = pruned.model.layers[0].self_attn, []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def looking(module, query, key, *more, **kwargs):
        seen.append((module, key.shape[1], key.shape[3]))
        return attend(module, query, key, *more, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", looking)
    engine = SimpleNamespace(head_size=28)
    told = {"attention_instances": {0: engine}} if how == "handed over" else {}
    if how == "a part of the layer":
        layer.attn = engine
    pruned(torch.randint(3, VOCABULARY, (1, MANY)), use_cache=False, **told)
    assert seen == [(layer.dense_heads, 4, 16) if how == "none" else (layer, 2, 28)]


def test_an_engine_that_splits_heads_and_does_not_say_so_is_refused(saved, ids, monkeypatch):
    keys = saved.pruned.model.layers[0].self_attn.k_proj
    monkeypatch.setattr(keys, "forward", lambda hidden: nn.functional.linear(hidden, keys.weight.chunk(2)[0]))
    with pytest.raises(ValueError, match="tensor parallelism"):
        saved.pruned(ids)
