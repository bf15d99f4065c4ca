"""Tiny random models of every family, and the dense reference of each: keys and values changed where attention gets
them, in a function of this file's own."""

import sys
from contextlib import contextmanager

import torch
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY, LAYERS, KV, GROUPS, D = 300, 4, 2, 2, 16
HEADS = KV * GROUPS
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * D,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
WARM = {  # queries grow with their position
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.5,
    }
}

# Full layers of other heads than sliding ones
MIXED = {"layer_types": SLIDING, "sliding_window": 6, "head_dim": D, "global_head_dim": 24}
MIXED |= {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 2.0}
KEYS_AS_VALUES = {"num_key_value_heads": 4, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
SHARED = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
SHARED |= {"use_double_wide_mlp": True}

HYBRID = {"layer_types": ["conv", "full_attention"] * LAYERS, "num_hidden_layers": 2 * LAYERS}
GATED = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"] * (LAYERS // 2),
    "num_hidden_layers": LAYERS * 3 // 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

OPTIONS = {  # model_type, or model_type:variant -> what its config says beside the sizes
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "ministral": {"layer_types": SLIDING, "sliding_window": 6},
    "ministral3": {"sliding_window": None} | WARM,
    "arcee": {},
    "seed_oss": {},
    "internlm3": {"qkv_bias": True, "bias": True},
    "cwm": {"layer_types": SLIDING, "sliding_window": 6},
    "jais2": {},
    "starcoder2": {"use_bias": True, "sliding_window": None},
    "nemotron": PARTIAL,
    "phi": PARTIAL,
    "stablelm": PARTIAL | {"use_qkv_bias": True},
    "phi3": {"sliding_window": 6} | PARTIAL,
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 3.0, "attention_multiplier": 0.3},
    "hyperclovax": {"residual_multiplier": 0.5, "logits_scaling": 0.3, "attention_multiplier": 0.3},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "sliding_window": None},
    "solar_open": EXPERTS | {"n_routed_experts": 4},
    "granitemoe": {"residual_multiplier": 0.5, "logits_scaling": 3.0, "num_local_experts": 4},
    "glm4_moe": PARTIAL | EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "dots1": EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "minimax_m2": PARTIAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "use_bias": True},
    "qwen3": {"layer_types": SLIDING, "sliding_window": 6, "use_sliding_window": True},
    "qwen3_moe": EXPERTS,
    "gemma": {},
    "gemma2": {"layer_types": SLIDING, "sliding_window": 6, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"layer_types": SLIDING, "sliding_window": 6, "query_pre_attn_scalar": 9},
    "gemma4_text": MIXED | KEYS_AS_VALUES,
    "gemma4_text:own values": MIXED | {"attention_bias": True},
    "gemma4_text:shared": MIXED | SHARED,
    "gemma4_text:experts": MIXED
    | KEYS_AS_VALUES
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": SLIDING, "sliding_window": 6},
    "olmoe": EXPERTS,
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "exaone4": {"layer_types": SLIDING, "sliding_window": 6},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"layer_types": SLIDING, "sliding_window": 6, "logit_scale": 0.3},
    "glm": PARTIAL,
    "glm4": PARTIAL,
    "ernie4_5": {"use_bias": True},
    "helium": {},
    "gpt_oss": {"layer_types": SLIDING, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "apertus": {},
    "lfm2": HYBRID,
    "qwen3_next": GATED | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_5_text": GATED,
    "qwen3_5_moe_text": GATED | EXPERTS | {"shared_expert_intermediate_size": 24},
    "hunyuan_v1_dense": {"attention_bias": True},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "gpt2": {"n_inner": 40},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 64},
    "gpt_neox": PARTIAL,
}  # fmt: skip


def type_of(name):
    """The model_type of one of OPTIONS."""
    return name.partition(":")[0]


def has_sdpa(name):
    """Whether the family has "sdpa", and that the cap on its scores, if there is one."""
    model = family_model(name)
    return model._supports_sdpa and not getattr(model.config, "attn_logit_softcapping", None)


def family_model(name, attention="eager", seed=0):
    """A random model in eval mode, float32, with biases and norms that are not their defaults. name: of OPTIONS."""
    torch.manual_seed(seed)
    model_type = type_of(name)
    usual = CONFIG_MAPPING[model_type]()
    sizes = {name: size for name, size in SIZES.items() if hasattr(usual, name)}  # as real configs have them
    config = AutoConfig.for_model(model_type, **sizes | OPTIONS[name])
    if not config.is_heterogeneous and getattr(config, "head_dim", D) != D:
        config.head_dim = D
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            about_zero = _is_about_zero(model_type, name)
            torch.nn.init.normal_(parameter, mean=0.0 if about_zero else 1.0, std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=0.4 if name.endswith(("bias", "sinks")) else 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8)
    return model


def _is_about_zero(model_type, name):
    """Whether a norm's parameter is what it adds to one, or to nothing."""
    if model_type.startswith(("qwen3_5", "qwen3_next")):
        return "linear_attn" not in name
    return model_type in ("gemma", "gemma2", "gemma3_text") or "bias" in name


@contextmanager
def changed(model, change):
    """The model attends with the keys and values that `change` makes of (layer, key, value), (B, heads, T, D) behind
    RoPE; as it does otherwise."""
    before = model.config._attn_implementation

    def attention(module, query, key, value, mask, **kwargs):
        own = sys.modules[type(module).__module__].eager_attention_forward
        function = own if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]
        return function(module, query, *change(module.layer_idx, key, value), mask, **kwargs)

    AttentionInterface.register("reference", attention)
    AttentionMaskInterface.register("reference", ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation("reference")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
