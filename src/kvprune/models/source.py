"""SOURCE -> model. A source is a hub id, a checkpoint folder, a pruned folder or a .gguf file."""

import copy
import struct
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvprune.errors import (
    BadOption,
    BrokenCheckpoint,
    KVPruneError,
    UnknownSource,
    UnsafeWeights,
    UnsupportedArchitecture,
)
from kvprune.measure.memory import is_out_of_memory
from kvprune.models import gguf, wrapped
from kvprune.models.check import check_adapter, check_folder, check_quantised, check_settings, first_line
from kvprune.models.family import family_of, supported
from kvprune.models.held import quietly
from kvprune.models.places import Place, find_device
from kvprune.progress import without_bars
from kvprune.runtime import register
from kvprune.runtime.attention import wants_eager
from kvprune.runtime.dtype import asked_dtype, compute_in_auto, find_dtype
from kvprune.runtime.files import RECORD
from kvprune.runtime.hub import pruned_snapshot


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and how transformers must be asked for it."""

    name: str
    folder: str  # what from_pretrained gets: a folder or a hub id
    gguf_file: str | None
    revision: str | None
    trust_remote_code: bool

    @property
    def is_local(self) -> bool:
        return Path(self.folder).is_dir()

    @property
    def is_pruned(self) -> bool:
        return self.gguf_file is None and (Path(self.folder) / RECORD).is_file()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json as it is; empty for a .gguf file."""
        return {} if self.gguf_file else _read_settings(self)

    @property
    def is_wrapper(self) -> bool:
        """Whether a vision tower comes with the text model, and is left out."""
        return wrapped.is_wrapper(self.settings)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Read once, since that takes seconds of a GGUF file; `load_config` gives copies."""
        return _read_config(self)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for every from_pretrained."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}  # without, transformers would ask
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.revision:
            arguments["revision"] = self.revision
        return arguments


def resolve(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False, *, needs_weights: bool = True
) -> Source:
    """Find out what `source` is. needs_weights: refuse a folder that could not be loaded, and not only its config.

    Raises UnknownSource, UnsupportedArchitecture, UnsafeWeights, BrokenCheckpoint or BadOption.
    """
    name = str(source)
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UnknownSource(f"there is no file {name}")
        gguf.read_header(path)
        _check_beside(path)
        return Source(name, str(path.parent), path.name, None, trust_remote_code)
    if path.is_dir():
        check_folder(path, needs_weights)
    elif path.exists():
        raise UnknownSource(f"{name} is a file, but no .gguf; give a checkpoint folder, a .gguf file or a hub id")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UnknownSource(f"there is no folder {name}")
    elif (folder := pruned_snapshot(name, revision, whole=needs_weights)) is not None:
        if needs_weights:
            check_folder(folder, needs_weights)
        return Source(name, str(folder), None, None, trust_remote_code)
    return Source(name, name, None, revision, trust_remote_code)


def _check_beside(path: Path) -> None:
    """Raise BadOption for an adapter in the folder of a .gguf file: transformers would load it too."""
    if (path.parent / "adapter_config.json").is_file():
        raise BadOption(f"{path.parent} has an adapter (adapter_config.json) too; move {path.name} to another folder")


def load_model(
    source: Source,
    device: str = "auto",
    dtype: str = "auto",
    offload: Path | None = None,
    outline: PreTrainedModel | None = None,
    places: Sequence[Place] = (),
) -> PreTrainedModel:
    """The model in eval mode on `device`, which is stored (see dtype.py) in the checkpoint's own dtype, bfloat16 for
    GGUF, and computes in that or in what the CPU has instructions for; or both in the `dtype` that is named.

    offload: leave the weights of the blocks on disk, from where they come one block at a time (see held.py); what the
    checkpoint's files do not hold as the model wants it is written to that folder. A .gguf file must be unpacked before
    (see unpacked.py). outline: `skeleton` of it, where there is one already. places: where each of these blocks comes,
    and whether it stays; without, all come to `device` and go."""
    register()
    target = find_device(device)
    config = load_config(source)
    arguments = source.arguments() | {"config": config}
    if offload is not None:
        assert not source.gguf_file
        arguments |= _left_on_disk(outline or skeleton(source), target, offload)
    if source.gguf_file:
        arguments["dtype"] = torch.bfloat16 if dtype == "auto" else find_dtype(dtype)
        if hasattr(transformers, "GgufConfig"):  # newer transformers would keep the packed weights
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        arguments["dtype"] = dtype if dtype == "auto" else find_dtype(dtype)
        arguments["use_safetensors"] = True
    if wants_eager(config):
        arguments["attn_implementation"] = "eager"
    if source.is_wrapper:
        arguments["key_mapping"] = wrapped.TENSORS
    others = wrapped.without_others() if source.is_wrapper else nullcontext()
    with _as_user_error(source), _by_what_it_says(source), without_bars(), quietly(), others:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True, **arguments)
    model: PreTrainedModel
    model, found = loaded
    if source.is_wrapper:  # by which save_pretrained would name the tensors as they were here
        vars(model).pop("_weight_conversions", None)
    _check_prefix(source, found)
    for problem in ("missing_keys", "mismatched_keys"):
        if found.get(problem):  # transformers only warns, and fills in random numbers
            first = sorted(map(str, found[problem]))[0]
            raise BrokenCheckpoint(f"{source.name}: {first} is missing or of the wrong shape; fetch it again")
    if source.gguf_file:  # the weights are plain now, and are saved as such
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
    if offload is None:
        if dtype == "auto":
            compute_in_auto(model, target)
        return model.to(target).eval()  # type: ignore[arg-type]
    from kvprune.models import shelf  # accelerate is wanted here alone

    weights = shelf.as_it_came(model)
    if dtype == "auto":
        compute_in_auto(model, target)
    path = _path_of_blocks(model)
    count = len(model.get_submodule(path))  # type: ignore[arg-type]
    shelf.let_come(model, path, weights, places or [Place(target, False)] * count)
    return model.eval()


def skeleton(source: Source, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """The model as `load_model` would load it, without its weights; with the table of RoPE."""
    config: Any = load_config(source)
    with _as_user_error(source), _by_config(source):
        asked = asked_dtype(dtype, config.dtype or torch.bfloat16, find_device(device))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=asked)
        rotary = getattr(model.base_model, "rotary_emb", None)
        if rotary is not None:
            model.base_model.rotary_emb = type(rotary)(config)
    return model


def _path_of_blocks(model: PreTrainedModel) -> str:
    return f"{model.base_model_prefix}.{family_of(model.config.model_type).layers}"


def _left_on_disk(model: PreTrainedModel, device: torch.device, folder: Path) -> dict[str, Any]:
    """What tells from_pretrained to leave the blocks on disk; model: without weights."""
    from kvprune.models.shelf import around

    path = _path_of_blocks(model)
    blocks = {f"{path}.{number}": "disk" for number in range(len(model.get_submodule(path)))}  # type: ignore[arg-type]
    there = str(device) if device.type != "cuda" else device
    return {
        "device_map": dict.fromkeys(around(model, path), there) | blocks,
        "offload_folder": str(folder),
    }


def _check_prefix(source: Source, found: dict[str, Any]) -> None:
    """Raise BrokenCheckpoint for tensors that are all there, but named as in a model that wraps another."""
    names = sorted(map(str, found.get("unexpected_keys") or ()))
    for missing in map(str, found.get("missing_keys") or ()):
        wrapped = next((name for name in names if name.endswith("." + missing)), None)
        if wrapped is not None:
            raise BrokenCheckpoint(
                f"{source.name} has {wrapped} in place of {missing}: it was saved from a model that wraps another "
                "(torch.compile, peft, DDP); save the model inside it"
            )


def load_config(source: Source) -> PreTrainedConfig:
    """The architecture without its weights; refuses what `load_model` refuses by it."""
    return copy.deepcopy(source.config)


def _read_config(source: Source) -> PreTrainedConfig:
    register()
    if not source.gguf_file:
        _check_settings(source)
    config: Any
    with _as_user_error(source), _by_config(source):
        config = AutoConfig.from_pretrained(source.folder, **source.arguments())
        if source.is_wrapper:
            config = wrapped.text_config(config)
        if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
            config.pad_token_id = None  # nothing is computed with it, but transformers builds no embedding with it
        if source.gguf_file:
            family_of(config.model_type)
            gguf.complete(config, gguf.read_header(Path(source.name)))
    return config


def _read_settings(source: Source) -> dict[str, Any]:
    with _as_user_error(source), _by_config(source):
        revision = {"revision": source.revision} if source.revision else {}
        return check_settings(source.name, PreTrainedConfig.get_config_dict(source.folder, **revision)[0])


def _check_settings(source: Source) -> None:
    """Refuse by config.json what cannot be read, before transformers makes anything of it."""
    with _as_user_error(source):
        if not source.is_local:
            check_adapter(source.folder, source.revision)
    if not source.is_wrapper:
        family_of(source.settings.get("model_type", "unknown"))
    check_quantised(source.name, source.settings)


@contextmanager
def _by_config(source: Source, file: str = "config.json"):
    """Raise BrokenCheckpoint for whatever transformers makes of a config that describes no model; and what
    `_as_user_error` knows better as it came."""
    try:
        yield
    except (KVPruneError, OSError, ValueError, ImportError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = source.name if source.gguf_file else f"{file} of {source.name}"
        raise BrokenCheckpoint(f"{what} cannot be used: {reason}; fetch it again") from error


@contextmanager
def _by_what_it_says(source: Source):
    """Where a model cannot be loaded, look whether its config alone, or generation config, is the reason."""
    try:
        yield
    except Exception as error:
        if source.gguf_file is None and not isinstance(error, KVPruneError) and not is_out_of_memory(error):
            skeleton(source)
            with _by_config(source, "generation_config.json"), suppress(OSError):
                GenerationConfig.from_pretrained(source.folder, revision=source.revision or "main")
        raise


@contextmanager
def _as_user_error(source: Source):
    """What from_pretrained raises for a source that cannot be read, in one line."""
    try:
        yield
    except KVPruneError:
        raise
    except (SafetensorError, EOFError, struct.error, IndexError, KeyError) as error:
        raise BrokenCheckpoint(f"{source.name} is damaged: {first_line(error)}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise BrokenCheckpoint(f"{source.name} has tensors of the wrong shape; fetch it again") from error
    except (OSError, ValueError) as error:
        if source.gguf_file and "architecture" in str(error):
            raise UnsupportedArchitecture(f"{source.name}: {first_line(error)}; {supported()}") from error
        if "safetensors" in str(error) and not source.is_local:
            raise UnsafeWeights(f"{source.name} has no safetensors weights: {first_line(error)}") from error
        raise UnknownSource(f"cannot load {source.name}: {first_line(error)}") from error
