"""Whole blocks gone: the pruned model is the dense one whose list of blocks lacks them."""

import copy
import subprocess
import sys

import pytest
import torch
from every_family import OPTIONS, VOCABULARY, family_model, has_sdpa
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.recovery.trainee import checkpoint_activations
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE
from tiny import make_plan

ASKED = ["llama", "gemma3_text", "gpt2", "gpt_neox", "phi3", "olmo2", "qwen2_moe", "lfm2"]  # one of each mechanism
ASKED += ["qwen3_5_text"]
KNOWN = [name for name in OPTIONS if name in CONFIG_MAPPING]
# Norms amplify rounding; the dense model's own steps are 2e-5 from a prompt
TOLERANCE = {"gemma2": 2e-5, "gemma3_text": 2e-5, "gemma4_text": 2e-5, "qwen3_next": 4e-5}
DROPPED = [(0,), (1, 2), (3,)]
GENERATED = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def blocks_of(model):
    """The list of blocks, and the module that holds it; by hand, not by the descriptor."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module
    raise AssertionError("no list of blocks")


def shortened(dense, dropped):
    """A copy of the dense model, without these blocks. What remains is numbered anew, for its cache, and has the type
    of layer that it had."""
    model = copy.deepcopy(dense)
    stack, name, blocks = blocks_of(model)
    kept = [i for i in range(len(blocks)) if i not in dropped]
    setattr(stack, name, torch.nn.ModuleList(blocks[i] for i in kept))
    for number, block in enumerate(getattr(stack, name)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    return model


def numbers_of(name, dropped):
    """Which blocks the layers are, of those that have attention."""
    numbers = ModelView(family_model(name)).attention_layers
    return [numbers[layer] for layer in dropped]


def without_blocks(name, dropped, attention="sdpa"):
    """(the dense model without the blocks of these layers, the pruned one, which has all channels of the others)."""
    dense = family_model(name, attention)
    view = ModelView(dense)
    layers = []
    for i, shape in enumerate(view.shape.each):
        every, none = [list(range(shape.head_dim))] * shape.kv_heads, [[]] * shape.kv_heads
        layers.append((none, none, None, False) if i in dropped else (every, every))
    return shortened(dense, numbers_of(name, dropped)), cut(view, make_plan(dense, layers))


def prompts():
    return torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dropped", DROPPED, ids=str)
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_prefill_decode_padding_and_generate(name, dropped):
    reference, pruned = without_blocks(name, dropped, "sdpa" if has_sdpa(name) else "eager")

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE.get(name, 1e-5))

    ids = prompts()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected = reference(ids).logits
    assert (family_model(name)(ids).logits - expected).abs().max() > 1e-3
    close(pruned(ids).logits, expected)
    close(pruned(ids, **padded).logits[mask.bool()], reference(ids, **padded).logits[mask.bool()])
    for make in (DynamicCache, GrowingCache):
        cache = make(config=pruned.config)
        steps = [pruned(ids[:, :9], **{CACHE: cache}, use_cache=True).logits]
        steps += [pruned(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(9, 17)]
        close(torch.cat(steps, 1), expected)
        held = [layer for layer in cache.layers if hasattr(layer, "keys")]
        assert [layer.keys.nbytes == 0 for layer in held] == [layer in dropped for layer in range(4)]
    shown = pruned(ids, output_hidden_states=True).hidden_states
    assert len(shown) == pruned.config.num_hidden_layers + 1
    own = reference(ids, output_hidden_states=True).hidden_states
    if 3 not in dropped:
        gone = numbers_of(name, dropped)
        for mine, theirs in zip([h for i, h in enumerate(shown) if i - 1 not in gone], own, strict=True):
            close(mine, theirs)
    options = GENERATED | {"attention_mask": mask}
    assert pruned.generate(ids, **options).tolist() == reference.generate(ids, **options).tolist()


RUN_ALONE = """
import sys
sys.modules["kvprune"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    ids, mask = torch.load(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    torch.save((model(ids).logits, model.generate(ids, **options)), folder + "/found")
"""


@torch.no_grad()
def test_saved_and_loaded_with_kvprune_and_without(tmp_path):
    """Without: in a process where importing it fails."""
    made = {name: without_blocks(name, (0, 2)) for name in ASKED if name in KNOWN}
    ids, mask = prompts(), torch.ones(2, 17, dtype=torch.long)
    mask[1, :5] = 0
    torch.save((ids, mask), tmp_path / "ids")
    for name, (reference, pruned) in made.items():
        constant = 0.1 * torch.randn(pruned.config.hidden_size)
        _, _, blocks = blocks_of(pruned)
        first, third = numbers_of(name, (0, 2))
        (bias,) = [p for p in blocks[third].parameters() if p.numel()]
        bias.copy_(constant)
        pruned.save_pretrained(tmp_path / name)
        held = load_file(tmp_path / name / "model.safetensors")
        of_first = [key.partition(f".{first}.")[2] for key in held if f".{first}." in key and "experts" not in key]
        assert {key.partition(".")[2] for key in of_first} == {"o_proj.weight", "o_proj.bias"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(loaded(ids).logits, pruned(ids).logits, rtol=0, atol=1e-6)
        before = blocks_of(reference)[2][third - 2]
        hook = before.register_forward_hook(lambda _m, _a, out, c=constant: out + c)
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=0, atol=TOLERANCE.get(name, 1e-5))
        hook.remove()
    command = [sys.executable, "-c", RUN_ALONE, str(tmp_path / "ids"), *(str(tmp_path / name) for name in made)]
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    for name, (_, pruned) in made.items():
        logits, tokens = torch.load(tmp_path / name / "found")
        torch.testing.assert_close(logits, pruned(ids).logits, rtol=0, atol=1e-6)
        assert tokens.tolist() == pruned.generate(ids, **GENERATED, attention_mask=mask).tolist()


@torch.no_grad()
def test_late_admission():
    reference, pruned = without_blocks("llama", (0, 2))
    ids = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    options = GENERATED | {"attention_mask": torch.ones_like(ids)}
    answers = []
    for model in (reference, pruned):
        with kvprune.TokenFilter(keep=0.5, block=4, window=4)(model) as f:
            answers.append(model.generate(ids, **options).tolist())
            assert f.report["keep_achieved"] < 0.7
    assert answers[0] == answers[1]
    with kvprune.TokenFilter(keep=1.0, block=4, window=4)(pruned):
        assert pruned.generate(ids, **options).tolist() == pruned.generate(ids, **options).tolist()


def test_training_reaches_the_constant():
    """Under gradient checkpointing too."""
    _, pruned = without_blocks("llama", (1,))
    bias = pruned.model.layers[1].self_attn.o_proj.bias
    pruned.train()
    gradients = []
    for on in (False, True):
        if on:
            checkpoint_activations(pruned)
        pruned.zero_grad()
        pruned(prompts(), labels=prompts(), use_cache=False).loss.backward()
        gradients.append(bias.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-7)
