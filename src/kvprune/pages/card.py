"""The model card of a pruned folder: README.md, with metadata for the hub, from kvprune.json and nothing else.

It is written once. Who edits it keeps what they wrote.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kvprune.runtime import PREFIX
from kvprune.runtime.shown import layer_numbers, whole_widths
from kvprune.text.corpus import HUB

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_TRAINED_WITH = ("text", "tokens", "window", "batch", "steps", "epochs", "rank", "lr", "loss", "seed")


def card(record: dict[str, Any], model_type: str) -> str:
    """README.md of a folder with this record and this model_type in config.json; the same for the same.

    What the record does not have is left out. Of files and folders only the names are told, not where they are. Raises
    LookupError, TypeError, ValueError or AttributeError for a damaged record.
    """
    name = _name(record, model_type)
    removed = f"{record['ratio_achieved']:.0%} of the KV cache removed" if "ratio_achieved" in record else "pruned"
    base, kv = record.get("base_model"), record.get("kv_bytes_per_token")
    recovered = list(_recovered(record))
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["kvprune", "kv-cache", "pruned", model_type.removeprefix(PREFIX)],
        model_name=name,
        eval_results=_results(record) or None,
        **(record.get("license") or {}),
    )
    written = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=f"{name}, {removed}",
        version=record.get("versions", {}).get("kvprune", ""),
        base=f"[{base}](https://huggingface.co/{base})" if base else name,
        shrunk=f": {kv['pruned']:,} bytes a token in place of {kv['dense']:,}" if kv else "",
        facts=list(_facts(record)),
        table=_table(record),
        has_code=model_type.startswith(PREFIX),
        commands=[_prune_command(record), *(_recover_command(one["settings"]) for one in recovered)],
        method=", ".join(f"{k.replace('_', ' ')} {v}" for k, v in record.get("method", {}).items() if v is not None),
        trained=[_trained(one) for one in recovered],
    )
    return str(written)


def _name(record: dict[str, Any], model_type: str) -> str:
    """The hub id, or the last part of a path."""
    own = _last(record.get("source") or "").removesuffix(".gguf")
    return record.get("base_model") or own or f"a {model_type.removeprefix(PREFIX)} model"


def _last(path: str) -> str:
    """Of a file's or folder's path its name, in one line that may stand in a table."""
    return " ".join(Path(path).name.split()).replace("|", "/")


def _facts(record: dict[str, Any]) -> Iterator[str]:
    """What is left, line by line."""
    if "layout" in record:
        yield f"Layout: {record['layout']}; written in {record.get('dtype', 'the dtype of the source')}."
    heads = record.get("kv_heads")
    if "per_layer" in record and record.get("merge", 1) > 1:
        yield f"Of a layer's KV heads every {record['merge']} are merged into one."
    elif heads and heads["dense"] != heads["pruned"]:
        yield f"KV heads of a layer: {heads['pruned']}, merged from {heads['dense']}."
    widths = record.get("widths")
    if widths:
        numbers, only = layer_numbers(record), record.get("attention_layers")
        kept = f"{widths[0]} in each of {len(widths)} layers" if len(set(widths)) == 1 else ", ".join(map(str, widths))
        sizes = " or ".join(map(str, sorted(set(whole_widths(record)))))
        dense = f" (of {sizes})" if sizes else ""
        yield f"Channels that a KV head keeps{dense}: {kept}."
        if only is not None:
            yield f"These are the layers with attention, {', '.join(map(str, only))}; the others are as they were."
        if 0 in widths:
            gone = [str(number) for number, width in zip(numbers, widths, strict=True) if not width]
            yield f"Layers without attention: {', '.join(gone)}."
    if record.get("dropped_blocks"):
        yield f"Layers whose whole block is gone: {', '.join(map(str, record['dropped_blocks']))}."


def _table(record: dict[str, Any]) -> list[list[str]]:
    """Dense against pruned, the header first; empty where nothing was measured."""
    rows, was_trained = [], any("before" in row for row in record.get("perplexity", []))
    for field, label in (("kv_bytes_per_token", "KV bytes a token"), ("parameters", "parameters")):
        if field in record:
            sizes = [f"{record[field][side]:,}" for side in ("dense", "pruned")]
            rows.append([label, *sizes[:1], *([sizes[1]] if was_trained else []), sizes[1]])
    for row in record.get("perplexity", []):
        values = [row["dense"], *([row.get("before")] if was_trained else []), row["pruned"]]
        label = f"perplexity, {_last(row['text'])}, windows of {row['window']} ({row['tokens']:,} tokens)"
        rows.append([label, *("" if value is None else f"{value:.2f}" for value in values)])
    sides = ["dense", "pruned", "recovered"] if was_trained else ["dense", "pruned"]
    return [["", *sides], *rows] if rows else []


def _results(record: dict[str, Any]) -> list[EvalResult]:
    """The perplexities as the hub's model-index has them. The dense model's is beside each, as what it was measured
    with: a metric of its own would count as this model's."""
    found = []
    for row in record.get("perplexity", []):
        dataset, config, revision, *_ = HUB.get(row["text"], (_last(row["text"]), None, None))
        measured_with = {"window": row["window"], "tokens": row["tokens"], "dense": row["dense"]}
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=_last(row["text"]),
                dataset_config=config,
                dataset_split="test" if row["text"] in HUB else None,
                dataset_revision=revision,
                metric_type="perplexity",
                metric_name=f"perplexity, windows of {row['window']} tokens",
                metric_value=row["pruned"],
                metric_args={name: value for name, value in measured_with.items() if value is not None},
            )
        )
    return found


def _prune_command(record: dict[str, Any]) -> str:
    """What makes the same again, from the plan."""
    words = ["kvprune", "prune", record.get("base_model") or "SOURCE", "--out", "DIR", "--plan", "plan.json"]
    text = record.get("calibration")
    if text:
        words += ["--calibration", _last(text["text"]), "--calibration-tokens", str(text["tokens"])]
    for name in ("revision", "seed"):
        if record.get(name):
            words += [f"--{name}", str(record[name])]
    return shlex.join(words)


def _recovered(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every recovery, the first one first."""
    if record.get("recovered"):
        yield from _recovered({"recovered": record["recovered"].get("earlier")})
        yield record["recovered"]


def _recover_command(settings: dict[str, Any]) -> str:
    words = ["kvprune", "recover", "DIR", "--out", "OUT"]
    for name in _TRAINED_WITH:
        value = settings.get(name)
        if value not in (None, 0):
            words += [f"--{name}", _last(value) if name == "text" else str(value)]
    return shlex.join(words)


def _trained(recovered: dict[str, Any]) -> str:
    """A sentence on one recovery."""
    settings = recovered["settings"]
    return (
        f"Then trained: LoRA adapters of rank {settings['rank']} on {_last(settings['text'])} ({recovered['tokens']:,} "
        f"tokens, {recovered['steps']} steps), with the loss {settings['loss']}, merged into the weights."
    )
