"""SOURCE -> model. A source is a hub id, a checkpoint folder, a pruned folder or a .gguf file."""

import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
from kvprune.models.family import family_of, supported
from kvprune.progress import without_bars
from kvprune.runtime import register
from kvprune.runtime.dtype import compute_in_auto, find_dtype
from kvprune.runtime.files import RECORD, RESUME, verify_files


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

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for every from_pretrained."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code or None}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.revision:
            arguments["revision"] = self.revision
        return arguments


def resolve(source: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find out what `source` is. Raises UnknownSource, UnsafeWeights or BrokenCheckpoint."""
    name = str(source)
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UnknownSource(f"there is no file {name}")
        _check_gguf(path)
        return Source(name, str(path.parent), path.name, None, trust_remote_code)
    if path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise UnknownSource(f"{name} is a file, but no .gguf; give a checkpoint folder, a .gguf file or a hub id")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UnknownSource(f"there is no folder {name}")
    return Source(name, name, None, revision, trust_remote_code)


def _check_gguf(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UnknownSource(f"reading {path} needs the gguf package: pip install gguf") from None
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BrokenCheckpoint(f"{path} is no GGUF file; fetch it again")


def _check_folder(folder: Path) -> None:
    """A local checkpoint has config.json and whole safetensors files."""
    if not (folder / "config.json").is_file():
        if (folder / RESUME).is_dir():
            raise UnknownSource(f"{folder} is an unfinished run; finish it with: kvprune prune ... --resume")
        raise UnknownSource(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
            raise UnsafeWeights(
                f"{folder} has pickle weights only, which can run code; save it again with safe_serialization=True"
            )
        raise BrokenCheckpoint(f"{folder} has no .safetensors file; fetch the checkpoint again")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise BrokenCheckpoint(f"{shard} is damaged ({_first_line(error)}); fetch or make it again") from None
    if (folder / RECORD).is_file():
        verify_files(folder)


def load_model(source: Source, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """The model in eval mode on `device`, which is stored (see dtype.py) in the checkpoint's own dtype, bfloat16 for
    GGUF, and computes in that or in what the CPU has instructions for; or both in the `dtype` that is named."""
    register()
    target = find_device(device)
    arguments = source.arguments() | {"config": load_config(source)}
    if source.gguf_file:
        arguments["dtype"] = torch.bfloat16 if dtype == "auto" else find_dtype(dtype)
        if hasattr(transformers, "GgufConfig"):  # newer transformers would keep the packed weights
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        arguments["dtype"] = dtype if dtype == "auto" else find_dtype(dtype)
        arguments["use_safetensors"] = True
    with _as_user_error(source), without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True, **arguments)
    model: PreTrainedModel
    model, found = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if found.get(problem):  # transformers only warns, and fills in random numbers
            first = sorted(map(str, found[problem]))[0]
            raise BrokenCheckpoint(f"{source.name}: {first} is missing or of the wrong shape; fetch it again")
    if source.gguf_file:  # the weights are plain now, and are saved as such
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
    if dtype == "auto":
        compute_in_auto(model, target)
    return model.to(target).eval()  # type: ignore[arg-type]


def load_config(source: Source) -> PreTrainedConfig:
    """The architecture without its weights; refuses what `load_model` refuses by it."""
    register()
    _check_architecture(source)
    with _as_user_error(source):
        config = AutoConfig.from_pretrained(source.folder, **source.arguments())
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        config.pad_token_id = None  # nothing is computed with it, but transformers builds no embedding with it
    return config


def _check_architecture(source: Source) -> None:
    """Raise UnsupportedArchitecture, or BadOption for quantised weights, before anything large is read."""
    with _as_user_error(source):
        if source.gguf_file:
            settings = AutoConfig.from_pretrained(source.folder, **source.arguments()).to_dict()
        else:
            revision = {"revision": source.revision} if source.revision else {}
            settings, _ = PreTrainedConfig.get_config_dict(source.folder, **revision)
    family_of(settings.get("model_type", "unknown"))
    if settings.get("quantization_config") and not source.gguf_file:
        raise BadOption(f"{source.name} has quantised weights, which cannot be cut; give the unquantised model")


def find_device(name: str) -> torch.device:
    """The device that an option names, "auto" being the GPU if there is one. Raises BadOption."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadOption(f"device {name!r} cannot be used: {_first_line(error)}") from None


@contextmanager
def _as_user_error(source: Source):
    """What from_pretrained raises for a source that cannot be read, in one line."""
    try:
        yield
    except KVPruneError:
        raise
    except (SafetensorError, EOFError, struct.error, IndexError, KeyError) as error:
        raise BrokenCheckpoint(f"{source.name} is damaged: {_first_line(error)}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise BrokenCheckpoint(f"{source.name} has tensors of the wrong shape; fetch it again") from error
    except (OSError, ValueError) as error:
        if source.gguf_file and "architecture" in str(error):
            raise UnsupportedArchitecture(f"{source.name}: {_first_line(error)}; {supported()}") from error
        if "safetensors" in str(error) and not source.is_local:
            raise UnsafeWeights(f"{source.name} has no safetensors weights: {_first_line(error)}") from error
        raise UnknownSource(f"cannot load {source.name}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
