"""A folder's tokenizer as llama.cpp reads it, or a refusal: it must make the same tokens of every text.

llama.cpp knows how byte-level BPE splits a text into words by name only; here the name is found by what tokenizer.json
says, never guessed. Their regular expressions are those of llama.cpp's src/llama-vocab.cpp. BPE of SentencePiece joins
the two tokens whose whole has the highest score; tokenizer.json has a list of pairs, whose order gives the scores.
"""

import json
import re
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
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "\u2581"
_MARKS = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
# Of its steps, how many put a space before a text, write spaces as SPACE, do either as Metaspace; and all
_SENTENCEPIECE = ((1, 1, 0, 2), (0, 1, 0, 1), (0, 0, 1, 1))


def differences(folder: Path) -> list[str]:
    """Where llama.cpp is known to make other tokens than a tokenizer that it can hold."""
    parts, found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), []
    if any(step["type"] == "NFC" for step in _flat(parts.get("normalizer"), "normalizers")):
        found.append("text that is not normalised (NFC) has other tokens in llama.cpp, which does not normalise it")
    if any(
        step.get("prepend_scheme", "never") != "never" for step in _flat(parts.get("pre_tokenizer"), "pretokenizers")
    ):
        found.append("text that begins with a space, and text behind a special token, has one space more in llama.cpp")
    return found


def vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """What "tokenizer.ggml..." and "tokenizer.chat_template" say, for an embedding of so many rows.

    Raises UnsupportedArchitecture for a tokenizer that llama.cpp cannot hold as it is.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _refusal(folder, "it has no tokenizer.json")
    parts = json.loads(path.read_text(encoding="utf-8"))
    tokens, types = _tokens(folder, parts, tokenizer, rows)
    bos, eos = _added(folder, tokenizer)
    model = parts["model"]
    if model.get("type") != "BPE" or any(model.get(key) for key in _MARKS):
        raise _refusal(folder, "it is no BPE, or marks parts of words")
    kind = _sentencepiece(folder, parts, tokens, types) if model.get("byte_fallback") else _bytes(folder, parts)
    found = kind | {
        "ggml.tokens": tokens,
        "ggml.token_type": types,
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


def _bytes(folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """What is said of a byte-level BPE alone."""
    merges = [" ".join(pair) for pair in _pairs(parts)]
    if any(pair.count(" ") != 1 for pair in merges):
        raise _refusal(folder, "some of its tokens have spaces")
    return {"ggml.model": "gpt2", "ggml.pre": _name(folder, parts), "ggml.merges": merges}


def _pairs(parts: dict[str, Any]) -> list[tuple[str, ...]]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in parts["model"]["merges"]]


def _sentencepiece(folder: Path, parts: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """What is said of a BPE of SentencePiece alone; `types` are told which tokens are bytes, and which is unknown."""
    before, how = _flat(parts.get("normalizer"), "normalizers"), _flat(parts.get("pre_tokenizer"), "pretokenizers")
    first = [step for step in before if step == {"type": "Prepend", "prepend": SPACE}]
    spaces = [step for step in before if step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    meta = [step for step in how if step["type"] == "Metaspace" and step["replacement"] == SPACE and not step["split"]]
    steps = len(before) + len(how)
    if parts["model"].get("ignore_merges") or (len(first), len(spaces), len(meta), steps) not in _SENTENCEPIECE:
        raise _refusal(folder, "it treats spaces in another way than SentencePiece's BPE")
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(_pairs(parts)):
        ranks.setdefault("".join(pair), []).append(rank)
    if any(found[-1] - found[0] >= len(found) for found in ranks.values()):
        raise _refusal(folder, "the order in which it joins tokens is that of no scores")
    for index, token in enumerate(tokens):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[index] = BYTE
        elif token == parts["model"].get("unk_token"):
            types[index] = UNKNOWN
    if types.count(BYTE) != 256:
        raise _refusal(folder, "it has no tokens for bytes")
    prefix = bool(first) or any(step["prepend_scheme"] != "never" for step in meta)
    scores = [-float(ranks[token][0]) if token in ranks else -float(len(ranks)) for token in tokens]
    about = {"ggml.model": "llama", "ggml.pre": "default", "ggml.add_space_prefix": prefix}
    return about | {"ggml.scores": scores, "ggml.remove_extra_whitespaces": False}


def _name(folder: Path, parts: dict[str, Any]) -> str:
    """What llama.cpp calls this way to split a text into words."""
    model = parts["model"]
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
