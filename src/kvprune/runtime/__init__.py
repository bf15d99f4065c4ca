"""What runs a pruned model. `modeling.py` stands alone; `register` makes transformers find it.

Importing kvprune must stay quick, and modeling.py needs all of torch. So transformers is first
given a placeholder per family, which loads modeling.py when a pruned config is really read.
"""

import importlib

# As in modeling.py, which cannot be imported for it; those that this transformers does not know are left out there.
# fmt: off
FAMILIES = (
    "apertus", "arcee", "cohere", "cohere2", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "internlm3", "jais2", "lfm2", "llama", "minimax_m2",
    "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi",
    "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
)
# fmt: on
PREFIX = "kvprune_"


class _Placeholder:
    """Stands in for a pruned config class until a checkpoint asks for it."""

    def __init__(self, model_type: str):
        self.model_type = model_type
        self.__name__ = f"KVPrunePlaceholder_{model_type}"

    def from_dict(self, config_dict, **kwargs):
        """What AutoConfig calls; modeling.py registers the real class in this one's place."""
        modeling = importlib.import_module("kvprune.runtime.modeling")
        modeling.register()
        return modeling.config_class(self.model_type.removeprefix(PREFIX)).from_dict(config_dict, **kwargs)


def register() -> None:
    """Let AutoConfig, and through it AutoModelForCausalLM, load pruned checkpoints by kvprune's own code.

    It is used whatever code a folder carries, and with trust_remote_code=True too: transformers takes what is
    registered from outside it before what comes with a checkpoint. Code of a folder that was loaded before this is
    replaced; models made of it stay as they are.
    """
    from transformers import CONFIG_MAPPING

    for name in (PREFIX + family for family in FAMILIES):
        known = CONFIG_MAPPING[name].__module__ if name in CONFIG_MAPPING else ""
        if known.partition(".")[0] != "kvprune":
            CONFIG_MAPPING.register(name, _Placeholder(name), exist_ok=True)  # type: ignore[arg-type]


def push_model(model, repo_id, **options):
    """What `push_to_hub` of a pruned model calls: see hub.py."""
    from kvprune.runtime.hub import push_model

    return push_model(model, repo_id, **options)


def look_at_copy(name: str) -> None:
    """What modeling.py calls before it reads a folder's config: see refresh.py."""
    from kvprune.runtime.refresh import look

    look(name)
