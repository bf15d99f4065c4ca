"""What runs a pruned model. `modeling.py` stands alone; `register` makes transformers find it.

Importing kvprune must stay quick, and modeling.py needs all of torch. So transformers is first
given a placeholder per family, which loads modeling.py when a pruned config is really read.
"""

import importlib

FAMILIES = ("llama", "mistral", "qwen2")  # as in modeling.py, which cannot be imported for it
PREFIX = "kvprune_"


class _Placeholder:
    """Stands in for a pruned config class until a checkpoint asks for it."""

    def __init__(self, model_type: str):
        self.model_type = model_type
        self.__name__ = f"KVPrunePlaceholder_{model_type}"

    def from_dict(self, config_dict, **kwargs):
        """What AutoConfig calls; modeling.py registers the real class in this one's place."""
        importlib.import_module("kvprune.runtime.modeling")
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type].from_dict(config_dict, **kwargs)


def register() -> None:
    """Let AutoConfig, and through it AutoModelForCausalLM, load pruned checkpoints."""
    from transformers import CONFIG_MAPPING

    for family in FAMILIES:
        if PREFIX + family not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(PREFIX + family, _Placeholder(PREFIX + family))  # type: ignore[arg-type]
