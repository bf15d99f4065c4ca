"""vLLM finds pruned models: an entry point of its plugins. With kvprune beside vLLM, `vllm serve DIR` is enough.

vLLM calls `plugin` in each of its processes. It imports neither torch nor a model: vLLM does, when a folder is served.
"""

from kvprune.runtime import FAMILIES, register

BACKEND = "vllm.model_executor.models.transformers"
# Families with experts, for which vLLM's Transformers backend has a class of its own. That does not find what Gemma 4
# calls them by, nor their activation: its one model with experts runs in the plain class, as transformers has it.
EXPERTS = (
    *("dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "mixtral", "olmoe", "phimoe"),
    *("hunyuan_v1_moe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open"),
)


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
