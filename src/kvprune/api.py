"""Loading for users: one call for any source."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.models import source as sources


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A hub id, checkpoint folder, pruned folder (checked against its checksums) or .gguf file, in eval mode.

    dtype: "auto" (the checkpoint's own; bfloat16 for GGUF), "float32", "bfloat16" or "float16". Raises a
    KVPruneError: UnknownSource, UnsupportedArchitecture, UnsafeWeights, BrokenCheckpoint or BadOption.
    """
    return sources.load_model(sources.resolve(source, revision, trust_remote_code), device, dtype)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of any source that `load` takes."""
    return sources.load_tokenizer(sources.resolve(source, revision, trust_remote_code))
