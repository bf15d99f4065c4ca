"""Adapters of `recover` in every kind of family: where they sit, and that what is merged is a folder that loads."""

import pytest
import torch
from every_family import HEADS, OPTIONS, VOCABULARY, D, family_model, type_of
from peft.tuners.lora import LoraLayer
from test_every_family import without_channels
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.recovery.recover import merge
from kvprune.recovery.settings import Settings
from kvprune.recovery.trainee import ADAPTER, add_adapters
from tiny import COARSE, make_plan, tiny_tokenizer

KNOWN = [name for name in OPTIONS if type_of(name) in CONFIG_MAPPING]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {  # what has an adapter beside attention; None: nothing
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "phi3": {"gate_up_proj", "down_proj"},
    "gpt2": {"c_fc", "c_proj"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"fc1", "fc2"},
    "qwen3": {"gate_proj", "up_proj", "down_proj"},
    "lfm2": {"in_proj", "out_proj", "w1", "w2", "w3"},  # of convolutions too
    "qwen3_5_text": {
        *("gate_proj", "up_proj", "down_proj"),
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),  # of linear attention too
    },
    "qwen3_moe": set(),
    "qwen2_moe": {"gate_proj", "up_proj", "down_proj"},  # of the shared expert
    "phimoe": set(),
    "hunyuan_v1_moe": {"gate_proj", "up_proj", "down_proj"},
    "gemma4_text:experts": {"gate_proj", "up_proj", "down_proj"},  # of the MLP beside them
    "gemma4_text:shared": {"gate_proj", "up_proj", "down_proj", "per_layer_input_gate", "per_layer_projection"},
}


def with_adapters(lm):
    """The peft model, and the adapters' tensors by name, none of them zero."""
    peft_model = add_adapters(lm, Settings(folder="x", rank=4))
    for name, parameter in lm.named_parameters():
        if ADAPTER in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model, {f"lm.{n}": p.detach().clone() for n, p in lm.named_parameters() if ADAPTER in n}


@pytest.mark.parametrize("name", [name for name in MLP if name in KNOWN])
@torch.no_grad()
def test_adapters_sit_on_what_the_family_has(name, recwarn):
    lm = without_channels(family_model(name))[1]
    ids = torch.randint(3, VOCABULARY, (2, 11))
    before = lm(ids).logits
    peft_model, adapters = with_adapters(lm)
    holders = {path.rpartition(".")[2] for path, m in lm.named_modules() if isinstance(m, LoraLayer)}
    assert holders == ATTENTION | MLP[name]
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    trained = lm(ids).logits
    assert (trained - before).abs().max() > 1e-2
    merged = merge(peft_model, lm, adapters)
    torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=1e-4)
    assert not [path for path, _ in merged.named_parameters() if ADAPTER in path]


@torch.no_grad()
def test_a_layer_without_attention_has_adapters_in_its_mlp_only():
    model = family_model("gpt2")
    every, none = [list(range(D))] * HEADS, [[]] * HEADS
    lm = cut(ModelView(model), make_plan(model, [(kept, kept) for kept in (every, none, every, every)]))
    add_adapters(lm, Settings(folder="x", rank=4))
    holders = [path.split(".")[2:] for path, m in lm.named_modules() if isinstance(m, LoraLayer)]
    assert [path for number, *path in holders if number == "1"] == [["mlp", "c_fc"], ["mlp", "c_proj"]]
    assert len([1 for number, *_ in holders if number == "0"]) == 6


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "qwen3_moe", "gemma4_text:shared", "lfm2"])
def test_recover_from_folder_to_folder(name, texts, tmp_path):
    source, pruned, out = tmp_path / "dense", tmp_path / "pruned", tmp_path / "out"
    family_model(name).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    kvprune.prune(source, pruned, ratio=0.5, **COARSE)
    few = {"window": 32, "batch": 4, "rank": 4, "held_out": 512, "eval_tokens": 512, "eval_windows": (32,)}
    result = kvprune.recover(
        pruned, out, loss="next-token", steps=12, lr=5e-3, warmup=2, checkpoint_every=4, device="cpu", **few
    )
    (row,) = result.record["perplexity"]
    assert row["pruned"] < row["before"]
    loaded, ids = kvprune.load(out), torch.randint(3, VOCABULARY, (1, 11))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=0, atol=1e-5)
    matrices = [m for _, m in loaded.named_modules() if isinstance(m, Conv1D)]
    assert bool(matrices) == (name == "gpt2")
