"""The families: where each architecture keeps what kvprune reads and cuts.

A family is a descriptor of a line or a few. Everything else in the library sees the same attention, whatever the family
(see attention.py), and has no branch on model_type. What can be read off a dense module (biases, softmax scale, window,
sinks, cap) is not in it. Adding one: docs/adding-an-architecture.md.
"""

import difflib
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvprune.errors import UnsupportedArchitecture
from kvprune.runtime import FAMILIES as TWINS
from kvprune.runtime import PREFIX


@dataclass(frozen=True)
class Family:
    """Paths below the base model, and the shape of the projections.

    layers, norm: the decoder blocks and the norm behind them, from the base model.
    attention: the attention module, from a block that has one; others: what a hybrid's other blocks have in its place,
    in words: they stay as they are. q, k, v, o: the attention's projections; qkv: the one that holds Q, K and V, if
    they are not apart, and split how: "rows" (all of Q, all of K, all of V) or "heads" (of each head Q, K and V).
    gated: q holds of each head Q and a gate, whose sigmoid multiplies what the head puts out, before O.
    mlp, down: the MLP, from a block, and its last matrix, whose output is the MLP's and joins the residual stream; mlp
    "": down is the block's own; down "": there is no one such matrix (a mixture of experts).
    routers: linear layers of the MLP that choose among experts or weigh them, by name.
    rope: how RoPE pairs the channels of a head, of which the first `partial_rotary_factor` turn: "half" is (c, c +
    turned / 2), "interleaved" (2c, 2c + 1), "none" no RoPE. table: which columns of cos and sin are the pair's: "half"
    and "interleaved" likewise, "once" the column c for both, "narrow" too, of a table of half the width. rotates: the
    attribute of the attention that tells the layers with RoPE from those without ("is_sliding": all have it where the
    model has no window).
    norm_of: what the norm on q and k (q_norm, k_norm) takes together: "head", "all" heads, or "" for no norm;
    norm_behind_rope: RoPE turns first. v_norm: a norm on each head of V, "" for none.
    temperature: the name among rope_parameters of how much queries grow with the logarithm of their position.
    behind_attention, behind_mlp: norms of the block between what they put out and the residual stream; times: the
    config's name for what both are multiplied by there.
    logits: what the config's number of that name does to logits: ("divide" | "times" | "cap", name).
    unless: names in the config that must be false or absent, or not of this value, since what they turn on is not
    built.
    of_tokens: names in the config that, where they are set, let a block be called with more than hidden states that
    depends on the tokens.
    portable_as: the stock model_type of this family in the layouts portable and stock (a bias on V wants one on O);
    None: none holds it.
    """

    model_type: str
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    others: str = ""
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str = ""
    split: str = "rows"
    gated: bool = False
    mlp: str = "mlp"
    down: str = "down_proj"
    routers: tuple[str, ...] = ()
    rope: str = "half"
    table: str = "half"
    rotates: str = ""
    norm_of: str = ""
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    norm_behind_rope: bool = False
    v_norm: str = ""
    temperature: str = ""
    behind_attention: str = ""
    behind_mlp: str = ""
    times: str = ""
    logits: tuple[str, str] | None = None
    unless: tuple[str, ...] = ()
    of_tokens: tuple[str, ...] = ()
    portable_as: str | None = None

    def blocks(self, lm: PreTrainedModel) -> nn.ModuleList:
        """The decoder blocks of a model, dense or pruned."""
        return cast(nn.ModuleList, lm.base_model.get_submodule(self.layers))

    def attention_of(self, block: nn.Module) -> nn.Module | None:
        """The attention of a block, dense or pruned; None where it has a mixer of another kind."""
        return getattr(block, self.attention, None)

    def stack(self, lm: PreTrainedModel) -> nn.Module:
        """The module whose forward runs the blocks; a causal LM may call it past its base model."""
        return lm.base_model.get_submodule(self.layers.rpartition(".")[0])

    def turns(self, attention: nn.Module) -> bool:
        """Whether RoPE turns the queries and keys of this layer."""
        if self.rope == "none" or not self.rotates:
            return self.rope != "none"
        no_window = self.rotates == "is_sliding" and getattr(attention, "sliding_window", None) is None
        return no_window or bool(getattr(attention, self.rotates))

    @property
    def is_plain(self) -> bool:
        """Whether the attention is Llama's, by names, RoPE and arithmetic."""
        own = (self.qkv, self.rope, self.table, self.rotates, self.norm_of, self.v_norm, self.temperature)
        return own == ("", "half", "half", "", "", "", "") and not self.gated

    def words(self) -> dict[str, Any]:
        """By which the pruned twin finds its way in the dense modules; see runtime/modeling.py."""
        from kvprune.runtime.modeling import WORDS  # which takes a second

        return {name: getattr(self, name) for name, usual in WORDS.items() if getattr(self, name) != usual}


POST_NORMS: dict[str, Any] = {
    "behind_attention": "post_attention_layernorm",
    "behind_mlp": "post_feedforward_layernorm",
}
EXPERTS: dict[str, Any] = {"down": ""}  # the router and the experts stay as they are
CAP = ("cap", "final_logit_softcapping")
TIMES = ("times", "logit_scale")
INTERLEAVED: dict[str, Any] = {"rope": "interleaved", "table": "interleaved"}
BEHIND_ROPE: dict[str, Any] = {
    "norm_of": "head",
    "q_norm": "query_layernorm",
    "k_norm": "key_layernorm",
    "norm_behind_rope": True,
}
GATED: dict[str, Any] = {
    "others": "gated delta rule",
    "norm_of": "head",
    "gated": True,
    "unless": ("attention_bias",),
}
ONCE: dict[str, Any] = {"rope": "interleaved", "table": "once"}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", portable_as="llama"),
        Family("mistral", portable_as="mistral"),
        Family("qwen2", portable_as="llama"),
        Family("ministral"),
        Family("ministral3", temperature="llama_4_scaling_beta"),
        Family("arcee"),
        Family("seed_oss"),
        Family("internlm3"),
        Family("cwm"),
        Family("jais2"),
        Family("starcoder2", down="c_proj"),
        Family("nemotron"),
        Family("phi", norm="final_layernorm", o="dense", down="fc2", unless=("qk_layernorm",)),
        Family("stablelm", unless=("qk_layernorm",)),
        Family("phi3", qkv="qkv_proj"),
        Family("granite", times="residual_multiplier", logits=("divide", "logits_scaling")),
        Family("hyperclovax", times="residual_multiplier", logits=("times", "logits_scaling")),
        Family("mixtral", **EXPERTS),
        Family("qwen2_moe", routers=("shared_expert_gate",), **EXPERTS),
        Family("phimoe", routers=("router",), **EXPERTS),
        Family("solar_open", **EXPERTS),
        Family("granitemoe", times="residual_multiplier", logits=("divide", "logits_scaling"), **EXPERTS),
        Family("glm4_moe", unless=("use_qk_norm",), **EXPERTS),
        Family("qwen3", norm_of="head"),
        Family("qwen3_moe", norm_of="head", **EXPERTS),
        Family("dots1", norm_of="head", **EXPERTS),
        Family("gemma"),
        Family("gemma2", logits=CAP, **POST_NORMS),
        Family("gemma3_text", norm_of="head", logits=CAP, unless=("use_bidirectional_attention",), **POST_NORMS),
        Family(
            "gemma4_text",
            norm_of="head",
            v_norm="v_norm",
            logits=CAP,
            routers=("proj",),
            unless=("use_bidirectional_attention=all",),
            of_tokens=("num_kv_shared_layers", "hidden_size_per_layer_input"),
            **POST_NORMS,
        ),
        Family("olmo", unless=("clip_qkv",)),
        Family("olmo2", norm_of="all", **POST_NORMS),
        Family("olmo3", norm_of="all", **POST_NORMS),
        Family("olmoe", norm_of="all", **EXPERTS),
        Family("minimax_m2", norm_of="all", **EXPERTS),
        Family("smollm3", rotates="use_rope"),
        Family("exaone4", norm_of="head", rotates="is_sliding", **POST_NORMS),
        Family("cohere", logits=TIMES, unless=("use_qk_norm",), **INTERLEAVED),
        Family("cohere2", rotates="sliding_window", logits=TIMES, **INTERLEAVED),
        Family("glm", **ONCE),
        Family("glm4", behind_attention="post_self_attn_layernorm", behind_mlp="post_mlp_layernorm", **ONCE),
        Family("ernie4_5", **ONCE),
        Family("ernie4_5_moe", **ONCE, **EXPERTS),
        Family("helium", **ONCE),
        Family("gpt_oss", table="narrow", **EXPERTS),
        Family("apertus", norm_of="head"),
        Family("qwen3_next", routers=("shared_expert_gate",), **GATED, **EXPERTS),
        Family("qwen3_5_text", **GATED),
        Family("qwen3_5_moe_text", routers=("shared_expert_gate",), **GATED, **EXPERTS),
        Family(
            "lfm2",
            others="short convolutions",
            norm="embedding_norm",
            o="out_proj",
            mlp="feed_forward",
            down="w2",
            norm_of="head",
            q_norm="q_layernorm",
            k_norm="k_layernorm",
        ),
        Family("hunyuan_v1_dense", **BEHIND_ROPE),
        Family("hunyuan_v1_moe", routers=("wg",), **BEHIND_ROPE, **EXPERTS),
        Family("gpt2", layers="h", norm="ln_f", attention="attn", qkv="c_attn", o="c_proj", down="c_proj", rope="none"),
        Family(
            "opt",
            layers="decoder.layers",
            norm="decoder.final_layer_norm",
            o="out_proj",
            mlp="",
            down="fc2",
            rope="none",
        ),
        Family(
            "gpt_neox",
            norm="final_layer_norm",
            attention="attention",
            qkv="query_key_value",
            split="heads",
            o="dense",
            down="dense_4h_to_h",
        ),
    )
    if family.model_type in TWINS
}

WHY_NOT = {  # model_type -> why it is out of scope
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "glm4_moe_lite", "longcat_flash"),
        "it caches one latent for all heads (MLA), and no heads' channels",
    ),
    **dict.fromkeys(("bloom", "mpt", "falcon", "gptj", "codegen", "gpt_neo"), "its attention has no interface"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), "it has no KV cache"),
    **dict.fromkeys(
        ("jamba", "bamba", "granitemoehybrid"),
        "not all of its layers have attention",
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "its last layers attend to keys and values of others"),
    **dict.fromkeys(("llama4", "llama4_text"), "its RoPE turns complex numbers, with a norm behind it in some layers"),
    "qwen3_vl_moe": "its checkpoints hold experts otherwise than those of qwen3_moe",
    "mimo_v2_flash": "its values have other widths than its keys",
    **dict.fromkeys(("aya_vision", "cohere2_vision"), "it leaves out its text model's logit_scale"),
    "paligemma": "on text alone too, its prompt looks ahead",
    "mllama": "some of its layers have keys and values of an image",
}

# Multimodal models that compute on text alone what their text model does, which is what a checkpoint of theirs is
# loaded as (see wrapped.py): those that are tested.
# fmt: off
WRAPPERS = (
    "gemma3", "gemma4", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "qwen2_5_vl",
    "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "smolvlm",
)
# fmt: on
WHY_NOT_ALL = "of such a model only the text model: give kvprune the checkpoint, not the loaded model"


def family_of(model_type: str) -> Family:
    """The descriptor for a dense or pruned `model_type`; UnsupportedArchitecture says why not, or what is nearest."""
    dense = model_type.removeprefix(PREFIX)
    if dense not in FAMILIES:
        near = difflib.get_close_matches(dense, FAMILIES, 1, 0.5)
        why = WHY_NOT_ALL if dense in WRAPPERS else WHY_NOT.get(dense)
        why = why or (f"the nearest that is: {near[0]}; {supported()}" if near else supported())
        raise UnsupportedArchitecture(f"architecture {dense!r} is not supported; {why}")
    return FAMILIES[dense]


def check_config(config: PreTrainedConfig) -> None:
    """Raise UnsupportedArchitecture for an option of a supported family that is not built."""
    family = family_of(config.model_type)
    for option in family.unless:
        name, _, value = option.partition("=")
        given = getattr(config, name, None)
        if (given == value) if value else given:
            raise UnsupportedArchitecture(f"{config.model_type} with {option} is not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    if family.is_plain and rope.get("partial_rotary_factor", 1.0) != 1.0 and family.portable_as is not None:
        raise UnsupportedArchitecture("partial rotary embeddings are not supported for this family")


def dense_head_dim(config: PreTrainedConfig) -> int:
    """Channels of a head in the dense model, from its own config or that of its pruned twin."""
    for name in ("dense_head_dim", "head_dim"):
        if getattr(config, name, None):
            return getattr(config, name)
    return config.hidden_size // config.num_attention_heads


def dense_kv_heads(config: PreTrainedConfig) -> int:
    """KV heads of the dense model, from its own config or that of its pruned twin, whose heads may be merged."""
    names = ("dense_kv_heads", "num_key_value_heads", "num_attention_heads")
    return next(getattr(config, name) for name in names if getattr(config, name, None))


def dense_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """(KV heads, channels of a head) of each layer of the dense model, from its own config or its pruned twin's."""
    layers = config.per_layer_config if config.is_heterogeneous else [config] * config.num_hidden_layers
    return [(dense_kv_heads(layer), dense_head_dim(layer)) for layer in layers]


def mlp_width(config: PreTrainedConfig) -> int:
    """Channels between the MLP's matrices, of one expert where there are only experts; four times the hidden size where
    the config does not say."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), 4 * config.hidden_size)


def supported() -> str:
    """For messages."""
    return f"supported are: {', '.join(sorted(FAMILIES))}"
