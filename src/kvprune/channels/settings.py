"""Every choice of a prune, its default, and what it may be."""

from dataclasses import asdict, dataclass
from typing import Any

from kvprune.channels.choice.merging import AUTO, asked_merge
from kvprune.channels.evidence.importance import IMPORTANCE
from kvprune.channels.repair import REPAIRS
from kvprune.channels.widths.asked import asked_depth, check_drop_blocks, check_layout
from kvprune.errors import BadOption
from kvprune.options import preset_options
from kvprune.text.corpus import text_names

CHANNELS = ("split", "joint")
ALLOCATIONS = ("sensitivity", "rank", "uniform", "budget")
PROBES = ("estimated", "measured")
TAU = 3.0
READ_BY = {  # which options say how widths are found, by allocation
    "sensitivity": ("probes", "probe_tokens", "probe", "tau"),
    "rank": ("probes", "probe_tokens", "probe"),
    "budget": ("probes", "probe_tokens"),
}
ESTIMATED_ON = 2048  # tokens: one backward pass says enough on few
LAYOUTS = ("per-layer", "uniform", "portable", "stock")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a plan; two runs with the same settings give the same plan.

    ratio: fraction of the KV bytes per token to remove. allocation: None is budget, or uniform where the layout has one
    width for all layers. merge: how many KV heads become one, or AUTO (see planning.choose_merge); heads are merged
    only with split channels, a repair that rotates, and the importance "variance". tensor_parallel: how many ranks are
    to share the KV heads that are left. align and min_width count channels of a KV head of the pruned model. probe:
    fraction of a block's channels that its sensitivity probe removes (None: the ratio); probe_tokens: how much of the
    calibration text a probe reads (None: ESTIMATED_ON, or all of it where probes are measured). probes: sensitivities
    are estimated from one backward pass (see estimate.py), or measured, as the paper has it. repair: None is
    rotate+refit, or refit for joint channels; repair_tokens: how much text refit takes, at most, from the beginning of
    the calibration text. tau: see allocation.by_sensitivity. calibration_window and windows in tokens. layout stock
    does nothing but merge, so its ratio says how many heads. depth: how many layers lose their attention, or AUTO (see
    widths/depth.py), and drop_blocks: how many lose all of their block beside these (see widths/blocks.py); the others
    then keep more.
    """

    source: str
    ratio: float = 0.5
    importance: str = "variance"
    channels: str = "split"
    merge: int | str = AUTO
    tensor_parallel: int = 1
    depth: int | str = 0
    drop_blocks: int = 0
    allocation: str | None = None
    layout: str = "per-layer"
    repair: str | None = None
    repair_tokens: int = 32768
    probes: str | None = None
    probe: float | None = None
    probe_tokens: int | None = None
    tau: float | None = None
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
        for name in ("source", "calibration", "plan"):  # paths are welcome, and JSON wants strings
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))
        object.__setattr__(self, "eval", text_names(self.eval))
        object.__setattr__(self, "windows", tuple(self.windows))
        if self.repair is None:
            object.__setattr__(self, "repair", "refit" if self.channels == "joint" else "rotate+refit")
        self._decide_widths()
        choices = {
            "importance": tuple(IMPORTANCE),
            "channels": CHANNELS,
            "allocation": ALLOCATIONS,
            "probes": (*PROBES, None),
            "layout": LAYOUTS,
            "repair": REPAIRS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise BadOption(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(filter(None, allowed))}")
        if self.probe_tokens is not None and self.probe_tokens < 2:
            raise BadOption("probe_tokens must be at least 2")
        for name in ("calibration_tokens", "calibration_window", "eval_tokens", "repair_tokens"):
            if getattr(self, name) < 2:
                raise BadOption(f"{name} must be at least 2")
        if not self.windows or min(self.windows) < 2:
            raise BadOption("an evaluation window must have at least 2 tokens")
        if self.channels == "joint" and self.rotates:
            raise BadOption(
                f"--repair {self.repair} rotates V/O, which --channels joint cuts with Q/K; use refit or none"
            )
        self._check_merge()
        self._check_depth()
        if self.tau is not None and not self.tau > 0:
            raise BadOption("tau must be positive")
        if self.probe is not None and not 0 < self.probe <= 1:
            raise BadOption("the probe must lie above 0 and up to 1")

    def _decide_widths(self) -> None:
        """Fill in what says how widths are found. Raises BadOption for an option that nothing would read."""
        if self.allocation is None:
            object.__setattr__(self, "allocation", "uniform")
        if self.layout != "per-layer" and self.allocation != "uniform":
            raise BadOption(f"--layout {self.layout} has one width for all layers; leave out --allocation")
        read = READ_BY.get(str(self.allocation), ())
        for name in ("probes", "probe_tokens", "probe", "tau"):
            if getattr(self, name) is not None and name not in read:
                wanted = " or ".join(how for how, names in READ_BY.items() if name in names)
                raise BadOption(
                    f"--{name.replace('_', '-')} says nothing to --allocation {self.allocation}; leave it out, or add "
                    f"--allocation {wanted}"
                )
        if self.probes is None and "probes" in read:
            object.__setattr__(self, "probes", "estimated")
        if self.probe_tokens is None and self.probes == "estimated":
            object.__setattr__(self, "probe_tokens", ESTIMATED_ON)
        if self.tau is None and "tau" in read:
            object.__setattr__(self, "tau", TAU)

    def _check_merge(self) -> None:
        wants = "--channels split, --importance variance and --repair rotate or rotate+refit"
        if self.layout == "stock" and self.ratio > 0 and not self.can_merge:
            raise BadOption(f"--layout stock merges KV heads: that wants {wants}")
        object.__setattr__(self, "merge", asked_merge(self.merge))
        if self.tensor_parallel < 1:
            raise BadOption("--tensor-parallel must be at least 1: among how many ranks the KV heads are shared")
        if self.merge not in (AUTO, 1) and not self.can_merge:
            raise BadOption(f"--merge {self.merge} changes the basis across heads: that wants {wants}")

    def _check_depth(self) -> None:
        object.__setattr__(self, "depth", asked_depth(self.depth))
        check_drop_blocks(self.drop_blocks, self.layout)
        check_layout("depth", self.depth, self.layout)
        for option, given in (("depth", self.depth), ("drop-blocks", self.drop_blocks)):
            if given and self.allocation != "uniform":
                raise BadOption(f"--{option} {given} shares what is left evenly; leave out --allocation")

    @property
    def can_merge(self) -> bool:
        """Whether KV heads can be merged at all."""
        return self.rotates and self.channels == "split" and self.importance == "variance"

    @property
    def rotates(self) -> bool:
        return str(self.repair).startswith("rotate")

    @property
    def refits(self) -> bool:
        return str(self.repair).endswith("refit")

    def as_json(self) -> dict[str, Any]:
        """The fields as they come back from JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def with_preset(preset: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options and what the preset adds to them. Raises BadOption for an unknown preset, and for an option that it,
    or a given plan, has decided."""
    decided = preset_options(preset, PRESETS, options)
    names = ", ".join("--" + name.replace("_", "-") for name in sorted(DECIDED_BY_A_PLAN & {*options, *decided}))
    if options.get("plan") is not None and names:
        raise BadOption(f"--plan has decided {names} already; leave one of them out")
    return {**options, **decided}


DECIDED_BY_A_PLAN = {
    *(
        "ratio",
        "importance",
        "channels",
        "merge",
        "depth",
        "drop_blocks",
        "allocation",
        "layout",
        "repair",
        "probes",
        "probe_tokens",
        "probe",
        "tau",
        "align",
        "min_width",
    ),
    "repair_tokens",
}

PRESETS: dict[str, dict[str, Any]] = {
    # the paper: arXiv 2409.11057
    "kvpruner": {
        "importance": "taylor",
        "channels": "joint",
        "allocation": "sensitivity",
        "probes": "measured",
        "layout": "per-layer",
        "repair": "none",
        "merge": 1,
    }
}
