"""Attention split among tensor-parallel ranks: what they give together is what the whole layer gives."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from kvprune.channels.cut.surgery import cut
from kvprune.models.view import ModelView
from kvprune.runtime.checkpoint import save
from kvprune.runtime.modeling import MANY, PrunedAttention, split_plan
from kvprune.runtime.twin import twin_config
from tiny import make_plan, merged_plan, random_bases, random_layers, tiny_model, tiny_tokenizer

HEADS, HEAD_DIM, HIDDEN = 8, 16, 24
WORDS = {"llama": {}, "qwen3": {"norm_of": "head"}, "olmo2": {"norm_of": "all"}}
WORDS["qwen3_5_text"] = {"norm_of": "head", "gated": True}
GATED = {
    "attention_bias": False,
    "layer_types": ["full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}


class Share(nn.Module):
    """A rank's part of a linear layer, as vLLM's classes have it."""

    def __init__(self, whole: nn.Linear, style: str | None, rank: int, ranks: int):
        super().__init__()
        self.whole, self.style, self.tp_rank, self.tp_size = whole, style, rank, ranks

    def forward(self, x):
        if self.style == "rowwise":
            columns = self.whole.weight.chunk(self.tp_size, 1)[self.tp_rank]
            return nn.functional.linear(x, columns, self.whole.bias if self.tp_rank == 0 else None)
        found = self.whole(x)
        return found.chunk(self.tp_size, -1)[self.tp_rank] if self.style == "colwise" else found


def made(family, kv_heads, merge, width, factored):
    """A base model with one pruned layer and random weights."""
    dense = AutoConfig.for_model(
        family,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=16,
        pad_token_id=0,
        **GATED if family == "qwen3_5_text" else {"attention_bias": True},
    )
    dense._attn_implementation = "sdpa"
    config = twin_config(dense, HEAD_DIM, [width], merge, [factored], kv_heads=kv_heads, words=WORDS[family])
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    attention = model.layers[0].self_attn
    assert isinstance(attention, PrunedAttention)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    half = HEAD_DIM // 2
    pairs = torch.randint(half, attention.rope_index[:, : width // 2].shape)
    attention.rope_index.copy_(torch.cat((pairs, pairs + half), dim=1))
    return model


def split(attention, rank, ranks, monkeypatch):
    """The layer as a rank of vLLM's has it."""
    engine = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: ranks)
    monkeypatch.setitem(sys.modules, "vllm.distributed", engine)
    config = deepcopy(attention.config)
    config._attn_implementation = "vllm"
    plan = split_plan(config, attention.words)
    own = deepcopy(attention)
    gate = ("gate_proj",) if own.gate_proj is not None else ()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", *gate):
        setattr(own, name, Share(getattr(own, name), plan.get(name), rank, ranks))
    own.num_key_value_groups = HEADS // ranks // max(config.num_key_value_heads // ranks, 1)  # as engines count
    return own


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("kv_heads", "merge"), [(2, 1), (4, 1), (8, 2), (4, 4)])
@pytest.mark.parametrize("family", WORDS)
@torch.no_grad()
def test_the_ranks_give_what_the_whole_layer_gives(family, kv_heads, merge, factored, ranks, monkeypatch):
    model = made(family, kv_heads, merge, 24, factored)
    attention = model.layers[0].self_attn
    hidden = torch.randn(2, 7, HIDDEN)
    turns = model.rotary_emb(hidden, torch.arange(7)[None])
    expected = attention(hidden, turns)[0]
    parts = [split(attention, rank, ranks, monkeypatch)(hidden, turns)[0] for rank in range(ranks)]
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(parts[0] * ranks, expected, atol=1e-2)  # each has something of its own


@pytest.mark.parametrize("ranks", [2, 4])
@torch.no_grad()
def test_many_tokens_at_the_dense_width(ranks, monkeypatch):
    model = made("llama", 8, 2, 24, True)
    model.config.rebuilds = True
    attention = PrunedAttention(model.layers[0].self_attn, model.config, 24, True)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(1, MANY, HIDDEN)
    turns = model.rotary_emb(hidden, torch.arange(MANY)[None])
    assert attention.dense_heads is not None
    expected = attention(hidden, turns)[0]
    parts = [split(attention, rank, ranks, monkeypatch)(hidden, turns)[0] for rank in range(ranks)]
    torch.testing.assert_close(sum(parts), expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_split_is_refused(monkeypatch):
    attention = made("llama", 4, 1, 8, False).layers[0].self_attn
    with pytest.raises(ValueError, match="4 KV heads cannot be split among 3"):
        split(attention, 0, 3, monkeypatch)


@pytest.mark.parametrize(("family", "merge"), [("qwen2", 1), ("qwen2", 2)])
def test_the_plan_of_transformers(family, merge, tmp_path):
    """Two processes of torchrun on this CPU."""
    pytest.importorskip("transformers.distributed.parallel_utils", reason="the DTensor plans of newer transformers")
    dense = tiny_model(family, kv_heads=2 * merge, groups=2, layers=2, hidden=64)
    if merge == 1:
        plan, bases = make_plan(dense, random_layers(dense, [8, 16])), None
    else:
        bases = random_bases(dense, merge)
        plan = merged_plan(dense, bases, [12, 28])
    save(cut(ModelView(dense), plan, bases), tiny_tokenizer(), plan.to_json(), dict, tmp_path / "pruned")
    script = Path(__file__).with_name("two_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    subprocess.run([*launch, tmp_path / "pruned"], check=True, timeout=240)
