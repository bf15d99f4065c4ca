"""What a family's models must have, and what is refused."""

import pytest
from every_family import family_model

import kvprune
from kvprune.errors import UnsupportedArchitecture
from kvprune.models.family import FAMILIES, dense_head_dim, family_of
from kvprune.models.view import ModelView
from tiny import tiny_model

NUMBERS = {"clip_qkv": 1.0}  # options that are no bools


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


@pytest.mark.parametrize(("name", "message"), [
    ("qwen33", "the nearest that is: qwen3"),
    ("deepseek_v3", "it caches one latent for all heads"),
    ("mamba2", "it has no KV cache"),
    ("gemma3n_text", "its last layers attend to keys and values of others"),
    ("jamba", "not all of its layers have attention"),
    ("mllama", "keys and values of an image"),
    ("falcon", "its attention has no interface"),
    ("xyz", "supported are: apertus"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_with_its_reason(name, message):
    with pytest.raises(UnsupportedArchitecture, match=f"'{name}' is not supported; .*{message}"):
        family_of(name)


@pytest.mark.parametrize(("name", "option"), [(f.model_type, o) for f in FAMILIES.values() for o in f.unless])
def test_an_option_that_is_not_built_is_refused(name, option):
    model = family_model(name)
    setting, _, value = option.partition("=")
    setattr(model.config, setting, value or NUMBERS.get(setting, True))
    with pytest.raises(UnsupportedArchitecture, match=f"{name} with {option} is not supported"):
        ModelView(model)
