"""SOURCE -> tokenizer, and whether its tokens are the model's."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvprune.errors import BadOption, BrokenCheckpoint, KVPruneError, TokenizerMismatch, UnknownSource
from kvprune.models.check import first_line
from kvprune.models.source import Source
from kvprune.runtime import register

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_MEND = "copy tokenizer.json and tokenizer_config.json, or tokenizer.model, there from the model that it was made from"


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the source. Raises UnknownSource or BrokenCheckpoint."""
    register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **source.arguments())
        tokenizer("a")  # some of its settings are read only now
    except (KVPruneError, MemoryError):
        raise
    except Exception as error:  # a file that cannot be read raises almost anything, plain Exception included
        raise _unreadable(source, error) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):  # what some classes make of no files at all
        raise BrokenCheckpoint(f"{source.name} has no tokenizer; {_MEND}")
    return tokenizer


def _unreadable(source: Source, error: Exception) -> KVPruneError:
    """Why there is no tokenizer, in one line."""
    folder = Path(source.folder)
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return UnknownSource(f"the tokenizer of {source.name} has code of its own; to run it, --trust-remote-code")
    if source.gguf_file:
        return BrokenCheckpoint(f"the tokenizer in {source.name} cannot be read: {reason}; fetch or make it again")
    if not source.is_local:
        return UnknownSource(f"cannot load the tokenizer of {source.name}: {reason}")
    found = [path for pattern in _FILES for path in sorted(folder.glob(pattern))]
    if not found:
        return BrokenCheckpoint(f"{source.name} has no tokenizer; {_MEND}")
    wanted = [("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")]
    missing = " ".join(package for module, package in wanted if not _is_installed(module))
    if missing and not (folder / "tokenizer.json").is_file() and _is_sentencepiece(found[0]):
        return UnknownSource(f"{found[0]} is a SentencePiece model: to read it, pip install {missing}")
    if reason.rstrip().endswith(":"):  # a list of what was tried follows
        reason = "the files do not make one"
    return BrokenCheckpoint(f"the tokenizer of {source.name} cannot be read: {reason}; {_MEND}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def _is_sentencepiece(path: Path) -> bool:
    """Rather than a list of tokens, which tiktoken reads: a protobuf, that begins with its first piece."""
    with path.open("rb") as file:
        return path.suffix == ".model" and file.read(1) == b"\n"


def one_tokenizer(found: Sequence[Source]) -> PreTrainedTokenizerBase:
    """The tokenizer of all these sources. Raises BadOption where theirs differ: figures could not be compared."""
    first, *others = [load_tokenizer(source) for source in found]
    for source, tokenizer in zip(found[1:], others, strict=True):
        if tokenizer.get_vocab() != first.get_vocab():
            raise BadOption(f"{found[0].name} and {source.name} have different tokenizers; compare them apart")
    return first


def check_ids(ids: torch.Tensor, rows: int, what: str) -> None:
    """Raise TokenizerMismatch for a token id that an embedding of `rows` rows has none for. ids: any shape.

    Tokenizers may know more tokens than the model (some were added later), as long as they do not occur.
    """
    highest = int(ids.max()) if ids.numel() else 0
    if highest >= rows:
        raise TokenizerMismatch(
            f"{what} has the token id {highest}, but the model's embedding has {rows} rows, for ids below that; give "
            "another text, or the model the tokenizer that it was trained with"
        )
