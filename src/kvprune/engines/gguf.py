"""A folder of the stock or the portable layout -> one GGUF file for llama.cpp, read back and checked.

llama.cpp's "llama" has interleaved RoPE pairs, frequencies of its own unless rope_freqs.weight divides them, and none
of the scales that YaRN puts on cos and sin. A file without these loads and is silently wrong.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvprune.engines.vocabulary import vocabulary
from kvprune.errors import BadOption, BrokenCheckpoint, OutputExists, UnknownSource, UnsupportedArchitecture
from kvprune.models.source import resolve
from kvprune.models.tokenizer import load_tokenizer
from kvprune.runtime.files import read_record, verify_files, weight_files, writing_to

TYPES = ("f32", "f16", "q8_0")
BLOCK = 32  # numbers of a row that q8_0 quantises together
LAYOUTS = ("stock", "portable")


def export(folder: str | Path, *, gguf: str | Path, type: str = "f16") -> dict[str, Any]:
    """Write a pruned folder of the layout stock or portable as a GGUF file.

    type: of the matrices, "f32", "f16" or "q8_0"; vectors are f32. A matrix whose rows are no multiple of 32 numbers
    stays f16 in a q8_0 file. Returns {"file", "architecture", "type", "bytes", "tensors", "not_quantised" (names of
    such matrices)}. Raises BadOption, BrokenCheckpoint, OutputExists, NoSpace, UnknownSource (without the gguf package)
    or UnsupportedArchitecture, with the layout to take, for what llama.cpp cannot hold.
    """
    folder, path = Path(folder), Path(gguf)
    if type not in TYPES:
        raise BadOption(f"unknown type {type!r}; choose {', '.join(TYPES)}")
    if path.exists():
        raise OutputExists(f"{path} is there already; remove it, or choose another --gguf")
    try:
        import gguf as library
    except ImportError:
        raise UnknownSource("writing GGUF needs the gguf package: pip install gguf") from None
    config = _config(folder)
    verify_files(folder)
    frequencies, scale = _rope(config)
    name = {"general.name": str(read_record(folder)["source"])}
    keys = name | _keys(config, type) | vocabulary(folder, load_tokenizer(resolve(folder)), config.vocab_size)
    partial = path.with_name(path.name + ".partial")
    try:
        with writing_to(path.parent, "free some space or choose another --gguf"):
            kept = _write(library, partial, keys, _tensors(folder, config, frequencies, scale), type)
            _check(library, partial, keys, kept, _tensors(folder, config, frequencies, scale))
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    plain = sorted(name for name, kind in kept.items() if type == "q8_0" and kind == "F16")
    found = {"file": str(path), "architecture": "llama", "type": type, "bytes": path.stat().st_size}
    return found | {"tensors": len(kept), "not_quantised": plain}


def check(folder: Path) -> None:
    """Raise what `export` would raise of this folder, without reading its weights."""
    config = _config(folder)
    _rope(config)
    vocabulary(folder, load_tokenizer(resolve(folder)), config.vocab_size)


def _config(folder: Path) -> PreTrainedConfig:
    """The stock config of a folder that llama.cpp can hold. Raises UnsupportedArchitecture."""
    if not folder.is_dir():
        raise UnknownSource(f"there is no folder {folder}; give a pruned folder (download what is on the hub first)")
    layout = read_record(folder).get("layout")
    if layout not in LAYOUTS:
        raise UnsupportedArchitecture(
            f"{folder} has the layout {layout}, whose channels differ by layer and head, which llama.cpp cannot hold: "
            "prune with --layout stock (merges KV heads), or with --layout portable (any width)"
        )
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "sliding_window", None):
        raise UnsupportedArchitecture(
            f"{folder} has a sliding window, which llama.cpp's llama has not; serve it with vLLM or transformers"
        )
    if config.model_type not in ("llama", "mistral") or config.hidden_act != "silu":
        raise UnsupportedArchitecture(
            f"{folder} is a {config.model_type} with {config.hidden_act}; of the stock layouts only Llama's is written "
            "to GGUF"
        )
    return config


def _rope(config: Any) -> tuple[torch.Tensor | None, float]:
    """What divides each pair's frequency, (head_dim / 2,), None where nothing does; and what YaRN scales scores by."""
    rope = config.rope_parameters
    changes = rope["rope_type"] == "longrope" and rope["short_factor"] != rope["long_factor"]
    if rope["rope_type"] == "dynamic" or changes:
        raise UnsupportedArchitecture(
            f"its {rope['rope_type']} RoPE changes with the context, which a GGUF file cannot say; serve the folder "
            "with vLLM or transformers"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rotary = type(model.base_model.rotary_emb)(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    factors = plain / rotary.inv_freq.double()
    is_plain = bool((factors - 1).abs().max() < 1e-6)
    return None if is_plain else factors.float(), float(rotary.attention_scaling) ** 2


def _keys(config: Any, type: str) -> dict[str, Any]:
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    about = {"general.file_type": {"f32": 0, "f16": 1, "q8_0": 7}[type], "general.quantization_version": 2}
    return about | {f"llama.{key}": value for key, value in numbers.items()}


def _tensors(folder: Path, config: Any, factors: torch.Tensor | None, scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF's name and the float32 numbers of each tensor, one after another."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    if factors is not None:
        yield "rope_freqs.weight", factors.numpy()
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                stem, _, leaf = name.rpartition(".")
                known = names.get_name(stem)
                if known is None:
                    raise BrokenCheckpoint(f"{folder / file} has {name}, which llama.cpp's llama has not")
                tensor = weights.get_tensor(name).float()
                if known.endswith(("attn_q", "attn_k")):
                    tensor = _interleaved(tensor, config.head_dim)
                if known.endswith("attn_q"):
                    tensor = tensor * scale
                yield f"{known}.{leaf}", tensor.numpy()


def _interleaved(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of heads whose pairs are (i, i + width / 2) -> those of (2 i, 2 i + 1), as llama.cpp's llama turns them."""
    heads = tensor.unflatten(0, (-1, 2, width // 2))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def _write(library: Any, path: Path, keys: dict[str, Any], tensors: Any, type: str) -> dict[str, str]:
    """Returns the type of each tensor written. Tensors are converted one at a time, and wait on the disk."""
    writer = library.GGUFWriter(path, "llama", use_temp_file=True)
    for key, value in keys.items():
        _add(writer, key, value)
    kept = {}
    kinds = library.GGMLQuantizationType
    for name, data in tensors:
        kind = kinds.F32 if data.ndim == 1 or type == "f32" else kinds.F16
        if type == "q8_0" and data.ndim > 1 and data.shape[-1] % BLOCK == 0:
            kind = kinds.Q8_0
        kept[name] = kind.name
        writer.add_tensor(name, library.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _check(library: Any, path: Path, keys: dict[str, Any], kept: dict[str, str], tensors: Any) -> None:
    """Read the file back: every key, every tensor's name, and its numbers within what its type rounds."""
    reader = library.GGUFReader(path)
    for key, value in keys.items():
        found = reader.fields[key].contents()
        same = np.isclose(found, value, rtol=1e-6) if isinstance(value, float) else found == value
        assert same, f"{key} was read back as {found}"
    there = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tensor.tensor_type.name for name, tensor in there.items()} == kept
    rounding = {"F32": 0.0, "F16": 2.0**-11, "Q8_0": 1 / 127}
    for name, data in tensors:
        read = library.quants.dequantize(there[name].data, there[name].tensor_type).reshape(data.shape)
        off = np.abs(read - data).max()
        assert off <= rounding[kept[name]] * np.abs(data).max() + 1e-7, f"{name} was read back {off} off"
