"""What a family's models must have, and what is refused."""

import pytest

import kvprune
from kvprune.errors import UnsupportedArchitecture
from kvprune.models.family import dense_head_dim
from kvprune.models.view import ModelView
from tiny import tiny_model


def test_partial_rotary_embeddings_are_refused():
    model = tiny_model("llama")
    model.config.rope_parameters["partial_rotary_factor"] = 0.5
    for use in (ModelView, kvprune.TokenFilter(0.25)):
        with pytest.raises(UnsupportedArchitecture, match="partial rotary"):
            use(model)


def test_dense_head_dim_is_that_of_the_weights():
    model = tiny_model("qwen2")
    config, weight = model.config, model.model.layers[0].self_attn.q_proj.weight
    assert dense_head_dim(config) * config.num_attention_heads == weight.shape[0]
    config.head_dim = None  # where a config leaves it out, heads share the hidden size
    assert dense_head_dim(config) == config.hidden_size // config.num_attention_heads
