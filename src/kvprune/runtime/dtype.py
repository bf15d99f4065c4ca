"""In which dtype a model computes, which need not be the one that it is stored in.

A CPU without instructions for bfloat16 multiplies it several times slower than float32. `--dtype auto` computes in
float32 there. What is written keeps the dtype of the source all the same, which the model's config says.
"""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from kvprune.errors import BadOption

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Flags of x86 and of ARM, as Linux and PyTorch call them. Any of them is enough.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "asimdhp", "fp16", "arm_fp16"),
}
log = logging.getLogger("kvprune")


def find_dtype(name: str) -> torch.dtype:
    """The dtype that an option names, other than "auto". Raises BadOption."""
    if name not in DTYPES:
        raise BadOption(f"unknown dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache
def cpu_flags() -> frozenset[str]:
    """What this CPU can do, as PyTorch and Linux say; empty where nobody says."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    flags = {name for name, there in known.items() if there is True}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.lower().startswith(("flags", "features")):
            return frozenset(flags | set(line.split(":", 1)[1].split()))
    return frozenset(flags)


def computes_in(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What `--dtype auto` computes in, for weights that are stored in `stored` [ours]."""
    flags = cpu_flags()
    if device.type != "cpu" or stored not in INSTRUCTIONS or not flags or flags & {*INSTRUCTIONS[stored]}:
        return stored
    return torch.float32


def asked_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What `--dtype` computes in: what is named, or what is best for weights that are stored so. Raises BadOption."""
    return computes_in(stored, device) if name == "auto" else find_dtype(name)


def compute_in_auto(model: PreTrainedModel, device: torch.device) -> None:
    """Let a model that was loaded as it is stored compute in what `device` is fast in; say so where that differs."""
    model.config.dtype = stored = model.dtype
    chosen = computes_in(stored, device)
    if chosen != stored:
        _say_once(chosen, stored)
        model.to(dtype=chosen)  # type: ignore[call-arg]


@lru_cache
def _say_once(chosen: torch.dtype, stored: torch.dtype) -> None:
    log.warning(
        f"computing in {name_of(chosen)}: this CPU has no instructions for {name_of(stored)}, in which the weights are "
        f"stored and written (--dtype {name_of(stored)} computes in it all the same)"
    )


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """What a model's weights are written in."""
    stored = model.config.dtype
    if isinstance(stored, str):  # what saving leaves there
        stored = DTYPES.get(stored)
    return cast(torch.dtype, stored or model.dtype)


@torch.no_grad()
def round_as_stored(model: PreTrainedModel) -> None:
    """Round the weights, in place, to what will be written, so that what is measured is what is written."""
    stored = stored_dtype(model)
    if stored != model.dtype:
        for parameter in model.parameters():
            if not parameter.is_meta:  # on disk, as it will be written
                parameter.copy_(parameter.to(stored))
