"""config.json, the other files of a model's folder, GGUF files, texts and Alpaca files."""

import json

import gguf
import pytest
from fuzzing import fuzz
from mutations import damaged_bytes, damaged_json, damaged_lines
from test_fuzz_json import DEEP, but

import kvprune
from ggufs import write_gguf
from kvprune.models import gguf as headers
from kvprune.models.source import load_config, resolve, skeleton
from kvprune.models.tokenizer import load_tokenizer
from kvprune.recovery.data import read_data
from kvprune.text.corpus import read_file
from kvprune.text.given import find_text
from kvprune.text.windows import windows
from tiny import tiny_model


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_config(kind, copied, checkpoint, pruned_half):
    folder = copied({"dense": checkpoint, "pruned": pruned_half}[kind])
    valid = (folder / "config.json").read_bytes()
    plain = json.loads(valid)

    def check(content):
        (folder / "config.json").write_bytes(content)
        source = resolve(folder)
        load_config(source)
        skeleton(source)

    faults = [DEEP, b"[]", b"null", but(plain, "vocab_size", False), but(plain, "model_type", 5)]
    faults += [but(plain, "num_hidden_layers", 10**9), but(plain, "num_hidden_layers", 1e30), but(plain, "self", 1)]
    faults += [
        but(plain, "hidden_act", {}),
        but(plain, "hidden_act", "a"),
        but(plain, "dtype", "silu"),
        but(plain, "dtype", {}),
    ]
    faults += [
        but(plain, "num_key_value_heads", ""),
        but(plain, "head_dim", -(2**63)),
        but(plain, "rope_parameters", 3),
    ]
    faults += [but(plain, "architectures", 3), but(plain, "__class__", {}), but(plain, "per_layer_config", [1, 2])]
    fuzz(f"config.json, {kind}", check, valid, damaged_json(plain), faults)


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.mark.parametrize("name", [*FILES, "modeling.py"])
def test_loaded(name, copied, pruned_half):
    folder = copied(pruned_half)
    valid = (folder / name).read_bytes()

    def check(content):
        (folder / name).write_bytes(content)
        kvprune.load(folder)
        if "token" in name:
            kvprune.load_tokenizer(folder)

    plain = json.loads(valid) if name.endswith(".json") else {}
    faults = {
        "generation_config.json": [but(plain, "eos_token_id", {}), b"[1]", but(plain, "temperature", [1])],
        "config.json": [but(plain, "hidden_size", 2**40)],
    }.get(name, [])
    damaged = damaged_json(plain) if plain else damaged_bytes(valid)
    fuzz(f"{name}, load", check, valid, damaged, faults, share=10)


def test_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("llama", groups=2, head_dim=32, layers=1), path)
    valid = path.read_bytes()
    end = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)

    def check(content):
        path.write_bytes(content)
        headers._read.cache_clear()
        load_config(resolve(path))

    header = damaged_bytes(valid[:end]).map(lambda content: content + valid[end:])
    faults = [valid[:4], valid[:20], b"GGUF" + b"\xff" * 40, valid[:8] + b"\xff" * 8 + valid[16:]]
    for key in (b"block_count", b"head_count", b"key_length"):  # and 4 bytes that say the type
        at = valid.index(b"." + key) + len(key) + 5
        faults.append(valid[:at] + (2**31 - 1).to_bytes(4, "little") + valid[at + 4 :])
    fuzz("GGUF, header", check, valid, header, faults)
    fuzz("GGUF, whole", check, valid, damaged_bytes(valid), share=4)


def test_text(checkpoint, written_texts, tmp_path):
    path, tokenizer = tmp_path / "text.txt", load_tokenizer(resolve(checkpoint))
    valid = (written_texts / "ptb-test.txt").read_bytes()[:3000]

    def check(content):
        path.write_bytes(content)
        windows(read_file(path), tokenizer, 32, 64)

    fuzz("a text", check, valid, damaged_bytes(valid), ["💥".encode()[:2], b"\0" * 100, "\u2028".encode() * 5000])


EXAMPLES = [
    {"instruction": "say", "input": "a b" if i % 2 else "", "output": f"the words are here {i}"} for i in range(12)
]


@pytest.mark.parametrize("name", ["list.json", "lines.jsonl"])
def test_alpaca(name, checkpoint, tmp_path):
    path, tokenizer = tmp_path / name, load_tokenizer(resolve(checkpoint))

    def check(content):
        path.write_bytes(content)
        read_data(find_text(path, "recovery"), tokenizer, window=512, tokens=0, held_out=16, batch=2)

    is_list = name.endswith(".json")
    valid = json.dumps(EXAMPLES) if is_list else "".join(json.dumps(one) + "\n" for one in EXAMPLES)
    half = but(EXAMPLES, 0, "output", "\ud800")
    damaged = damaged_json(EXAMPLES) if is_list else damaged_lines(EXAMPLES)
    faults = [DEEP, half, but(EXAMPLES, 0, "input", 5), b"5", b"\n\n"]
    fuzz(f"Alpaca, {name}", check, valid.encode(), damaged, faults)
