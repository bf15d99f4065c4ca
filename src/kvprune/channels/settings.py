"""Every choice of a prune, its default, and what it may be."""

from dataclasses import asdict, dataclass
from typing import Any

from kvprune.channels.importance import IMPORTANCE
from kvprune.errors import BadOption

CHANNELS = ("split", "joint")
ALLOCATIONS = ("sensitivity", "rank", "uniform")
LAYOUTS = ("per-layer", "uniform", "portable")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a plan; two runs with the same settings give the same plan.

    ratio: fraction of the KV bytes per token to remove. probe: fraction of a block's channels that its sensitivity
    probe removes (None: the ratio). tau: see allocation.by_sensitivity. calibration_window and windows in tokens.
    """

    source: str
    ratio: float = 0.5
    importance: str = "energy"
    channels: str = "split"
    allocation: str = "sensitivity"
    layout: str = "per-layer"
    repair: str = "none"
    probe: float | None = None
    tau: float = 3.0
    calibration: str = "wikitext2"
    calibration_tokens: int = 16384
    calibration_window: int = 512
    eval: tuple[str, ...] = ()
    eval_tokens: int = 16384
    windows: tuple[int, ...] = (128, 2048)
    align: int = 8
    min_width: int = 16
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    plan: str | None = None

    def __post_init__(self) -> None:
        for name in ("calibration", "plan"):  # paths are welcome, and JSON wants strings
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))
        object.__setattr__(self, "eval", tuple(map(str, self.eval)))
        choices = {
            "importance": tuple(IMPORTANCE),
            "channels": CHANNELS,
            "allocation": ALLOCATIONS,
            "layout": LAYOUTS,
            "repair": ("none",),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise BadOption(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(allowed)}")
        for name in ("calibration_tokens", "calibration_window", "eval_tokens"):
            if getattr(self, name) < 2:
                raise BadOption(f"{name} must be at least 2")
        if not self.windows or min(self.windows) < 2:
            raise BadOption("an evaluation window must have at least 2 tokens")
        if not self.tau > 0:
            raise BadOption("tau must be positive")
        if self.probe is not None and not 0 < self.probe <= 1:
            raise BadOption("the probe must lie above 0 and up to 1")

    def as_json(self) -> dict[str, Any]:
        """The fields as they come back from JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


PRESETS: dict[str, dict[str, Any]] = {
    # the paper: arXiv 2409.11057
    "kvpruner": {
        "importance": "taylor",
        "channels": "joint",
        "allocation": "sensitivity",
        "layout": "per-layer",
        "repair": "none",
    }
}
