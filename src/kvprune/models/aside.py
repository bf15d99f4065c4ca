"""Loading a model whose blocks stay on disk, with a folder for weights that the source's files do not hold as the model
wants them."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from kvprune import processes
from kvprune.models.places import Place
from kvprune.models.source import Source, load_model
from kvprune.models.unpacked import unpack
from kvprune.runtime.files import DENSE, writing_to

Phase = Callable[[str, int], AbstractContextManager[Callable[..., None]]]  # a name, and of how many steps


def load_left_on_disk(
    source: Source,
    outline: PreTrainedModel,
    places: Sequence[Place],
    folder: Path,
    device: str,
    dtype: str,
    phase: Phase,
) -> PreTrainedModel:
    """outline: the model without weights; places: of its blocks; folder: one that all processes see. A .gguf file is
    unpacked into it. See `load_model` for the rest."""
    own = folder / str(processes.number())
    if source.gguf_file:
        with phase("unpack", len(places)) as advance:
            source = processes.after_main(partial(unpack, source, outline, dtype, folder / "gguf", advance))
    with phase("load", 1):
        with writing_to(folder):
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True)
        return load_model(source, device, dtype, own, outline, places)


def tidy(out: Path) -> None:
    """Take away what stood in `out` for the source's files, from this run or one that was killed."""
    aside = out / DENSE
    if aside.exists():
        shutil.rmtree(aside if processes.is_main() else aside / str(processes.number()), ignore_errors=True)
        for place in (aside, out):
            with suppress(OSError):  # something is in it, or another process was faster
                place.rmdir()
