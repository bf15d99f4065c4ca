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
from kvprune.models.aside import Phase, load_left_on_disk
from kvprune.models.family import family_of, mlp_width
from kvprune.models.held import held
from kvprune.models.in_memory import InMemory, copied
from kvprune.models.places import Place, place
from kvprune.models.source import load_model, resolve, skeleton
from kvprune.recovery.settings import Settings
from kvprune.recovery.train import MICRO_TOKENS
from kvprune.recovery.trainee import blocks
from kvprune.runtime.dtype import name_of


@dataclass(frozen=True)
class Room:
    """limit: bytes that may be used of the device, None for what is free. weights: bytes of the pruned model;
    activations: of one piece of a batch. aside: see `load_left_on_disk`."""

    device: torch.device
    limit: int | None
    weights: int
    activations: int
    aside: Path

    def left(self) -> int | None:
        """Bytes beside the pruned model and its activations; None where nobody says."""
        if self.limit is not None:
            return self.limit - self.weights - self.activations
        free = memory.free(self.device)
        return None if free is None else free - self.activations


def load_teacher(
    s: Settings,
    given: InMemory | None,
    record: dict[str, Any],
    lm: PreTrainedModel,
    room: Room,
    phase: Phase,
    say: Callable[[str], None],
) -> PreTrainedModel:
    """The dense model, frozen, in the dtype of the pruned model `lm`: given, named in the settings, or in the folder's
    record. Where there is no room for it, blocks stay on disk. Raises UnknownSource or BadOption."""
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
            outline = skeleton(source, device, dtype)
            places = _places(outline, room, say)
            for kind in (s.dtype, dtype):  # loaded again where they differ, since `to` would round the rotary table too
                if places is not None:
                    teacher = load_left_on_disk(source, outline, places, room.aside, device, kind, phase)
                else:
                    with phase("load", 1):
                        teacher = load_model(source, device, kind)
                if teacher.dtype == lm.dtype:
                    break
    except KVPruneError as error:
        raise UnknownSource(f"the teacher {name}: {error}; name the dense model with --teacher") from error
    for what in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = (getattr(model.config, what) for model in (lm, teacher))
        if mine != theirs:
            raise BadOption(f"the teacher {name} has {what} {theirs}, the pruned model {mine}; name another")
    return teacher.requires_grad_(False)


def _places(outline: PreTrainedModel, room: Room, say: Callable[[str], None]) -> list[Place] | None:
    """Where the teacher's blocks come, as many as there is room for to stay; None where all of it has room."""
    sizes = [memory.weight_bytes(block) for block in family_of(outline.config.model_type).blocks(outline)]
    whole, left = memory.weight_bytes(outline), room.left()
    if left is None or whole <= left:
        return None
    outside = whole - sum(sizes)
    found = place(sizes, [room.device], [left - outside - max(sizes)])
    stay = sum(one.stays for one in found)
    say(
        f"the teacher's blocks stay on disk{f', but for {stay} of {len(found)}' if stay else ''}: there is no room for "
        f"its {whole / 2**30:.3g} GiB"
    )
    return found


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
