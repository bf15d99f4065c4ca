"""Tiny models as .gguf files: as llama.cpp's converter writes them, Llama, whose rows it turns, and others; any family,
by transformers' own table of names, as transformers reads them."""

import gguf
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_gguf(model):
    """name -> array, as llama.cpp's converter writes them: Llama's Q and K with the halves of a head interleaved."""
    tensors, config = {}, model.config
    for name, tensor in model.state_dict().items():
        array, (stem, _, leaf) = tensor.numpy(), name.rpartition(".")
        if config.model_type == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            array = array.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        layer, found = "", stem
        if stem.startswith("model.layers."):
            _, _, number, found = stem.split(".", 3)
            layer = f"blk.{number}."
        tensors[f"{layer}{LLAMA_NAMES[found]}.{leaf}"] = np.ascontiguousarray(array)
    return tensors


def write_gguf(model, path, tensors=None, more=lambda writer: None, kind=None):
    """A Llama or Qwen2 as a file of float32, or with matrices quantised as `kind` ("Q8_0") where their rows allow it.
    tensors: in place of the model's; more(writer): says more of it."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    more(writer)
    return _written(writer, as_gguf(model) if tensors is None else tensors, path, kind)


ABOUT_ONE = ("gemma2", "gemma3_text", "nemotron")  # whose norms' weights are those of the file, less 1


def write_converted(model, path, more=lambda writer: None, kind=None):
    """A model of a family whose rows stay as they are, with the keys that llama.cpp wants. more(writer): says more."""
    config, architecture = model.config, {"gemma3_text": "gemma3"}.get(model.config.model_type, model.config.model_type)
    heads, writer = config.num_attention_heads, gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        names = ("layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
        writer.add_layer_norm_eps(next(getattr(config, name) for name in names if hasattr(config, name)))
    writer.add_token_list([str(token) for token in range(config.vocab_size)])
    more(writer)
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names, tensors = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers), {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        array = tensor.numpy() + (config.model_type in ABOUT_ONE and name.endswith("norm.weight"))
        is_turned = config.model_type == "gpt2" and array.ndim == 2 and ".h." in name
        own = names.get_name(stem) or {"lm_head": "output"}[stem]
        tensors[f"{own}.{leaf}"] = np.ascontiguousarray(array.T if is_turned else array)
    return _written(writer, tensors, path, kind)


def write_family(model, path, kind=None):
    """A model of any family that transformers reads; what its numbers mean to llama.cpp is not looked at."""
    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    for key, name in GGUF_CONFIG_MAPPING[architecture].items():
        value = getattr(config, name, None) if isinstance(name, str) else None
        if name == "rope_theta":
            value = (config.rope_parameters or {}).get("rope_theta")
        if isinstance(value, (int, float)):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_token_list([str(token) for token in range(config.vocab_size)])  # some take its length
    names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)({}))
    parameters, tensors = model.state_dict(), {}
    for name, own in names.items():
        array = parameters[own].numpy()
        is_turned = config.model_type == "gpt2" and array.ndim == 2 and name.startswith("blk.")
        tensors[name] = np.ascontiguousarray(array.T if is_turned else array)
    if config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    return _written(writer, tensors, path, kind)


def _written(writer, tensors, path, kind):
    for name, array in tensors.items():
        if kind is not None and array.ndim == 2 and array.shape[-1] % 32 == 0:
            kinds = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(array, kinds), raw_dtype=kinds)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SMALL = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1},
    "eos_token_id": 2,
}
BASE = {"rope_type": "default", "rope_theta": 500.0}


def partial(factor):
    return {"rope_parameters": BASE | {"partial_rotary_factor": factor}}


def turns(channels):
    return lambda writer: (writer.add_rope_freq_base(500.0), writer.add_rope_dimension_count(channels))


def whole(writer):
    """Every channel turns, where nothing is said of it."""
    writer.add_rope_freq_base(500.0)


def capped(writer):
    writer.add_attn_logit_softcapping(0.5)
    writer.add_final_logit_softcapping(2.0)
    writer.add_sliding_window(6)


def two_tables(writer):
    writer.add_rope_freq_base(500.0)
    writer.add_rope_freq_base_swa(50.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_final_logit_softcapping(2.0)
    writer.add_sliding_window(6)


def windowed(writer):
    writer.add_sliding_window(6)


TABLES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
CAPS = {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 2.0, "sliding_window": 6}
NO_WINDOW = {"head_dim": 32, "query_pre_attn_scalar": 32, "layer_types": ["full_attention"] * 4}
NO_WINDOW |= {"rope_parameters": {"full_attention": BASE, "sliding_attention": BASE}}
LARGEST = {"query_pre_attn_scalar": 16}  # hidden size / heads
CONVERTED = {  # what transformers' own reader leaves at a default, in families that it reads
    "softcaps": ("gemma2", CAPS | {"attn_logit_softcapping": 0.5}, capped),
    "the largest Gemma 2": (
        "gemma2",
        CAPS | LARGEST | {"num_hidden_layers": 46, "attn_logit_softcapping": 0.5},
        capped,
    ),
    "the largest Gemma 3": (
        "gemma3_text",
        CAPS | LARGEST | {"num_hidden_layers": 62, "rope_parameters": TABLES},
        two_tables,
    ),
    "two tables": ("gemma3_text", CAPS | {"rope_parameters": TABLES}, two_tables),
    "no window": ("gemma3_text", NO_WINDOW, whole),
    "the base": ("starcoder2", {"rope_parameters": BASE, "norm_epsilon": 1e-3}, whole),
    "a quarter turns": ("stablelm", partial(0.25), turns(4)),
    "half turns": ("stablelm", partial(0.5), turns(8)),
    "all turns": ("stablelm", partial(1.0), whole),
    "half, and epsilon": ("nemotron", partial(0.5) | {"norm_eps": 1e-2}, turns(8)),
    "all, and epsilon": ("nemotron", partial(1.0) | {"norm_eps": 1e-2}, whole),
    "three quarters": ("phi3", partial(0.75), turns(12)),
    "positions": ("gpt2", {"n_positions": 60, "n_inner": 40, "layer_norm_epsilon": 1e-2}, lambda writer: None),
}


def converted(family, options, more, folder):
    """A random model, and its file."""
    torch.manual_seed(0)
    usual = CONFIG_MAPPING[family]()
    config = AutoConfig.for_model(family, **{k: v for k, v in SMALL.items() if hasattr(usual, k)} | options)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, write_converted(model, folder / "tiny.gguf", more)
