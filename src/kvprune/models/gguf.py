"""What a .gguf file says of its model that transformers does not read, and what is refused.

transformers drops every key and tensor that it does not know without a word, RoPE scaling among them, and leaves at a
default what a family's table of keys forgets. Here each of them is read, known to change nothing, or refused. What the
keys mean, and what holds where one is missing, is what llama.cpp makes of them.
"""

import math
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
_THETA = 10000.0  # where a file says none
_ARRAYS = {"attention.head_count_kv"}  # of a hybrid
# What transformers leaves at a default: a config's name, and the key that says it.
_LEFT_OUT = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "norm_eps": "attention.layer_norm_epsilon",
}
# The layers of the family's one model whose queries are scaled by hidden size / heads in place of a head's channels, by
# which llama.cpp knows it: no key says so.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}
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
    """A file's metadata without its arrays, of which only the names are kept, its tensors' names, and the factors that
    divide RoPE's frequencies."""

    name: str
    keys: dict[str, Any]
    arrays: frozenset[str]
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
        arrays = {name for name, field in reader.fields.items() if field.types[:1] == [GGUFValueType.ARRAY]}
        keys = {name: field.contents() for name, field in reader.fields.items() if name not in arrays}
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
    return Header(str(path), keys, frozenset(arrays), frozenset(tensors), factors)


def complete(config: PreTrainedConfig, header: Header) -> None:
    """Put into `config`, as transformers reads it from the file, what it leaves out. Raises UnsupportedArchitecture."""
    left_out = {name: key for name, key in _LEFT_OUT.items() if hasattr(config, name)}
    _check_keys(config, header, left_out)
    for name, key in left_out.items():
        if value := header.get(key):
            setattr(config, name, value)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = header.get("attention.key_length", hidden // heads)
    family = family_of(config.model_type)
    if family.is_plain or hasattr(config, "head_dim"):
        config.head_dim = head_dim
    if hasattr(config, "query_pre_attn_scalar"):
        by_hidden = _SCALED_BY_HIDDEN.get(header.keys["general.architecture"]) == config.num_hidden_layers
        config.query_pre_attn_scalar = hidden // heads if by_hidden else head_dim
    if _has_two_tables(config) and not header.get("attention.sliding_window"):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    turned = header.get("rope.dimension_count", head_dim)
    is_partial = "partial_rotary_factor" in (getattr(config, "rope_parameters", None) or {})
    if family.rope != "none" and turned != head_dim and not (is_partial and turned < head_dim):
        raise UnsupportedArchitecture(f"{header.name}: partial rotary embeddings are not read from GGUF; {ORIGINAL}")
    rope = _rope(header, config, _share(turned, head_dim))
    if rope is not None:
        config.rope_parameters = rope
    _check_tensors(config, header)


def _share(turned: int, head_dim: int) -> float:
    """The factor by which transformers finds that `turned` of a head's channels turn: it rounds down."""
    found = turned / head_dim
    return found if int(head_dim * found) == turned else math.nextafter(found, math.inf)


def _check_keys(config: PreTrainedConfig, header: Header, left_out: dict[str, str]) -> None:
    """Raise UnsupportedArchitecture for what the file says and nobody reads."""
    architecture = header.keys["general.architecture"]
    prefix = architecture + "."
    read: dict[str, Any] = cast(Any, GGUF_CONFIG_MAPPING).get(architecture, {})
    known = _KNOWN | set(left_out.values()) | {key for key, name in read.items() if name is not None}
    known |= {"rope.freq_base_swa"} if _has_two_tables(config) else set()
    left = {name for name, value in header.keys.items() if value and name.removeprefix(prefix) not in known}
    left |= {name for name in header.arrays if name.removeprefix(prefix) not in _ARRAYS}
    if header.get("rope.scaling.attn_factor") == 1.0:
        left.discard(prefix + "rope.scaling.attn_factor")
    for name in sorted(left):
        if name.startswith(prefix):
            raise UnsupportedArchitecture(f"{header.name} has {name}, which is not read here; {ORIGINAL}")
    if not header.get("attention.causal", True):
        raise UnsupportedArchitecture(f"{header.name}: its attention looks ahead, so it is no model that writes text")


def _has_two_tables(config: PreTrainedConfig) -> bool:
    """Whether RoPE turns otherwise in layers with a window than in full ones, and in no way of its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    tables = {name: table for name, table in parameters.items() if isinstance(table, dict)}  # 5.16 has more beside them
    return set(tables) == {"full_attention", "sliding_attention"} and all(
        table.get("rope_type") == "default" for table in tables.values()
    )


def _rope(header: Header, config: PreTrainedConfig, turned: float) -> dict[str, Any] | None:
    """RoPE as transformers says it, or None to leave it. turned: the share of a head's channels that it turns."""
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = {"rope_theta": header.get("rope.freq_base", _THETA)}
    if "rope_theta" in parameters and not _has_two_tables(config):
        partial = {"partial_rotary_factor": turned} if "partial_rotary_factor" in parameters else {}
        return _scaled(header, config, theta | partial)
    full = _scaled(header, config, theta)
    if _has_two_tables(config) and full["rope_type"] in ("default", "linear"):  # scaled in full layers alone
        sliding = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", _THETA)}
        return parameters | {"full_attention": full, "sliding_attention": sliding}
    if full["rope_type"] != "default":
        raise UnsupportedArchitecture(f"{header.name} has RoPE scaling, which is not read for this family; {ORIGINAL}")
    return None


def _scaled(header: Header, config: PreTrainedConfig, base: dict[str, Any]) -> dict[str, Any]:
    """`base` with the file's RoPE scaling.

    The kinds are llama.cpp's: linear where none is named. Frequency factors (of Llama 3.1) are said as longrope's, the
    same for short and long, as the portable layout has them.
    """
    kind = header.get("rope.scaling.type", "linear")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 0.0)) or 1.0
    original = header.get("rope.scaling.original_context_length", config.max_position_embeddings)
    if kind == "none" or factor == 1.0:
        kind, factor = "linear", 1.0
    if kind == "yarn" and header.factors is None:
        return base | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind != "linear":
        raise UnsupportedArchitecture(f"{header.name} has RoPE scaling {kind!r}, which is not read here; {ORIGINAL}")
    if header.factors is None:
        return base | ({"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor})
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
        model = AutoModelForCausalLM.from_config(config)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    wanted, tied = set(), {head} if config.tie_word_embeddings else set()
    for stem, _, leaf in (name.rpartition(".") for name in model.state_dict()):
        own = names.get_name(stem)
        if own is not None:
            wanted.add(f"{own}.{leaf}")
        elif stem not in tied:
            raise UnsupportedArchitecture(f"{header.name}: GGUF has no {stem} of {config.model_type}; {ORIGINAL}")
    optional = {FREQUENCIES, *(["output.weight"] if tied else [])}
    for problem, some in (("lacks", wanted - header.tensors), ("has", header.tensors - wanted)):
        if left := sorted(some - optional):
            raise UnsupportedArchitecture(
                f"{header.name} {problem} {left[0]}{f' and {len(left) - 1} more' if left[1:] else ''}: its tensors are "
                f"not those of a plain {config.model_type} language model; {ORIGINAL}"
            )
