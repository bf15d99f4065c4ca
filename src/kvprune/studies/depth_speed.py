"""How fast the models of a study of depth decode, beside the dense one.

Widths and missing blocks decide that, not what the numbers are: the models are made anew with random weights, from the
configs that the prunes have left in the journal, so that nothing has to be pruned again.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvprune.errors import BadOption
from kvprune.measure import memory
from kvprune.measure.shapes import random_model
from kvprune.measure.speed import Side, alternate
from kvprune.models.places import find_device
from kvprune.progress import Progress
from kvprune.runtime import modeling
from kvprune.runtime.attention import pack_groups
from kvprune.runtime.dtype import asked_dtype
from kvprune.runtime.linear import pack_weights
from kvprune.studies.journal import StudyJournal


@dataclass(frozen=True)
class Run:
    """What is timed: `rounds` times new_tokens steps behind batch x context tokens."""

    batch: int
    context: int
    new_tokens: int
    rounds: int

    def check(self, config: PreTrainedConfig) -> None:
        """Raise BadOption for what is no number from 1 up, and for more tokens than the model takes."""
        for name, value in vars(self).items():
            if value < 1:
                raise BadOption(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        tokens, limit = self.context + self.new_tokens, config.max_position_embeddings
        if tokens > limit:
            raise BadOption(f"context and new tokens are {tokens} together, the model takes {limit}; ask for fewer")


def add_speeds(
    journal: StudyJournal, dense: PreTrainedConfig, run: Run, device: str, dtype: str, progress: Progress
) -> None:
    """Time every pruned model of the journal that it has no speed of, and add that to it. dtype: as in `prune`."""
    names = ("ratio", "drop_blocks", "depth")
    timed = [[cell[name] for name in names] for cell in journal.cells if "speed" in cell]
    pruned = [cell for cell in journal.cells if cell.get("perplexity")]
    missing = [cell for cell in pruned if [cell[name] for name in names] not in timed]
    with progress.phase("speed", len(pruned)) as advance:
        advance(len(pruned) - len(missing))
        if not missing:
            return
        first = _side(dense, device, dtype)
        for cell in missing:
            config = modeling.config_class(dense.model_type).from_dict(cell["config"])
            journal.add(
                {name: cell[name] for name in names} | {"speed": _timed(first, _side(config, device, dtype), run)}
            )
            memory.release()
            advance(1)


def _side(config: PreTrainedConfig, device: str, dtype: str) -> Side:
    """A model of random weights, ready to decode as `bench` has it."""
    target = find_device(device)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    model = random_model(config, target, asked_dtype(dtype, stored, target))
    pack_groups(model)
    pack_weights(model)
    return Side(model)


def _timed(dense: Side, pruned: Side, run: Run) -> dict[str, Any]:
    """How many times as fast `pruned` decodes, and how many times as fast the bytes would let it."""
    sides = (dense, pruned)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, dense.model.config.vocab_size, (run.batch, run.context), generator=generator)
    ids = ids.to(dense.model.device)
    read = []
    for side in sides:
        with side.running():
            side.prefill(ids)
            side.decode(ids[:, -1:], math.ceil(run.new_tokens / 2))  # the cache as it is half way
        read.append(side.bytes_read())
    found = alternate(
        sides,
        lambda side: side.decode(ids[:, -1:], run.new_tokens),
        run.rounds,
        before=lambda side: side.rewind(run.context),
        warm=True,
    )
    for side in sides:
        side.forget()
    tokens = run.batch * run.new_tokens
    return {
        "decode_ratio": found.ratio,
        "spread": [found.ratios[0], found.ratios[-1]],
        "decode_limit": read[0] / read[1],
        "decode_tokens_per_second": dict(zip(("dense", "pruned"), (tokens / s for s in found.seconds), strict=True)),
    }
