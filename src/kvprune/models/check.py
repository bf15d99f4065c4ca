"""What of a checkpoint is refused before anything large is read."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import find_adapter_config_file

from kvprune.errors import BadOption, BrokenCheckpoint, UnknownSource, UnsafeWeights
from kvprune.runtime.files import RECORD, RESUME, verify_files

MOST = 1 << 14  # layers, heads, experts, or channels of a head
_COUNTED = re.compile(r"(^|_)((layers?|heads?|experts?)$|head_dim)")


def check_folder(folder: Path, needs_weights: bool) -> None:
    """A local checkpoint has config.json and, where they are needed, whole safetensors files and no adapter."""
    complete = (folder / "config.json").is_file()
    if needs_weights or not complete:
        check_adapter(str(folder))
    if not complete:
        if (folder / RESUME).is_dir():
            raise UnknownSource(f"{folder} is an unfinished run; finish it with: kvprune prune ... --resume")
        raise UnknownSource(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    if needs_weights:
        _check_weights(folder)
    if (folder / RECORD).is_file():
        verify_files(folder)


def _check_weights(folder: Path) -> None:
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
            raise BrokenCheckpoint(f"{shard} is damaged ({first_line(error)}); fetch or make it again") from None


def check_adapter(name: str, revision: str | None = None) -> None:
    """Raise BadOption for a folder or hub id with a peft adapter: transformers would load it on top of the weights, as
    modules that are neither cut nor saved with them."""
    if find_adapter_config_file(name, revision=revision) is not None:
        raise BadOption(
            f"{name} has an adapter (adapter_config.json); merge it first: peft.AutoPeftModelForCausalLM."
            f"from_pretrained({name!r}).merge_and_unload().save_pretrained(DIR), and the tokenizer to the same DIR"
        )


def check_settings(name: str, settings: Any) -> dict[str, Any]:
    """What config.json holds, if it is an object and its layers, heads and experts can be counted: a model is made of
    them before any weight is read. Raises BrokenCheckpoint."""
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type", ""), str):
        raise BrokenCheckpoint(f"config.json of {name} is no JSON object that names a model_type; fetch it again")
    for part in (settings, settings.get("text_config")):
        for key, value in part.items() if isinstance(part, dict) else ():
            if _COUNTED.search(key) and isinstance(value, (int, float)) and not abs(value) <= MOST:
                raise BrokenCheckpoint(f"config.json of {name}: {key} is {value}, more than {MOST}; fetch it again")
    return settings


def check_quantised(name: str, settings: dict[str, Any]) -> None:
    """Raise BadOption for a config.json of quantised weights."""
    if settings.get("quantization_config") or settings.get("compression_config"):
        raise BadOption(f"{name} has quantised weights, which kvprune does not read; give the unquantised model")


def first_line(error: BaseException) -> str:
    """For messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
