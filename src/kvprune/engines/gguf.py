"""A folder -> one GGUF file for llama.cpp, read back and checked: of the stock or the portable layout, or one whose
layers are as they were but for those without attention (deci.py).

llama.cpp's "llama" has interleaved RoPE pairs, frequencies of its own unless rope_freqs.weight divides them, and none
of the scales that YaRN puts on cos and sin. A file without these loads and is silently wrong.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from kvprune.engines.deci import STILL, Deci
from kvprune.engines.deci import read as read_deci
from kvprune.engines.targets import STOCK
from kvprune.engines.vocabulary import differences, vocabulary
from kvprune.errors import BadOption, BrokenCheckpoint, NotFinite, OutputExists, UnknownSource, UnsupportedArchitecture
from kvprune.models.source import load_config, resolve, skeleton
from kvprune.models.tokenizer import load_tokenizer
from kvprune.runtime.files import alone, check_there, read_shown, verify_files, weight_files, writing_to

TYPES = ("f32", "f16", "q8_0")
LARGEST = 65504.0  # of a float16, which q8_0's scales are too
LARGEST_KEY = 2**32 - 1  # of a number among the keys
BLOCK = 32  # numbers of a row that q8_0 quantises together
_MEND = (
    "{folder} has the layout {layout}, whose channels differ by layer or head, which llama.cpp cannot hold: prune with "
    "--layout stock (merges KV heads), or with --layout portable (any width)"
)


def export(folder: str | Path, *, gguf: str | Path, type: str = "f16") -> dict[str, Any]:
    """Write a pruned folder as a GGUF file: of the layout stock or portable, or with whole layers of attention gone and
    the others as wide as each other.

    type: of the matrices, "f32", "f16" or "q8_0"; vectors are f32. A matrix whose rows are no multiple of 32 numbers
    stays f16 in a q8_0 file. Returns {"file", "architecture", "type", "bytes", "tensors", "not_quantised" (names of
    such matrices), "differences" (lines: where llama.cpp is known to make other tokens of a text)}. Raises BadOption,
    BrokenCheckpoint, OutputExists, NoSpace, UnknownSource (without the gguf package) or UnsupportedArchitecture, with
    the layout to take, for what llama.cpp cannot hold.
    """
    folder, path = Path(folder), Path(gguf)
    if type not in TYPES:
        raise BadOption(f"unknown type {type!r}; choose {', '.join(TYPES)}")
    _check_free(path)
    try:
        import gguf as library
    except ImportError:
        raise UnknownSource("writing GGUF needs the gguf package: pip install gguf") from None
    model = _Model.of(folder)
    verify_files(folder)
    name = {"general.name": read_shown(folder, ["source"])["source"]}
    keys = name | model.keys(type) | vocabulary(folder, load_tokenizer(resolve(folder)), model.config.vocab_size)
    partial = path.with_name(path.name + ".partial")
    with alone(path.parent), writing_to(path.parent, "free some space or choose another --gguf"):
        _check_free(path)
        try:
            kept = _write(library, partial, model.architecture, keys, model.tensors(), type)
            _check(library, partial, keys, kept, model.tensors())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    plain = sorted(name for name, kind in kept.items() if type == "q8_0" and kind == "F16")
    found = {"file": str(path), "architecture": model.architecture, "type": type, "bytes": path.stat().st_size}
    return found | {"tensors": len(kept), "not_quantised": plain, "differences": differences(folder)}


def _check_free(path: Path) -> None:
    if path.exists():
        raise OutputExists(f"{path} is there already; remove it, or choose another --gguf")
    if not path.parent.is_dir():
        raise OutputExists(f"there is no folder {path.parent}; make it, or choose another --gguf")


def check(folder: Path) -> None:
    """Raise what `export` would raise of this folder, without reading its weights."""
    model = _Model.of(folder)
    vocabulary(folder, load_tokenizer(resolve(folder)), model.config.vocab_size)


@dataclass(frozen=True)
class _Model:
    """A folder as llama.cpp's "llama" or "deci". width: of a head; deci: None for "llama"; factors: what divides each
    pair's frequency, (width / 2,), None where nothing does; scale: what W_q is multiplied by."""

    folder: Path
    config: Any
    width: int
    deci: Deci | None
    factors: torch.Tensor | None
    scale: float

    @classmethod
    def of(cls, folder: Path) -> "_Model":
        """Raises UnsupportedArchitecture for what llama.cpp cannot hold."""
        check_there(folder)
        layout = read_shown(folder, ()).get("layout")
        source = resolve(folder, needs_weights=False)
        config: Any = load_config(source)
        model = skeleton(source)
        deci = None if layout in STOCK else read_deci(folder, config, _MEND.format(folder=folder, layout=layout))
        if getattr(config, "sliding_window", None):
            raise UnsupportedArchitecture(
                f"{folder} has a sliding window, which llama.cpp's llama has not; serve it with vLLM or transformers"
            )
        if (deci is None and config.model_type not in ("llama", "mistral")) or config.hidden_act != "silu":
            raise UnsupportedArchitecture(
                f"{folder} is a {config.model_type} with {config.hidden_act}; only models like Llama are written to "
                "GGUF"
            )
        dense = config if deci is None else config.dense()
        frequencies, scale = _rope(model, dense)
        width = config.head_dim if deci is None else deci.width
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        factors = plain / frequencies if deci is None else deci.factors(plain, frequencies)
        if scale != 1 and bool((factors >= STILL).any()):  # on what turns alone
            raise UnsupportedArchitecture(_MEND.format(folder=folder, layout=layout))
        is_plain = bool((factors - 1).abs().max() < 1e-6)
        scale *= math.sqrt(width / dense.head_dim)
        return cls(folder, config, width, deci, None if is_plain else factors.float(), scale)

    @property
    def architecture(self) -> str:
        return "llama" if self.deci is None else "deci"

    def keys(self, type: str) -> dict[str, Any]:
        config = self.config
        heads: Any = config.num_attention_heads
        kv_heads: Any = config.num_key_value_heads
        if self.deci is not None:
            there = [layer in self.deci.order for layer in range(config.num_hidden_layers)]
            heads, kv_heads = ([number if one else 0 for one in there] for number in (heads, kv_heads))
        numbers = {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.key_length": self.width,
            "attention.value_length": self.width,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": self.width,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
        about = {"general.file_type": {"f32": 0, "f16": 1, "q8_0": 7}[type], "general.quantization_version": 2}
        return about | {f"{self.architecture}.{key}": value for key, value in numbers.items()}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """GGUF's name and the float32 numbers of each tensor, one after another."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        names = get_tensor_name_map(MODEL_ARCH[self.architecture.upper()], self.config.num_hidden_layers)
        if self.factors is not None:
            yield "rope_freqs.weight", self.factors.numpy()
        constants = {} if self.deci is None else dict(self.deci.constants)
        for name, tensor in self._read():
            stem, _, leaf = name.rpartition(".")
            known = names.get_name(stem)
            if known is None:
                raise BrokenCheckpoint(f"{self.folder} has {name}, which llama.cpp's {self.architecture} has not")
            layer = int(known.split(".")[1]) if known.startswith("blk.") else -1
            if known.endswith(("attn_q", "attn_k")):
                tensor = tensor if self.deci is None else self.deci.ordered(tensor, layer)
                tensor = _interleaved(tensor, self.width)
            if known.endswith("attn_q"):
                tensor = tensor * self.scale
            # What is left of a layer's attention is a constant: the layer before adds it, or the embedding
            if known == "token_embd" and 0 in constants:
                if self.config.tie_word_embeddings:
                    yield "output.weight", tensor.numpy()
                tensor = tensor + constants.pop(0)
            if known.endswith("ffn_down") and leaf == "bias" and layer + 1 in constants:
                tensor = tensor + constants.pop(layer + 1)
            yield f"{known}.{leaf}", tensor.numpy()
        for layer, constant in constants.items():
            yield f"blk.{layer - 1}.ffn_down.bias", constant.numpy()

    def _read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What llama.cpp has of the folder's tensors, in float32."""
        skipped = {} if self.deci is None else self.deci.constants
        gone = {
            f"model.layers.{layer}.{name}"
            for layer in skipped
            for name in ("input_layernorm.weight", "self_attn.o_proj.weight", "self_attn.o_proj.bias")
        }
        if self.config.tie_word_embeddings:
            gone.add("lm_head.weight")
        for file in weight_files(self.folder):
            with safe_open(self.folder / file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    if name not in gone and not name.endswith("rope_index"):
                        yield name, weights.get_tensor(name).float()


def _rope(model: Any, dense: Any) -> tuple[torch.Tensor, float]:
    """The frequency of each dense pair, and what YaRN scales scores by. dense: the config that they belong to."""
    rope = model.config.rope_parameters
    changes = rope["rope_type"] == "longrope" and rope["short_factor"] != rope["long_factor"]
    if rope["rope_type"] == "dynamic" or changes:
        raise UnsupportedArchitecture(
            f"its {rope['rope_type']} RoPE changes with the context, which a GGUF file cannot say; serve the folder "
            "with vLLM or transformers"
        )
    rotary = type(model.base_model.rotary_emb)(dense)
    return rotary.inv_freq.double(), float(rotary.attention_scaling) ** 2


def _interleaved(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of heads whose pairs are (i, i + width / 2) -> those of (2 i, 2 i + 1), as llama.cpp's llama turns them."""
    heads = tensor.unflatten(0, (-1, 2, width // 2))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def _write(
    library: Any, path: Path, architecture: str, keys: dict[str, Any], tensors: Any, type: str
) -> dict[str, str]:
    """Returns the type of each tensor written. Tensors are converted one at a time, and wait on the disk."""
    writer = library.GGUFWriter(path, architecture, use_temp_file=True)
    for key, value in keys.items():
        if isinstance(value, (int, float)) and not 0 <= value <= LARGEST_KEY:
            raise BrokenCheckpoint(f"{key} is {value}, which a GGUF file cannot hold; fetch or make the folder again")
        _add(writer, key, value)
    kept = {}
    kinds = library.GGMLQuantizationType
    for name, data in tensors:
        kind = kinds.F32 if data.ndim == 1 or type == "f32" else kinds.F16
        if type == "q8_0" and data.ndim > 1 and data.shape[-1] % BLOCK == 0:
            kind = kinds.Q8_0
        kept[name] = kind.name
        largest = float(np.abs(data).max(initial=0.0))
        if not math.isfinite(largest):
            raise NotFinite(f"{name} has numbers that are no numbers; fetch or make the folder again")
        if kind != kinds.F32 and largest > LARGEST:
            raise BadOption(f"{name} has a number as large as {largest:.3g}, which {type} cannot hold; give --type f32")
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
        is_real = isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))
        same = np.allclose(found, value, rtol=1e-6) if is_real else found == value
        assert same, f"{key} was read back as {found}"
    there = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tensor.tensor_type.name for name, tensor in there.items()} == kept
    rounding = {"F32": 0.0, "F16": 2.0**-11, "Q8_0": 1 / 127}
    for name, data in tensors:
        read = library.quants.dequantize(there[name].data, there[name].tensor_type).reshape(data.shape)
        off = np.abs(read - data).max()
        assert off <= rounding[kept[name]] * np.abs(data).max() + 1e-7, f"{name} was read back {off} off"
