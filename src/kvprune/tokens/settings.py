"""Every choice of a token filter, its default, and what it may be."""

import math
from dataclasses import dataclass
from typing import Any

from kvprune.errors import BadOption, UnreachableRatio
from kvprune.options import whole_numbers
from kvprune.tokens.fusion import FUSIONS
from kvprune.tokens.threshold import THRESHOLDS, Rule

SIGNALS = ("similarity", "random")
KEYS = ("pre-rope", "post-rope")
ON_SKIP = ("anchor", "zero")
ALL = "all"
MOST = 0.95  # share of its tokens that a layer may be asked to skip: the rest keeps threshold and anchor alive


@dataclass(frozen=True)
class Settings:
    """Source: Token Filtering (arXiv 2512.07090) where not said otherwise; docs/tokens.md has the paper's variants.

    ratio: share of all (token, layer) attention computations to skip, after warm-up, over the whole model. drop_ratio:
    share whose K/V are not cached [ours]; None: the skipped ones. tail: share of the layers, counted from the last,
    that may skip. layers: the layers that may, in the order in which they are taken [ours]; None: the tail's, from the
    last backwards. layer_ratio: as few of them skip as the ratio needs if each may skip this share of its tokens, and
    all where that is not enough [ours]; "all": all of them, as the paper has it. Those that skip do so at one rate.
    decide_every: of so many of these layers in a row, the first one's decisions hold for all [ours]; 1: each its own.
    warmup: first tokens that are never skipped; sinks: the same, beside it, for cached K/V and output [ours]. gamma,
    output_gamma [ours]: memory of the anchors of keys and values, and of the outputs. on_skip: what a skipped token's
    attention gives: the output anchor [ours], or zero. keys: similarity before or behind RoPE [ours]. threshold, block
    [ours], alpha, beta [ours], eta: see threshold.py. signal: "random" is a baseline that takes tokens at the same rate
    [ours], drawn with `seed`. prompt_length: absolute position behind the prompt's final token, which is never skipped
    [ours]; None: what `generate` is given, and no such token in other calls.
    """

    ratio: float = 0.25
    drop_ratio: float | None = None
    tail: float = 0.5
    layers: tuple[int, ...] | None = None
    layer_ratio: float | str = 0.75
    decide_every: int = 1
    warmup: int = 32
    sinks: int = 4
    gamma: float = 0.9
    output_gamma: float = 0.7
    on_skip: str = "anchor"
    keys: str = "pre-rope"
    fusion: str = "variance"
    signal: str = "similarity"
    threshold: str = "quantile"
    block: int = 16
    alpha: float = 0.1
    beta: float = 0.98
    eta: float = 0.005
    seed: int = 0
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "on_skip": ON_SKIP,
            "keys": KEYS,
            "fusion": tuple(FUSIONS),
            "signal": SIGNALS,
            "threshold": tuple(THRESHOLDS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise BadOption(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(known)}")
        for name in ("ratio", "drop_ratio", "alpha", "eta"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= 0):
                raise BadOption(f"{name} must be a finite number, at least 0, not {value!r}")
        for name in ("gamma", "output_gamma", "beta"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise BadOption(f"{name} must lie from 0 to below 1, not {value!r}")
        if not (_is_number(self.tail) and 0 < self.tail <= 1):
            raise BadOption(f"tail must lie above 0 and be at most 1, not {self.tail!r}")
        if self.layer_ratio != ALL and not (_is_number(self.layer_ratio) and 0 < float(self.layer_ratio) <= MOST):
            raise BadOption(f"layer_ratio must lie above 0 and be at most {MOST}, or {ALL!r}, not {self.layer_ratio!r}")
        least_of = {"warmup": 0, "sinks": 0, "block": 1, "seed": 0, "prompt_length": 1, "decide_every": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise BadOption(f"{name} must be a whole number, at least {least}, not {value}")

        if self.layers is not None:
            object.__setattr__(self, "layers", whole_numbers("layers", self.layers))
            if not self.layers or min(self.layers) < 0:
                raise BadOption(f"layers must be whole numbers, at least one, from 0 on, not {list(self.layers)}")
            if len(set(self.layers)) < len(self.layers):
                raise BadOption(f"layers must differ from each other, not {list(self.layers)}")

    @property
    def first(self) -> int:
        """Absolute position of the first token that may be skipped: whole blocks, and at least one."""
        return max(math.ceil(max(self.warmup, self.sinks) / self.block), 1) * self.block

    def rates(self, ratio: float, layers: int) -> dict[int, float]:
        """What share of its tokens each layer that skips must skip, of a model of so many layers.

        Raises BadOption and UnreachableRatio.
        """
        order = self._order(layers)
        most = MOST * len(order) / layers
        if ratio > most + 1e-9:
            which = f"the {len(order)} layers given" if self.layers else f"the last {len(order)} of {layers} layers"
            remedy = "give more layers" if self.layers else "raise tail or name the layers"
            raise UnreachableRatio(
                f"{which} can skip {math.floor(1000 * most) / 1000:g} of all attention at most, not {ratio:g}; "
                f"ask for less, or {remedy}"
            )
        number = len(order)
        if self.layer_ratio != ALL:
            number = min(max(math.ceil(ratio * layers / float(self.layer_ratio) - 1e-9), 1), number)
        return dict.fromkeys(sorted(order[:number]), ratio * layers / number)

    def _order(self, layers: int) -> list[int]:
        """The layers that may skip, the first to be taken first."""
        if self.layers is None:
            return list(range(layers - 1, layers - math.ceil(self.tail * layers - 1e-9) - 1, -1))
        beyond = [layer for layer in self.layers if layer >= layers]
        if beyond:
            raise BadOption(f"layers: the model has {layers}, numbered from 0; there is no {beyond[0]}")
        return list(self.layers)

    def rule(self, target: float) -> Rule:
        return Rule(target, self.first, self.block, self.alpha, self.beta, self.eta)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2512.07090, where it says; what it leaves open is as above
    "paper": {"on_skip": "zero", "fusion": "variance", "gamma": 0.9, "threshold": "adaptive", "layer_ratio": ALL}
}
