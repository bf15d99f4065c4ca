"""`TokenFilter`: a context in which a model keeps, or attends to, a part of its tokens only."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from kvprune.errors import BadOption, FilterMisuse
from kvprune.options import given_of, preset_options, whole_numbers
from kvprune.tokens.admission import Admission
from kvprune.tokens.late import LateAdmission
from kvprune.tokens.settings import PRESETS, Settings
from kvprune.tokens.skipping import Skipping


class TokenFilter:
    """Keep a part of the tokens online, with no calibration.

        with kvprune.TokenFilter(keep=0.5)(model) as f:
            model.generate(...)
        f.report

    The model, dense or pruned by kvprune, is as it was when the context ends.
    """

    def __init__(
        self,
        ratio: float | None = None,
        *,
        keep: float | None = None,
        preset: str | None = None,
        record: bool = False,
        sinks: int | None = None,
        block: int | None = None,
        signal: str | None = None,
        seed: int | None = None,
        window: int | None = None,
        length: int | None = None,
        drop_ratio: float | None = None,
        tail: float | None = None,
        layers: Sequence[int] | None = None,
        layer_ratio: float | str | None = None,
        decide_every: int | None = None,
        warmup: int | None = None,
        gamma: float | None = None,
        output_gamma: float | None = None,
        on_skip: str | None = None,
        keys: str | None = None,
        fusion: str | None = None,
        threshold: str | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        eta: float | None = None,
        prompt_length: int | None = None,
    ):
        """There are two ways; None leaves an option to the way's default, or to the preset.

        keep: share of the KV bytes that is kept, by late admission [ours]. With it go, as fields of Admission: block
        (default 64), window (64), sinks (4), signal ("key-distance"), seed (0), length.
        Or ratio: share of all attention to skip (0.25), as Token Filtering does (arXiv 2512.07090). With it go, as
        fields of tokens.settings.Settings: drop_ratio, tail (0.5), layers, layer_ratio (0.75, or "all"), decide_every
        (1), warmup (32), sinks (4), gamma (0.9), output_gamma (0.7), on_skip ("anchor", "zero"), keys ("pre-rope",
        "post-rope"), fusion ("variance"), signal ("similarity", "random"), threshold ("quantile"), block (16), alpha
        (0.1), beta (0.98), eta (0.005), seed (0), prompt_length; preset="paper" for the paper's choices; and
        record=True, to keep every decision for `skipped`.
        Raises BadOption and UnreachableRatio for the options; UnsupportedArchitecture and FilterMisuse for the model;
        FilterMisuse and CacheMismatch from inside the context, each before anything changes.
        """
        parameters = locals()
        options = given_of(Admission, parameters) | given_of(Settings, parameters)
        self._way: LateAdmission | Skipping
        if keep is not None:
            for name, value in {"ratio": ratio, "preset": preset, "record": record or None}.items():
                if value is not None:
                    raise BadOption(f"{name} is of the filter that skips attention; leave it out, or keep")
            self._way = LateAdmission(Admission(**_known(options, Admission)))
        else:
            chosen = preset_options(preset, PRESETS, options)
            self._way = Skipping(Settings(**{**_known(options, Settings), **chosen}), record)

    @property
    def settings(self) -> Admission | Settings:
        return self._way.settings

    def rates(self, layers: int) -> dict[int, float]:
        """The share of tokens that skips, of the layers in which some do, of a model of so many layers."""
        return self._way.rates(layers)

    def __call__(self, model: PreTrainedModel) -> "TokenFilter":
        """Bind to a model, which is not changed before the context is entered."""
        self._way(model)
        return self

    def __enter__(self) -> "TokenFilter":
        self._way.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._way.__exit__(*exception)

    @property
    def report(self) -> dict[str, Any]:
        """What was kept or skipped, and saved, since the context was entered; see report.py."""
        return self._way.report

    @property
    def skipped(self) -> np.ndarray:
        """Which tokens skipped which layer, (layers, B, tokens) bool, with record=True and one batch in the context."""
        if isinstance(self._way, LateAdmission):
            raise FilterMisuse("with keep no token skips a layer; there is nothing recorded")
        return self._way.skipped


def asked_filter(
    skip: float | None = None,
    preset: str | None = None,
    layers: str | Sequence[int] | None = None,
    keep: float | None = None,
) -> TokenFilter | None:
    """The filter of the options --keep, or --skip, --skip-preset and --skip-layers; None without either. Raises
    BadOption."""
    for name, value in (("--skip-preset", preset), ("--skip-layers", layers)):
        if value is not None and skip is None:
            raise BadOption(f"{name} {value} needs --skip: the share of attention to skip")
    if keep is not None:
        if skip is not None:
            raise BadOption("--keep and --skip are two ways to filter tokens; give one of them")
        return TokenFilter(keep=keep)
    if skip is None:
        return None
    options: dict[str, Any] = {} if layers is None else {"layers": whole_numbers("skip-layers", layers)}
    return TokenFilter(skip, preset=preset, **options)


def _known(options: dict[str, Any], kind: type[Admission] | type[Settings]) -> dict[str, Any]:
    """The options, all of them fields of `kind`. Raises BadOption."""
    names = [field.name for field in fields(kind)]
    for name in options:
        if name not in names:
            way, other = ("ratio", "keep") if kind is Settings else ("keep", "ratio")
            raise BadOption(f"{name} is of TokenFilter({other}=...), not of {way}; choose among {', '.join(names)}")
    return options
