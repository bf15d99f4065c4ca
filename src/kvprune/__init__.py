"""kvprune prunes the KV cache of Hugging Face decoders. This file is the public API and nothing else.

Importing it lets `AutoModelForCausalLM.from_pretrained` load the folders that `prune` writes. The rest is loaded
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

from kvprune import errors
from kvprune.runtime import register

if TYPE_CHECKING:
    from kvprune.api import generate, load, load_tokenizer
    from kvprune.benchmark import bench
    from kvprune.channels.plan import PruningPlan
    from kvprune.channels.prune import Pruned, prune
    from kvprune.engines.doctor import doctor
    from kvprune.engines.gguf import export
    from kvprune.measure.evaluate import evaluate
    from kvprune.measure.fit import fit
    from kvprune.measure.perplexity import Perplexity, perplexity
    from kvprune.pages.report import report
    from kvprune.recovery.recover import Recovered, recover
    from kvprune.runtime.cache import GrowingCache
    from kvprune.runtime.files import read_record
    from kvprune.runtime.hub import push
    from kvprune.runtime.linear import pack_weights
    from kvprune.runtime.refresh import refresh
    from kvprune.studies.calibration import study_calibration
    from kvprune.studies.depth import study_depth
    from kvprune.studies.layers import study_layers
    from kvprune.studies.retrieval import study_retrieval
    from kvprune.studies.robustness import study_robustness
    from kvprune.studies.scaling import study_scaling
    from kvprune.tokens.filter import TokenFilter

_HOMES = {
    "load": "kvprune.api",
    "load_tokenizer": "kvprune.api",
    "bench": "kvprune.benchmark",
    "prune": "kvprune.channels.prune",
    "Pruned": "kvprune.channels.prune",
    "PruningPlan": "kvprune.channels.plan",
    "evaluate": "kvprune.measure.evaluate",
    "doctor": "kvprune.engines.doctor",
    "export": "kvprune.engines.gguf",
    "fit": "kvprune.measure.fit",
    "TokenFilter": "kvprune.tokens.filter",
    "GrowingCache": "kvprune.runtime.cache",
    "pack_weights": "kvprune.runtime.linear",
    "perplexity": "kvprune.measure.perplexity",
    "Perplexity": "kvprune.measure.perplexity",
    "generate": "kvprune.api",
    "recover": "kvprune.recovery.recover",
    "refresh": "kvprune.runtime.refresh",
    "report": "kvprune.pages.report",
    "Recovered": "kvprune.recovery.recover",
    "read_record": "kvprune.runtime.files",
    "push": "kvprune.runtime.hub",
    "study_calibration": "kvprune.studies.calibration",
    "study_depth": "kvprune.studies.depth",
    "study_layers": "kvprune.studies.layers",
    "study_retrieval": "kvprune.studies.retrieval",
    "study_robustness": "kvprune.studies.robustness",
    "study_scaling": "kvprune.studies.scaling",
}

__all__ = [
    "GrowingCache",
    "Perplexity",
    "Pruned",
    "PruningPlan",
    "Recovered",
    "TokenFilter",
    "bench",
    "doctor",
    "errors",
    "evaluate",
    "export",
    "fit",
    "generate",
    "load",
    "load_tokenizer",
    "pack_weights",
    "perplexity",
    "prune",
    "push",
    "read_record",
    "recover",
    "refresh",
    "report",
    "study_calibration",
    "study_depth",
    "study_layers",
    "study_retrieval",
    "study_robustness",
    "study_scaling",
]

register()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kvprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
