"""The dense model beside the pruned one: whether there is room for it, and how it is loaded."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprune.errors import BadOption, KVPruneError, UnknownSource
from kvprune.measure import memory
from kvprune.models.family import family_of, mlp_width
from kvprune.models.held import held
from kvprune.models.in_memory import InMemory, copied
from kvprune.models.source import Source, load_model, resolve, skeleton
from kvprune.recovery.settings import Settings
from kvprune.recovery.train import MICRO_TOKENS
from kvprune.recovery.trainee import blocks
from kvprune.runtime.dtype import name_of


@dataclass(frozen=True)
class Room:
    """limit: bytes that may be used of the device, None for what is free. weights: bytes of the pruned model;
    activations: of one piece of a batch. aside: a folder for weights that the source's files do not hold as the model
    wants them."""

    device: torch.device
    limit: int | None
    weights: int
    activations: int
    aside: Path

    def holds(self, teacher: int) -> bool:
        """Whether a teacher of so many bytes has room beside the pruned model."""
        if self.limit is not None:
            return self.weights + teacher + self.activations <= self.limit
        free = memory.free(self.device)
        return free is None or teacher + self.activations <= free


def load_teacher(
    s: Settings,
    given: InMemory | None,
    record: dict[str, Any],
    lm: PreTrainedModel,
    room: Room,
    say: Callable[[str], None],
) -> PreTrainedModel:
    """The dense model, frozen, in the dtype of the pruned model `lm`: given, named in the settings, or in the folder's
    record. Where there is no room for it, its blocks stay on disk. Raises UnknownSource or BadOption."""
    name = s.teacher or record["source"]
    if s.teacher is None and record.get("from_memory"):
        raise UnknownSource(
            f"{s.folder} was made of a model in memory ({name}), which may be saved anywhere by now: give it, or "
            "its folder, with --teacher"
        )
    device, dtype = str(room.device), name_of(lm.dtype)
    try:
        if given is not None:
            teacher = copied(given, device, dtype)
        else:
            source = resolve(name, None if s.teacher else record.get("revision"))
            offload = _offload(source, device, dtype, room, say)
            teacher = load_model(source, device, s.dtype, offload)
            if teacher.dtype != lm.dtype:  # loaded so, since `to` would round the rotary table as well
                teacher = load_model(source, device, dtype, offload)
    except KVPruneError as error:
        raise UnknownSource(f"the teacher {name}: {error}; name the dense model with --teacher") from error
    for what in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = (getattr(model.config, what) for model in (lm, teacher))
        if mine != theirs:
            raise BadOption(f"the teacher {name} has {what} {theirs}, the pruned model {mine}; name another")
    return teacher.requires_grad_(False)


def _offload(source: Source, device: str, dtype: str, room: Room, say: Callable[[str], None]) -> Path | None:
    """Where the teacher's blocks are kept aside; None where they are in memory, as a .gguf file's must be."""
    theirs = memory.weight_bytes(skeleton(source, device, dtype))
    if room.holds(theirs) or source.gguf_file is not None:
        return None
    say(f"the teacher's blocks stay on disk: there is no room for its {theirs / 2**30:.3g} GiB")
    return room.aside


def activations(lm: PreTrainedModel, s: Settings, window: int, processes: int) -> int:
    """Bytes of those of one piece of a batch."""
    config = lm.config
    tokens = min(MICRO_TOKENS, max(s.batch // processes, 1) * window)
    h, m = config.hidden_size, mlp_width(config)
    a_layer = (16 * h + 6 * m) * lm.dtype.itemsize
    if lm.dtype.itemsize < 4:
        a_layer += 4 * (6 * h + m)  # the adapters' inputs, in float32
    layers = 1 + config.num_hidden_layers / 8 if s.gradient_checkpointing else config.num_hidden_layers
    return int(tokens * a_layer * layers)


def fingerprint(lm: PreTrainedModel) -> str:
    """SHA-256 of all layers' attention weights."""
    digest = hashlib.sha256()
    family = family_of(lm.config.model_type)
    for block in blocks(lm)[1]:
        attention = family.attention_of(block)
        with held(block):
            for parameter in () if attention is None else attention.parameters():
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
