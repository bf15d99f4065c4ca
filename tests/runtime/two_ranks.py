"""One of several processes that torchrun starts: a folder split by transformers' own plan, against the whole of it."""

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import kvprune  # noqa: F401

folder = sys.argv[1]
two = DistributedConfig(tp_size=2)
split = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=two)
whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = torch.arange(3, 40)[None]
how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
with torch.no_grad():
    torch.testing.assert_close(split(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(split.generate(ids, **how), whole.generate(ids, **how))
own = split.model.layers[0].self_attn.q_proj.weight.to_local()
assert 2 * len(own) == len(whole.model.layers[0].self_attn.q_proj.weight)
