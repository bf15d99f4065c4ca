"""`generate --chat` against transformers: its template, its generate."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune import errors
from tiny import tiny_model, tiny_tokenizer

PROMPT = "the cat saw a green house"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that does not say the same all the time, whose end token is not that of its template's turns."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama", groups=2, layers=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


def answer(folder, messages, **options):
    """By transformers alone: (ids of the prompt, new ids)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    found = model.generate(**inputs, do_sample=False, pad_token_id=0, **options)[0]
    size = inputs["input_ids"].shape[1]
    return found[:size].tolist(), found[size:].tolist()


def user(system=None):
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, {"role": "user", "content": PROMPT}]


@pytest.mark.parametrize("system", [None, "a small dog"])
def test_it_is_what_transformers_answers(folder, system):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked, new = answer(folder, user(system), max_new_tokens=12)
    found = kvprune.generate(folder, PROMPT, chat=True, system=system, max_new_tokens=12)
    assert found["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert (found["prompt"], found["new_tokens"]) == (PROMPT, len(new))
    assert found["cache_tokens"] == len(asked) + len(new) - 1  # the start token is there once
    assert asked.count(tokenizer.bos_token_id) == 1
    plain = kvprune.generate(folder, PROMPT, max_new_tokens=12)
    assert plain["text"] != found["text"]


def test_the_token_that_ends_a_turn_ends_the_answer(folder, tmp_path):
    """Beside those of generation_config.json, where it need not be."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    _, new = answer(folder, user(), max_new_tokens=12)
    end, fourth = tokenizer.convert_tokens_to_ids("<|end|>"), new[3]
    assert fourth not in new[:3]
    weight = model.lm_head.weight.data  # the model says <|end|> where it said its fourth token
    weight[[end, fourth]] = weight[[fourth, end]]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != end
    _, longer = answer(tmp_path, user(), max_new_tokens=12)
    _, wanted = answer(tmp_path, user(), max_new_tokens=12, eos_token_id=[2, end])
    found = kvprune.generate(tmp_path, PROMPT, chat=True, max_new_tokens=12)
    assert end in longer
    assert found["new_tokens"] == len(wanted) < len(longer) == 12
    assert found["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert "<|end|>" not in found["text"]
    plain = kvprune.generate(tmp_path, PROMPT, max_new_tokens=12)
    assert plain["new_tokens"] == 12


def test_under_a_token_filter(folder):
    found = kvprune.generate(folder, PROMPT, chat=True, max_new_tokens=40, skip=0.2)
    assert found["filter"]["ratio_asked"] == 0.2


def test_the_command(folder, checkpoint, command):
    words = ("generate", folder, PROMPT, "--chat", "--system", "a small dog", "--max-new-tokens", 12)
    found = kvprune.generate(folder, PROMPT, chat=True, system="a small dog", max_new_tokens=12)
    code, out, _ = command(*words)
    assert (code, out) == (0, found["text"] + "\n")
    assert json.loads(command(*words, "--json")[1])["text"] == found["text"]
    for wrong, message in {
        ("generate", checkpoint, PROMPT, "--chat"): "the tokenizer has no chat template; leave out --chat",
        ("generate", folder, PROMPT, "--system", "x"): "--system needs --chat",
        ("generate", folder, "", "--chat"): "the prompt is empty",
    }.items():
        code, out, err = command(*wrong)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]


def test_a_template_without_a_systems_turn(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(errors.BadOption, match="refuses the conversation: System role not supported"):
        kvprune.generate(tmp_path, PROMPT, chat=True, system="x")
    assert kvprune.generate(tmp_path, PROMPT, chat=True, max_new_tokens=4)["new_tokens"] == 4
