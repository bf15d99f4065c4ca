"""`kvprune.generate` against a plain loop, whatever the checkpoint's generation_config.json says."""

import json
import shutil

import pytest
import torch
from tokenizers import normalizers

import kvprune
from kvprune import errors
from tiny import tiny_model, tiny_tokenizer

PROMPT = "the cat saw a green house near the old river and then"
OTHERS = [
    {"cache_implementation": "static"},
    {"cache_implementation": "hybrid"},
    {"cache_implementation": "quantized"},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 5, "temperature": 3.0},
    {"use_cache": False},
    {"max_length": 2},
    {"min_length": 1000, "min_new_tokens": 900},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 1},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"stop_strings": ["e"]},
    {"output_attentions": True},
    {"return_dict_in_generate": False},
    {"pad_token_id": 5000},
]


@pytest.fixture(scope="module")
def dense():
    """A model that does not say the same all the time."""
    model = tiny_model("llama", groups=2, layers=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def checkpoint(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lively")
    dense.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def folder_with(checkpoint, folder, **changes):
    shutil.copytree(checkpoint, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def greedy(model, new_tokens, ends=()):
    """The most likely token, one after the other, without a cache."""
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + new_tokens and int(ids[0, -1]) not in ends:
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("others", OTHERS, ids=str)
@pytest.mark.parametrize("skip", [None, 0.25])
def test_greedy_is_greedy(checkpoint, dense, tmp_path, others, skip):
    found = kvprune.generate(folder_with(checkpoint, tmp_path / "x", **others), PROMPT, max_new_tokens=8, skip=skip)
    prompt = len(tiny_tokenizer()(PROMPT)["input_ids"])
    if skip is None:
        expected = tiny_tokenizer().decode(greedy(dense, 8), skip_special_tokens=True)
        assert found["cache_bytes"] == (prompt + 7) * 4 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, width, float32
    else:
        with kvprune.TokenFilter(skip)(dense):
            ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
            answer = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        expected = tiny_tokenizer().decode(answer[0, prompt:], skip_special_tokens=True)
    assert (found["text"], found["new_tokens"], found["cache_tokens"]) == (expected, 8, prompt + 7)


def test_its_end_tokens_count(checkpoint, dense, tmp_path):
    end = greedy(dense, 8)[3]
    folder = folder_with(checkpoint, tmp_path / "x", eos_token_id=[2, end])
    assert kvprune.generate(folder, PROMPT, max_new_tokens=8)["new_tokens"] == len(greedy(dense, 8, {2, end})) == 4


def test_a_temperature_draws_from_what_the_config_leaves(checkpoint, dense, tmp_path):
    """Of the one token that top_k leaves, whatever the temperature."""
    folder = folder_with(checkpoint, tmp_path / "x", top_k=1)
    found = kvprune.generate(folder, PROMPT, max_new_tokens=8, temperature=5.0)["text"]
    assert found == tiny_tokenizer().decode(greedy(dense, 8), skip_special_tokens=True)
    drawn = {kvprune.generate(checkpoint, PROMPT, temperature=5.0, seed=n, max_new_tokens=8)["text"] for n in range(3)}
    assert len(drawn) == 3


@pytest.mark.parametrize("name", ["cache_implementation", "prompt_lookup_num_tokens"])
def test_a_users_generate_in_a_filter_says_so(name):
    model = tiny_model("llama", layers=4)
    ids = torch.randint(3, 300, (1, 20))
    value, error = {"cache_implementation": ("static", errors.CacheMismatch)}.get(name, (3, errors.FilterMisuse))
    setattr(model.generation_config, name, value)
    steps = {"max_new_tokens": 3, "do_sample": False}
    with kvprune.TokenFilter(0.25)(model) as f:
        with pytest.raises(error, match=name) as caught:
            model.generate(ids, **steps)
        assert "\n" not in str(caught.value)
        found = model.generate(ids, **{name: None}, **steps)
    assert f.report["kv_bytes_dense"] > 0
    setattr(model.generation_config, name, None)
    with kvprune.TokenFilter(0.25)(model):
        with pytest.raises(error, match=name):
            model.generate(ids, **{name: value}, **steps)
        assert torch.equal(found, model.generate(ids, **steps))


def test_a_prompt_of_no_tokens(checkpoint, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    shutil.copytree(checkpoint, tmp_path / "x")
    tokenizer.save_pretrained(tmp_path / "x")
    with pytest.raises(errors.BadOption, match="no tokens"):
        kvprune.generate(tmp_path / "x", "  ")
