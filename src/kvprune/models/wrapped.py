"""A checkpoint of a multimodal model that wraps a text model -> the text model alone.

Many text models are published only beside a vision tower: config.json has a `text_config`, and the text model's tensors
stand below `language_model` among those of the tower. Given text alone these wrappers compute what their text model
does, so that is what is loaded; the tower's tensors are not read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from kvprune.errors import UnsupportedArchitecture
from kvprune.models.family import WRAPPERS, family_of
from kvprune.progress import replaced

# Text models that differ from a family in RoPE over three positions a token (time, height, width), which text has equal
THREE_POSITIONS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
OWN_LOGITS = ("gemma4",)  # wrappers that make logits as their text model does, with its cap or factor
# Where checkpoints of different ages have the text model's tensors, and where it has them when it stands alone
TENSORS = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.(language_model|text_model)\.": "model.",
}
# What is not the text model's, by its own names
OTHERS = r"^(?!model\.(layers|embed_tokens\w*|norm|per_layer\w+)\.|lm_head\.)"


def is_wrapper(settings: dict[str, Any]) -> bool:
    """Whether config.json is that of a wrapper whose text model can be had."""
    return settings.get("model_type") in WRAPPERS


def text_config(wrapper: PreTrainedConfig) -> PreTrainedConfig:
    """The text model's own config. Raises UnsupportedArchitecture where its family is not supported, or scales logits
    as the wrapper does not."""
    inner: Any = wrapper.get_text_config(decoder=True)
    model_type = THREE_POSITIONS.get(inner.model_type, inner.model_type)
    try:
        family = family_of(model_type)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"the text model of {wrapper.model_type!r}: {error}") from None
    _, number = family.logits or ("", "")
    if number and wrapper.model_type not in OWN_LOGITS and getattr(inner, number, None) not in (None, 1.0):
        raise UnsupportedArchitecture(
            f"{wrapper.model_type!r} makes logits without its text model's {number}, and they are not the same"
        )
    settings = inner.to_dict() | {"tie_word_embeddings": wrapper.tie_word_embeddings}  # transformers asks the wrapper
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    rope = settings.get("rope_parameters") or {}
    if model_type != inner.model_type or "mrope_section" in rope:
        kept = {k: v for k, v in rope.items() if k not in ("mrope_section", "mrope_interleaved", "type")}
        settings["rope_parameters"] = kept | ({"rope_type": "default"} if kept.get("rope_type") == "mrope" else {})
    if settings.get("dtype") is None:
        settings["dtype"] = wrapper.dtype
    return CONFIG_MAPPING[model_type](**settings)


@contextmanager
def without_others() -> Iterator[None]:
    """transformers reports no tensors of the tower as unexpected."""
    with replaced(PreTrainedModel, _keys_to_ignore_on_load_unexpected=[OTHERS]):
        yield
