"""The pruning plan: which channels stay, as plain JSON that can be read, edited, diffed and applied again."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from kvprune.errors import PlanMismatch
from kvprune.models.attention import AttentionShape


class LayerPlan(BaseModel):
    """What one layer keeps, ascending: qk[h] and vo[h] for KV head h of the pruned model.

    All heads of a layer keep the same number, and K keeps as many as V; a layer that keeps none has no attention. vo is
    None where there was a change of basis before the cut: the leading directions of V stayed, and qk are numbers of the
    basis's coordinates (see basis.py), which only the weights and the calibration text can tell. Else both are channels
    in the dense numbering. heads[h]: the dense KV heads that were merged into head h; None where each stayed for
    itself. block: whether there is more than a constant; without, nothing is kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    qk: tuple[tuple[int, ...], ...]
    vo: tuple[tuple[int, ...], ...] | None
    heads: tuple[tuple[int, ...], ...] | None = None
    block: bool = True

    @property
    def width(self) -> int:
        return len(self.qk[0])

    @model_validator(mode="after")
    def _check(self) -> "LayerPlan":
        if not self.qk or any(part is not None and len(self.qk) != len(part) for part in (self.vo, self.heads)):
            raise ValueError("qk, vo and heads need one list per KV head")
        for kept in (*self.qk, *(self.vo or ())):
            if len(kept) != self.width:
                raise ValueError("every KV head of a layer must keep the same number of channels")
            if list(kept) != sorted(set(kept)) or (kept and kept[0] < 0):
                raise ValueError("kept channels must be ascending and distinct")
        if self.width and not self.block:
            raise ValueError("a layer without its block keeps no channels")
        return self


class Model(BaseModel):
    """The model that a plan was made for; sizes as in AttentionShape."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    revision: str | None
    architecture: str
    layers: int
    hidden: int
    kv_heads: int
    groups: int
    head_dim: int
    per_layer: tuple[tuple[int, int], ...] = ()
    sources: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] | None = None

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(**{field.name: getattr(self, field.name) for field in fields(AttentionShape)})


def _method(method: dict[str, Any]) -> dict[str, Any]:
    """What of it is used again."""
    for name, kind in (("importance", str), ("repair", str), ("repair_tokens", int)):
        if not isinstance(method.get(name, kind()), kind):
            raise ValueError(f"{name} is {method[name]!r}")
    return method


class PruningPlan(BaseModel):
    """What to keep in every layer, and where that came from.

    `method` is how it was decided (importance, channels, allocation, ...), `calibration` on what text,
    `sensitivity` the change of mean loss (nats) when that block alone was probed (None if not measured).
    merge: how many dense KV heads make one of the pruned model. format 1: made before heads could be merged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1, 2] = 2
    model: Model
    ratio: FiniteFloat
    layout: str
    merge: int = Field(default=1, ge=1)
    method: Annotated[dict[str, Any], AfterValidator(_method)]
    calibration: dict[str, Any] | None
    sensitivity: tuple[FiniteFloat, ...] | None
    seed: int
    versions: dict[str, str]
    layers: tuple[LayerPlan, ...]

    @property
    def widths(self) -> list[int]:
        """Kept channels per KV head, layer by layer."""
        return [layer.width for layer in self.layers]

    @property
    def dropped_blocks(self) -> list[int]:
        """The numbers of the blocks that are gone whole, ascending."""
        numbers = self.model.shape.numbers
        return [number for number, layer in zip(numbers, self.layers, strict=True) if not layer.block]

    @property
    def is_rotated(self) -> bool:
        """Whether some layer had a change of basis before the cut."""
        return any(layer.vo is None for layer in self.layers)

    @property
    def ratio_achieved(self) -> float:
        """Fraction of the dense KV bytes per token that goes."""
        shape = self.model.shape
        kept = sum(self.widths[layer] * shape.of(layer).kv_heads for layer in shape.stores)
        return 1 - kept / (shape.channels * self.merge)

    def check(self, architecture: str, shape: AttentionShape) -> None:
        """Raise PlanMismatch unless this plan fits a model of that shape, in which channels c and c + half of a head
        (of a merged one: of its coordinates) leave Q and K together."""
        for name, value in {"architecture": architecture, **asdict(shape)}.items():
            if getattr(self.model, name) != value:
                raise PlanMismatch(
                    f"the plan is for another model: its {name} is {getattr(self.model, name)}, the model's is {value}"
                )
        if len(self.layers) != shape.layers:
            raise PlanMismatch(f"the plan has {len(self.layers)} layers, the model {shape.layers}; make it again")
        if self.format == 1 and self.is_rotated:
            raise PlanMismatch("the plan was made by an older kvprune, whose rotation was another one; make it again")
        if any((layer.vo is None) != (self.is_rotated or self.merge > 1) for layer in self.layers):
            raise PlanMismatch("a plan has vo in every layer, or null in all, as where heads are merged; make it again")
        for i, (layer, own) in enumerate(zip(self.layers, shape.each, strict=True)):
            size, kv_heads = own.head_dim * self.merge, own.kv_heads
            highest = max((c for kept in (*layer.qk, *(layer.vo or ())) for c in kept), default=-1)
            if len(layer.qk) * self.merge != kv_heads or highest >= size:
                raise PlanMismatch(f"layer {i} of the plan does not fit {kv_heads} KV heads of {own.head_dim}")
            heads = layer.heads or [(head,) for head in range(len(layer.qk))]
            if {len(group) for group in heads} != {self.merge} or sorted(sum(heads, ())) != [*range(kv_heads)]:
                raise PlanMismatch(f"layer {i} of the plan must have every KV head in one group of {self.merge}")
            of_source = self.layers[shape.source(i)]
            if (layer.qk, layer.vo, layer.heads) != (of_source.qk, of_source.vo, of_source.heads):
                raise PlanMismatch(f"layer {i} of the plan keeps other channels than the layer that has its keys")
            for kept in map(set, layer.qk):
                if any((c + size // 2) % size not in kept for c in kept):
                    raise PlanMismatch(f"layer {i} of the plan splits a RoPE pair; keep both of its channels or none")

    def to_json(self) -> str:
        """One layer a line, so that two plans can be compared with diff."""
        # per_layer, sources, attention_layers and `block` stand only where they say something: an older kvprune then
        # reads the plan too
        silent = {name for name in ("per_layer", "sources", "attention_layers") if not getattr(self.model, name)}
        head = self.model_dump_json(indent=2, exclude={"layers": True, "model": silent})
        rows = ",\n".join("    " + x.model_dump_json(exclude={"block"} if x.block else None) for x in self.layers)
        return head[:-2] + ',\n  "layers": [\n' + rows + "\n  ]\n}\n"

    @classmethod
    def read(cls, path: str | Path) -> "PruningPlan":
        """Read a plan.json, or the one in a pruned folder. Raises PlanMismatch if it is no valid plan."""
        path = Path(path)
        if path.is_dir():
            path = path / "plan.json"
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError):
            raise PlanMismatch(f"cannot read a plan from {path}; give a plan.json or a pruned folder") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise PlanMismatch(f"{path} is no valid plan: {where}: {first['msg']}") from None
