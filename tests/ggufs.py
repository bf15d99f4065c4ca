"""Tiny models as .gguf files: Llama and Qwen2 as llama.cpp's converter writes them; any family, by transformers' own
table of names, as transformers reads them."""

import gguf
import numpy as np
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
