"""What a .gguf file says of its model that transformers does not read, and what is refused.

transformers drops every key and tensor that it does not know without a word, RoPE scaling among them. Here each of them
is read, known to change nothing, or refused. What the keys mean is what llama.cpp makes of them.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from kvprune.errors import BrokenCheckpoint, UnknownSource, UnsupportedArchitecture
from kvprune.models.check import MOST
from kvprune.models.family import family_of

ORIGINAL = "give the checkpoint that it was made from"
FREQUENCIES = "rope_freqs.weight"
# Keys below the architecture that transformers reads, or that are read here, or that change no logit.
_KNOWN = {
    "attention.causal", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count",
    "context_length", "embedding_length", "feed_forward_length", "pooling_type", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.type", "tensor_data_layout", "use_parallel_residual",
    "vocab_size",
}  # fmt: skip


_COUNTED = ("block_count", "head_count", "head_count_kv", "key_length", "value_length", "expert_count")


@dataclass(frozen=True)
class Header:
    """A file's metadata without its arrays, its tensors' names, and the factors that divide RoPE's frequencies."""

    name: str
    keys: dict[str, Any]
    tensors: frozenset[str]
    factors: tuple[float, ...] | None

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key below the architecture, such as "rope.freq_base"."""
        return self.keys.get(f"{self.keys['general.architecture']}.{key}", default)


def read_header(path: Path) -> Header:
    """Raises UnknownSource and BrokenCheckpoint for a file that is no whole model."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UnknownSource(f"reading {path} needs the gguf package: pip install gguf") from None
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BrokenCheckpoint(f"{path} is no GGUF file; fetch it again")
    found = path.stat()
    return _read(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)  # a large vocabulary takes seconds, and every load asks several times
def _read(path: Path, _mtime: int, _size: int) -> Header:
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
        keys = {k: field.contents() for k, field in reader.fields.items() if field.types[:1] != [GGUFValueType.ARRAY]}
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, struct.error) as error:
        if "QuantizationType" in str(error):
            raise UnknownSource(f"{path}: {error}; update the gguf package, or {ORIGINAL}") from None
        raise BrokenCheckpoint(f"{path} is truncated or damaged; fetch it again") from None
    if keys.get("split.count", 1) > 1:
        raise UnknownSource(
            f"{path} is one of {keys['split.count']} parts; merge them: llama-gguf-split --merge FIRST-PART OUT.gguf"
        )
    for key, value in keys.items():
        if key.rpartition(".")[2] in _COUNTED and isinstance(value, int) and value > MOST:
            raise BrokenCheckpoint(f"{path}: {key} is {value}, more than {MOST}; fetch it again")
    if "general.architecture" not in keys:
        raise UnsupportedArchitecture(f"{path} names no architecture: it is no language model; {ORIGINAL}")
    factors = tuple(tensors[FREQUENCIES].tolist()) if FREQUENCIES in tensors else None
    return Header(str(path), keys, frozenset(tensors), factors)


def complete(config: PreTrainedConfig, header: Header) -> None:
    """Put into `config`, as transformers reads it from the file, what it leaves out. Raises UnsupportedArchitecture."""
    architecture = header.keys["general.architecture"]
    prefix = architecture + "."
    read: dict[str, Any] = cast(Any, GGUF_CONFIG_MAPPING).get(architecture, {})
    for name, value in header.keys.items():
        key = name.removeprefix(prefix)
        known = key in _KNOWN or read.get(key) is not None
        if key != name and value and not known and (key, value) != ("rope.scaling.attn_factor", 1.0):
            raise UnsupportedArchitecture(f"{header.name} has {name}, which is not read here; {ORIGINAL}")
    head_dim = header.get("attention.key_length", config.hidden_size // config.num_attention_heads)
    turned, family = header.get("rope.dimension_count", head_dim), family_of(config.model_type)
    if family.rope != "none" and turned != head_dim:
        raise UnsupportedArchitecture(f"{header.name}: partial rotary embeddings are not read from GGUF; {ORIGINAL}")
    if family.is_plain or hasattr(config, "head_dim"):
        config.head_dim = head_dim
    rope = _rope(header, config)
    if rope is not None:
        config.rope_parameters = rope
    _check_tensors(config, header)


def _rope(header: Header, config: PreTrainedConfig) -> dict[str, Any] | None:
    """RoPE scaling as transformers says it, or None where there is none.

    The kinds are llama.cpp's: linear where none is named. Frequency factors (of Llama 3.1) are said as longrope's, the
    same for short and long, as the portable layout has them.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = header.get("rope.scaling.type", "linear")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 0.0)) or 1.0
    original = header.get("rope.scaling.original_context_length", config.max_position_embeddings)
    if kind == "none" or factor == 1.0:
        kind, factor = "linear", 1.0
    if "rope_theta" not in parameters:  # none at all, or a table for each type of layer
        if factor == 1.0 and header.factors is None:
            return None
        raise UnsupportedArchitecture(f"{header.name} has RoPE scaling, which is not read for this family; {ORIGINAL}")
    base: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    if kind == "yarn" and header.factors is None:
        return base | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind != "linear":
        raise UnsupportedArchitecture(f"{header.name} has RoPE scaling {kind!r}, which is not read here; {ORIGINAL}")
    if header.factors is None:
        return None if factor == 1.0 else base | {"rope_type": "linear", "factor": factor}
    factors = [factor * one for one in header.factors]
    return base | {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _check_tensors(config: PreTrainedConfig, header: Header) -> None:
    """Raise UnsupportedArchitecture unless the file has the tensors of the model that `config` describes, no more."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    architecture = header.keys["general.architecture"]
    # transformers takes a file that is named mistral for one, and fails
    if architecture not in kinds or (architecture != config.model_type and config.model_type == "mistral"):
        raise UnsupportedArchitecture(f"{header.name}: transformers reads no {config.model_type} from GGUF; {ORIGINAL}")
    names = get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).state_dict()
    wanted = {f"{names.get_name(stem)}.{leaf}" for stem, _, leaf in (name.rpartition(".") for name in parameters)}
    optional = {FREQUENCIES, *(["output.weight"] if config.tie_word_embeddings else [])}
    for problem, some in (("lacks", wanted - header.tensors), ("has", header.tensors - wanted)):
        if left := sorted(some - optional):
            raise UnsupportedArchitecture(
                f"{header.name} {problem} {left[0]}{f' and {len(left) - 1} more' if left[1:] else ''}: its tensors are "
                f"not those of a plain {config.model_type} language model; {ORIGINAL}"
            )
