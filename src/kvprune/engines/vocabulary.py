"""A folder's tokenizer as llama.cpp reads it, or a refusal: it must make the same tokens of every text.

llama.cpp knows how byte-level BPE splits a text into words by name only; here the name is found by what tokenizer.json
says, never guessed. Their regular expressions are those of llama.cpp's src/llama-vocab.cpp.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvprune.errors import UnsupportedArchitecture

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name -> (how words are split, whether a word that is a token is not merged, normalizers)
SPLITS: dict[str, tuple[tuple[str, ...], bool, tuple[str, ...]]] = {
    "gpt-2": (("gpt2",), False, ()),
    "smollm": (("digits", "gpt2"), False, ()),
    "llama-bpe": ((_WORDS % "{1,3}",), True, ()),
    "qwen2": ((_WORDS % "",), False, ("NFC",)),
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """What "tokenizer.ggml..." and "tokenizer.chat_template" say, for an embedding of so many rows.

    Raises UnsupportedArchitecture for a tokenizer that llama.cpp cannot hold as it is.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _refusal(folder, "it has no tokenizer.json")
    parts = json.loads(path.read_text(encoding="utf-8"))
    tokens, types = _tokens(folder, parts, tokenizer, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    if any(pair.count(" ") != 1 for pair in merges):
        raise _refusal(folder, "some of its tokens have spaces")
    bos, eos = _added(folder, tokenizer)
    found = {
        "ggml.model": "gpt2",
        "ggml.pre": _name(folder, parts),
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": merges,
        "ggml.add_bos_token": bos,
        "ggml.add_eos_token": eos,
        "ggml.bos_token_id": tokenizer.bos_token_id,
        "ggml.eos_token_id": tokenizer.eos_token_id,
        "ggml.unknown_token_id": tokenizer.unk_token_id,
        "ggml.padding_token_id": tokenizer.pad_token_id,
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    }
    return {f"tokenizer.{key}": value for key, value in found.items() if value is not None}


def _refusal(folder: Path, why: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"the tokenizer of {folder} cannot be written to GGUF as it is: {why}; serve the folder with vLLM or "
        "transformers"
    )


def _name(folder: Path, parts: dict[str, Any]) -> str:
    """What llama.cpp calls this way to split a text into words."""
    model = parts["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refusal(folder, "it is no byte-level BPE")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        raise _refusal(folder, "its BPE marks parts of words")
    how = tuple(map(_split, _flat(parts.get("pre_tokenizer"), "pretokenizers")))
    before = tuple(part["type"] for part in _flat(parts.get("normalizer"), "normalizers"))
    steps = how if how[-1:] == ("gpt2",) else how[:-1] if how[-1:] == ("bytes",) else ("unknown",)
    for name, known in SPLITS.items():
        if known == (steps, bool(model.get("ignore_merges")), before):
            return name
    raise _refusal(folder, "llama.cpp has no name, known here, for how it splits a text into words")


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [one for some in part[inner] for one in _flat(some, inner)] if part["type"] == "Sequence" else [part]


def _split(part: dict[str, Any]) -> str:
    """One step of a pre-tokenizer: the regular expression, or one of three words for what has none."""
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "gpt2" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part["individual_digits"]:
        return "digits"
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return part["pattern"].get("Regex", "unknown")
    return "unknown"


def _tokens(
    folder: Path, parts: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int
) -> tuple[list[str], list[int]]:
    """By id: every token, as tokenizer.json writes it, and its type; ids of the embedding alone are unused."""
    by_id = {index: token for token, index in parts["model"]["vocab"].items()}
    added = {one["id"]: one for one in parts["added_tokens"]}
    if any(one[side] for one in added.values() for side in ("lstrip", "rstrip", "single_word")):
        raise _refusal(folder, "it has added tokens that take the spaces beside them")
    by_id |= {index: one["content"] for index, one in added.items()}
    if len(tokenizer) > rows or max(by_id) >= rows:
        raise _refusal(folder, f"it has more tokens than the embedding has rows ({rows})")
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [NORMAL if index in by_id else UNUSED for index in range(rows)]
    for index, one in added.items():
        types[index] = CONTROL if one["special"] else USER_DEFINED
    return tokens, types


def _added(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets the token that begins one, and the one that ends one."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise _refusal(folder, "it adds other tokens to a text than one that begins and one that ends it")
