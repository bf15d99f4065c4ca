"""A tiny pruned folder, made without `prune`, and settings that train it in a second."""

import pytest

from kvprune.channels.cut.surgery import cut
from kvprune.models.source import load_model, resolve
from kvprune.models.view import ModelView
from kvprune.runtime.checkpoint import save
from tiny import make_plan, random_layers, tiny_tokenizer


@pytest.fixture(scope="session")
def pruned(checkpoint, tmp_path_factory):
    """The tiny Llama of `checkpoint` with 12 to 24 of 32 channels per layer."""
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    dense = load_model(resolve(checkpoint), "cpu")
    plan = make_plan(dense, random_layers(dense, (16, 12, 16, 24)))
    record = {
        "source": str(checkpoint),
        "revision": None,
        "ratio": 0.5,
        "ratio_achieved": plan.ratio_achieved,
        "kv_bytes_per_token": {"dense": 2048, "pruned": 1088},
        "parameters": {"dense": 1, "pruned": 1},
        "widths": plan.widths,
        "head_dim": 32,
        "layout": "per-layer",
        "perplexity": [{"text": "wikitext2", "window": 32, "tokens": 496, "dense": 123.0, "pruned": 456.0}],
        "seconds": {"surgery": 1.0},
        "seed": 0,
    }
    save(cut(ModelView(dense), plan), tiny_tokenizer(), plan.to_json(), lambda: dict(record), folder)
    return folder


@pytest.fixture
def quick():
    return {
        "steps": 12,
        "window": 32,
        "batch": 4,
        "rank": 4,
        "lr": 5e-3,
        "warmup": 2,
        "checkpoint_every": 4,
        "held_out": 512,
        "eval_tokens": 512,
        "eval_windows": (32,),
        "device": "cpu",
    }
