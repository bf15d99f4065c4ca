"""vLLM finds pruned models: an entry point of its plugins. With kvprune beside vLLM, `vllm serve DIR` is enough.

vLLM calls `plugin` in each of its processes. It imports neither torch nor a model: vLLM does, when a folder is served.
"""

from typing import Any

from kvprune.runtime import FAMILIES, register

BACKEND = "vllm.model_executor.models.transformers"
# Families with experts, for which vLLM's Transformers backend has a class of its own. That does not find what Gemma 4
# calls them by, nor their activation: its one model with experts runs in the plain class, as transformers has it.
EXPERTS = (
    *("dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "mixtral", "olmoe", "phimoe"),
    *("hunyuan_v1_moe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open"),
)
# Names in a config, read in vLLM 0.32: by those of experts it decides for the class of its own, which must find one of
# the others (transformers_utils/model_arch_config_convertor.py and model_executor/models/transformers/moe.py).
_NUMBER = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_PER_TOKEN = ("num_experts_per_tok", "top_k")


def plugin() -> None:
    """Register the configs with transformers, and with vLLM the class that runs each pruned family: the one that vLLM
    itself takes for `--model-impl transformers`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from vllm import ModelRegistry

    register()
    for model_type in FAMILIES:
        name = CONFIG_MAPPING_NAMES.get(model_type)
        if name is not None:  # this transformers knows the family
            kind = "TransformersMoEForCausalLM" if model_type in EXPERTS else "TransformersForCausalLM"
            ModelRegistry.register_model(architecture(name), f"{BACKEND}:{kind}")


def architecture(config: str) -> str:
    """What config.json calls the pruned twin of a family, whose config class has this name."""
    return f"KVPrune{config.removesuffix('Config')}ForCausalLM"


def needs_plugin(config: Any) -> bool:
    """Whether vLLM stops at the experts of a pruned model, by its config, unless the plugin has named a class for it:
    it counts them, and does not find how many of them a token gets."""
    return any(getattr(config, name, None) for name in _NUMBER) and not any(
        getattr(config, name, None) for name in _PER_TOKEN
    )
