"""Every choice of a recovery, its default, and what it may be."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from kvprune.errors import BadOption
from kvprune.options import preset_options
from kvprune.recovery.losses import LOSSES
from kvprune.text.corpus import SELF, text_names

ALL_LINEAR = "all-linear"
DEFAULT_STEPS = 100
DISTIL_LR, TEXT_LR = 1e-3, 5e-4  # measured: docs/results-width.md
GENTLE_LR, SMALL_CUT = 5e-4, 0.375  # of distillation where less of the bytes is gone; measured at 0.25 and 0.5
SAMPLED = 65536  # tokens that "self" is sampled to


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is learnt; two runs with the same settings give the same weights.

    What each is, `recover` says. tokens 0 of "self" is SAMPLED. steps or epochs, not both. alpha None is twice the
    rank; lr None is what the loss wants: TEXT_LR, DISTIL_LR, or GENTLE_LR where little is cut; behind `warmup` it goes
    down to 0 by a cosine. Every `checkpoint_every` steps the state is written.
    """

    folder: str
    text: str = "wikitext2"
    tokens: int = 0
    window: int = 512
    batch: int = 4
    steps: int | None = None
    epochs: int | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    lr: float | None = None
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    loss: str = "logits"
    temperature: float = 1.0
    attention_weight: float = 1.0
    teacher: str | None = None
    checkpoint_every: int = 25
    patience: int = 3
    held_out: int = 4096
    gradient_checkpointing: bool = False
    eval: tuple[str, ...] = ()
    eval_tokens: int = 16384
    eval_windows: tuple[int, ...] = (128, 2048)
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("folder", "text", "teacher"):  # paths are welcome, and JSON wants strings
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("targets", "eval_windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "eval", text_names(self.eval))
        if self.steps is not None and self.epochs is not None:
            raise BadOption("give --steps or --epochs, not both")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        if self.loss not in LOSSES:
            raise BadOption(f"unknown loss {self.loss!r}; choose {', '.join(LOSSES)}")
        if self.teacher is not None and not self.needs_dense:
            raise BadOption(f"--loss {self.loss} has no teacher; leave --teacher out or choose a distillation loss")
        self._check_numbers()

    def _check_numbers(self) -> None:
        least: dict[str, float] = {
            "tokens": 0,
            "window": 2,
            "batch": 1,
            "steps": 0,
            "epochs": 1,
            "rank": 1,
            "lr": 0,
            "warmup": 0,
            "weight_decay": 0,
            "attention_weight": 0,
            "checkpoint_every": 1,
            "patience": 0,
            "held_out": 2,
            "eval_tokens": 2,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise BadOption(f"--{name.replace('_', '-')} must be at least {minimum}")
        for name in ("alpha", "temperature", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadOption(f"--{name} must be positive")
        if not 0 <= self.dropout < 1:
            raise BadOption("--dropout must lie from 0 to below 1")
        if not self.eval_windows or min(self.eval_windows) < 2:
            raise BadOption("an evaluation window must have at least 2 tokens")
        if not self.targets:
            raise BadOption(f"--targets is empty; give module names or {ALL_LINEAR}")

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model takes part: as a teacher, or to sample the text."""
        return LOSSES[self.loss].needs_teacher or self.text == SELF

    @property
    def highest_lr(self) -> float:
        """The learning rate behind the warm-up."""
        if self.lr is not None:
            return self.lr
        return DISTIL_LR if LOSSES[self.loss].needs_teacher else TEXT_LR

    def for_cut(self, ratio: float) -> "Settings":
        """With the learning rate for a model that has lost this share of its KV bytes."""
        gentle = self.lr is None and LOSSES[self.loss].needs_teacher and ratio < SMALL_CUT
        return replace(self, lr=GENTLE_LR) if gentle else self

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def as_json(self) -> dict[str, Any]:
        """The fields as they come back from JSON, with the learning rate that is meant."""
        fields = asdict(self) | {"lr": self.highest_lr}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


PRESETS: dict[str, dict[str, Any]] = {
    # what the papers next to KVPruner (arXiv 2409.11057) train with: LLM-Pruner's settings
    "kvpruner": {
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "lr": 1e-4,
        "loss": "next-token",
        "targets": (ALL_LINEAR,),  # Llama's seven projections, which are all that it has
        "epochs": 2,
        "batch": 64,
        "window": 256,
    }
}


def from_options(preset: str | None, options: dict[str, Any]) -> Settings:
    """Settings from what a user gave. Raises BadOption for an unknown preset, and for an option that it decides."""
    decided = preset_options(preset, PRESETS, options, replaces=("steps",))
    return Settings(**{**options, **decided})
