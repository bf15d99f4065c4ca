"""llama.cpp serves exported folders: its log-probabilities, greedy text and tokens are those of transformers.

llama.cpp lies in an environment of its own, whose Python KVPRUNE_TEST_LLAMA names.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvprune
from ggufs import CONVERTED, converted
from kvprune.runtime.checkpoint import save

STOCK = Path(os.environ.get("KVPRUNE_TEST_STOCK", "missing"))
TINY = Path(os.environ.get("KVPRUNE_TEST_TINY", "missing"))
TEXTS = [
    "The Eiffel Tower is a famous landmark in",
    "In 1969, humans didn't yet know  that 3,141,592 isn't\n\n a prime; it's\teven. Ünïcode (naïve) 你好 ",
    "Water boils at a temperature of 100 degrees, and ice melts at",
]
LIKELIEST = 500


def ask(file, work, prompts, texts=(), kv="F32", top=LIKELIEST, new_tokens=24, forced=None):
    how = {"new_tokens": new_tokens, "top": top, "kv": kv, "forced": forced}
    asked = {"prompts": prompts, "texts": list(texts), **how}
    (work / "asked.json").write_text(json.dumps(asked))
    script, python = Path(__file__).with_name("llama.py"), os.environ["KVPRUNE_TEST_LLAMA"]
    subprocess.run([python, script, file, work / "asked.json", work / "answers.json"], check=True)
    return json.loads((work / "answers.json").read_text())


@torch.no_grad()
def compared(model, prompts, answers):
    """Mean KL divergence of llama.cpp's distributions from transformers', in nats, of the likeliest tokens and all
    others as one; the largest difference of their log-probabilities; how much likelier the best token was than the one
    that llama.cpp chose, at most."""
    divergences, differences, gaps = [], [], []
    for prompt, steps in zip(prompts, answers["steps"], strict=True):
        new = [max(step, key=step.get) for step in steps]
        ids = torch.tensor(prompt + [int(token) for token in new])
        table = model(ids[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        for own, step in zip(table, steps, strict=True):
            there = own[[int(token) for token in step]]
            theirs = torch.tensor(list(step.values()), dtype=torch.float64)
            rest, other = ((1 - one.exp().sum()).clamp(min=1e-12) for one in (there, theirs))
            divergences.append((there.exp() * (there - theirs)).sum() + rest * (rest / other).log())
            differences.append((there - theirs).abs().max())
            gaps.append(own.max() - own[int(max(step, key=step.get))])
    return (float(torch.stack(divergences).mean()), float(max(differences)), float(max(gaps)))


@pytest.mark.parametrize(("type", "kv", "most"), [("f32", "F32", 1e-4), ("f16", "F16", 1e-4), ("f16", "Q8_0", 1e-2)])
def test_smollm2_of_the_stock_layout(type, kv, most, tmp_path):
    kvprune.export(STOCK, gguf=tmp_path / "m.gguf", type=type)
    tokenizer = kvprune.load_tokenizer(STOCK)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    # Behind each beginning of a text: llama.cpp says nothing of the parts of a character that a model may write
    prompts = [ids[:end] for ids in texts for end in range(2, len(ids) + 1)]
    one = {"new_tokens": 1, "forced": tokenizer.convert_tokens_to_ids("a")}
    answers = ask(tmp_path / "m.gguf", tmp_path, prompts, TEXTS, kv, **one)
    assert answers["tokens"] == texts
    model = AutoModelForCausalLM.from_pretrained(STOCK, dtype=torch.float32)
    divergence, _, gap = compared(model, prompts, answers)
    print(f"\nSmolLM2, {type}, KV {kv}: KL {divergence:.2e}, greedy tokens at most {gap:.2e} less likely")
    assert abs(divergence) < most
    assert gap < (0.02 if kv != "Q8_0" else 0.3)


@pytest.mark.parametrize("name", ["portable-yarn", "stock-llama3", "deci"])
def test_tiny_models_are_exact(name, tmp_path):
    """Biases, YaRN's scale, other frequencies, layers without attention: whatever the folder needs is in the file."""
    kvprune.export(TINY / name, gguf=tmp_path / "m.gguf", type="f32")
    tokenizer = kvprune.load_tokenizer(TINY / name)
    text = "the cat saw the old house near the river and then a small green dog"
    ids = tokenizer(text)["input_ids"]
    prompts = [ids[:end] for end in range(2, len(ids))]
    model = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)
    one = {"top": model.config.vocab_size, "new_tokens": 1, "forced": tokenizer.convert_tokens_to_ids("a")}
    answers = ask(tmp_path / "m.gguf", tmp_path, prompts, [text], **one)
    assert answers["tokens"] == [ids]
    divergence, difference, gap = compared(model, prompts, answers)
    print(f"\n{name}: log-probabilities differ by {difference:.1e} at most, KL {divergence:.1e}")
    assert difference < 1e-2  # llama.cpp rounds on its way: 3e-3 of a dense model of these sizes
    assert divergence < 1e-5
    assert gap < 1e-2


def sentencepiece(texts, first):
    """A BPE as Llama 2's and Mistral's: bytes for what it does not know, joined by the order of its tokens."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    known = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    vocabulary = {piece: i for i, piece in enumerate(known)}
    splits = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    merges = [pair for pair in splits if set(pair) <= set(pieces)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if first == "Metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if first else replace
    single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = single
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("first", ["Metaspace", "Prepend", ""])
def test_the_tokens_of_a_sentencepiece_bpe(first, tmp_path):
    text = (Path(os.environ["KVPRUNE_DATA"]) / "wiki-test.txt").read_text()
    tokenizer = sentencepiece([text[:200_000]], first)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 5, num_key_value_heads=1, **sizes))
    record = {"source": "tiny", "layout": "stock"}
    save(model, tokenizer, "{}", lambda: record, tmp_path / "stock")
    found = kvprune.export(tmp_path / "stock", gguf=tmp_path / "m.gguf")
    texts = [*TEXTS, "  two  before", "aaaaaaa  bbb", *(text[i : i + 400] for i in range(200_000, 240_000, 2_000))]
    if first == "Metaspace":
        assert "begins with a space" in found["differences"][0]
        texts = [text.lstrip(" ") for text in texts]
    else:
        assert found["differences"] == []
    answers = ask(tmp_path / "m.gguf", tmp_path, [], texts)
    assert answers["tokens"] == [tokenizer(text)["input_ids"] for text in texts]


def letters(writer):
    """A vocabulary of pairs of letters, of which llama.cpp tells every probability."""
    pairs = [first + second for first in "abcdefghijklmnopqrst" for second in "abcdefghijklmnopqrst"]
    del writer.kv_data[0]["tokenizer.ggml.tokens"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *pairs[:297]])
    writer.add_token_types([3] * 3 + [1] * 297)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.parametrize("kind", CONVERTED)
def test_what_is_read_from_a_file_is_what_llama_cpp_reads(kind, tmp_path):
    """Caps, scales, bases, shares of a head that turn: where a file says them, and where it does not."""
    family, options, more = CONVERTED[kind]
    _, path = converted(family, options, lambda writer: (more(writer), letters(writer)), tmp_path)
    drawn = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 300, (length,), generator=drawn).tolist() for length in (5, 20, 40, 50)]
    answers = ask(path, tmp_path, prompts, new_tokens=1, forced=50)
    divergence, _, gap = compared(kvprune.load(path, dtype="float32"), prompts, answers)
    print(f"\n{family}, {kind}: KL {divergence:.1e}")
    assert abs(divergence) < 1e-4
    assert gap < 0.02
