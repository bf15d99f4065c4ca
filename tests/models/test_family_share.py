"""What `eval --keep` says of a model with sliding windows, which are left alone."""

import pytest
import torch
from every_family import LAYERS, family_model

import kvprune
from kvprune.measure.evaluate import _share, bytes_per_token


@pytest.mark.parametrize("window", [5, 40])
@torch.no_grad()
def test_a_window_is_kept_whole(window):
    """Gemma 3: layers that slide hold five tokens, the others half of theirs."""
    model = family_model("gemma3_text")
    sliding = model.config.layer_types.count("sliding_attention")
    token_filter = kvprune.TokenFilter(keep=0.5, block=4, window=4)
    per_token = bytes_per_token(model, window=window, token_filter=token_filter)
    with token_filter(model):
        model(torch.zeros(1, window, dtype=torch.long), use_cache=True)
    kept = token_filter.report["kv_bytes"]
    in_windows, full = sliding * min(window, 5), (LAYERS - sliding) * window
    share = _share(model, 0.5, per_token, window)
    assert share == pytest.approx(kept / (2 * 2 * 16 * 4 * (in_windows + full)), rel=0.01)
    assert 0 < sliding < LAYERS
    assert 0.5 < share <= 1
    assert _share(family_model("llama"), 0.5, per_token, window) == 0.5
