"""What kvprune.json, the index of the weights and a bench must be to be read. Fields that nobody reads are free."""

from pathlib import PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator
from typing_extensions import TypedDict


def _plain(name: str) -> str:
    if name != PurePath(name).name:
        raise ValueError(f"{name!r} is no file of this folder")
    return name


Name = Annotated[str, AfterValidator(_plain)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Some = Annotated[int, Field(ge=1, le=2**62)]
Perplexity = Annotated[float, Field(gt=0)]  # infinity is one
Drawn = Annotated[float, Field(ge=-1e15, le=1e15)]
Spread = Annotated[list[Drawn], Field(min_length=2, max_length=2)]


class _Checked(BaseModel):
    """Nothing is made into what it is not: the value itself is used."""

    model_config = ConfigDict(strict=True)


class Files(_Checked):
    """The checksum of each file of the folder."""

    files: dict[Name, str]


class Index(_Checked):
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, Name]


Heads = Annotated[list[Annotated[int, Field(ge=1, le=2**20)]], Field(min_length=2, max_length=2)]  # number, channels


class Pair(_Checked):
    """Of the dense and of the pruned model."""

    dense: Some
    pruned: Count


class Row(_Checked):
    """A measured perplexity; dense: None where there was no dense model to measure."""

    text: str
    window: Count
    tokens: Count
    dense: Perplexity | None
    pruned: Perplexity
    before: Perplexity = 1.0


class Learnt(_Checked):
    """The text that something was learnt from."""

    text: str
    tokens: Count


class Recovered(Learnt):
    loss: str
    steps: Count


class _Recorded(TypedDict, total=False):
    """A record's figures and words, of those fields that it has."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    source: str
    revision: str | None
    ratio_achieved: FiniteFloat
    kv_bytes_per_token: Pair
    parameters: Pair
    weights_read_bytes: Pair | None
    kv_heads: Pair
    merge: Annotated[int, Field(ge=1, le=2**20)]
    widths: list[Count]
    attention_layers: list[Count] | None
    dropped_blocks: list[Count]
    head_dim: Annotated[int, Field(ge=1, le=2**20)]
    per_layer: list[Heads]
    layout: str
    method: dict[str, Any]
    calibration: Learnt | None
    recovered: Recovered
    sensitivity: list[Drawn] | None
    perplexity: list[Row]
    seconds: dict[str, FiniteFloat]
    peak_memory_bytes: Count
    memory_formula_bytes: dict[str, Count]
    dtype: str
    device: str
    seed: int
    versions: dict[str, str]


def _fitting(record: _Recorded) -> _Recorded:
    merge = record.get("merge", 1)
    if "head_dim" in record and max(record.get("widths", ()), default=0) > record["head_dim"] * merge:
        raise ValueError("a layer is wider than its heads")
    layers = record.get("attention_layers")
    if layers is not None and len(layers) != len(record.get("widths", ())):
        raise ValueError("attention_layers and widths are not of as many layers")
    if merge > 1 and "kv_heads" not in record:
        raise ValueError("heads were merged, and kv_heads is missing")
    if "per_layer" in record and len(record["per_layer"]) != len(record.get("widths", ())):
        raise ValueError("per_layer and widths are not of the same layers")
    return record


def layer_numbers(record: dict[str, Any]) -> list[int]:
    """Which layer of the model each of `widths` is of: in a hybrid only some have attention."""
    found = record.get("attention_layers")
    return list(range(len(record["widths"]))) if found is None else found


def whole_widths(record: dict[str, Any]) -> list[int]:
    """What each layer's heads would have, nothing removed, merged ones of all that became one; empty where a record
    does not say."""
    alike = [record["head_dim"]] * len(record["widths"]) if "head_dim" in record else []
    channels = [own for _, own in record["per_layer"]] if "per_layer" in record else alike
    return [own * record.get("merge", 1) for own in channels]


Recorded: TypeAdapter = TypeAdapter(Annotated[_Recorded, AfterValidator(_fitting)])


class Where(_Checked):
    """What was timed, and on what."""

    source: str
    against: str | None
    device: str
    skip: Drawn | None
    keep: Drawn | None = None
    kv_bits: Count | None = None
    pruned_shape_ratio: Drawn | None


class Sides(_Checked):
    dense: Drawn
    pruned: Drawn


class Bytes(_Checked):
    weights: Drawn | None
    kv_cache: Drawn | None
    activations: Drawn | None


class Held(_Checked):
    dense: Bytes
    pruned: Bytes


class Spreads(_Checked):
    prefill: Spread
    decode: Spread


class Cell(_Checked):
    """Times and bytes of both models at one batch and context; spread: the lowest and the highest ratio."""

    batch: Count
    context: Count
    prefill_seconds: Sides
    decode_tokens_per_second: Sides
    latency_seconds: Sides
    prefill_ratio: Drawn
    decode_ratio: Drawn
    decode_limit: Drawn
    spread: Spreads
    memory_bytes: Held

    @model_validator(mode="after")
    def _check(self) -> "Cell":
        for ratio, (low, high) in ((self.prefill_ratio, self.spread.prefill), (self.decode_ratio, self.spread.decode)):
            if not low <= ratio <= high:
                raise ValueError("a ratio is outside of its spread")
        return self


class Failed(_Checked):
    """A cell for which there was no memory."""

    batch: Count
    context: Count
    error: Annotated[str, Field(min_length=1)]


class Bench(_Checked):
    """What `bench --out` writes."""

    environment: Where
    cells: Annotated[list[Cell | Failed], Field(min_length=1)]
