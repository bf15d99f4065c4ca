"""The error of the output anchor against a loop over tokens."""

import pytest
import torch

from kvprune.tokens.layers import anchor_errors
from kvprune.tokens.settings import Settings
from tiny import VOCABULARY, tiny_model


def hooks_of(model):
    return [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_anchor_errors_are_the_loop(family):
    model = tiny_model(family, kv_heads=2, groups=2, layers=3)
    ids = torch.randint(3, VOCABULARY, (2, 80), generator=torch.Generator().manual_seed(0))
    outputs = []
    handles = [
        layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        streams = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    settings = Settings(warmup=20, block=8, output_gamma=0.6)  # the first 24 tokens are left out
    hooks = hooks_of(model)
    found = anchor_errors(model, ids, settings)
    assert len(found) == 3
    for layer, error in enumerate(found):
        shares = []
        for b in range(2):
            anchor = outputs[layer][b, 0]
            for t in range(80):
                o, x = outputs[layer][b, t], streams[layer][b, t]
                if t >= 24:
                    shares.append(float(((o - anchor) ** 2).sum() / ((x + o) ** 2).sum()))
                anchor = 0.6 * anchor + 0.4 * o
        assert error == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    assert hooks_of(model) == hooks
