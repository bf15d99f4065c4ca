"""Pruned tiny models of one family for each mechanism, for engines to serve: python tiny_folders.py OUT [NAMES]"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1])]
import kvprune  # noqa: E402
from tiny import VOCABULARY, tiny_tokenizer, words  # noqa: E402

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WARM = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "llama_4_scaling_beta": 0.5}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
UNIFORM = {"ratio": 0.5, "layout": "uniform", "align": 32}
MIXED = {"ratio": 0.25, "merge": 1, "allocation": "budget", "align": 32}
OTHER_HEADS = {"global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
OTHER_HEADS |= {"hidden_size_per_layer_input": 0}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
FOLDERS = {  # name -> model_type, what its config says beside the sizes, how it is pruned
    # a norm on q and k, windows, and a table of RoPE for each type
    "gemma3_text": ("gemma3_text", {"head_dim": 64, **SLIDING}, UNIFORM),
    # the same, a norm on v, and other heads in full layers, whose values are their keys
    "gemma4_text": ("gemma4_text", {"head_dim": 64, **OTHER_HEADS, **SLIDING}, {"ratio": 0.5, "align": 32}),
    # and two layers that attend to keys and values of others
    "gemma4_text-shared": (
        "gemma4_text",
        {
            **{"head_dim": 64, "global_head_dim": 128, "sliding_window": 16, "num_hidden_layers": 4},
            **{"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY},
            "layer_types": SLIDING["layer_types"] * 2,
        },
        {"ratio": 0.5, "align": 32},
    ),
    # heads as wide as the real ones, of which one layer keeps all 512 channels; and experts
    "gemma4_text-experts": (
        "gemma4_text",
        {
            **{"head_dim": 256, **OTHER_HEADS, "global_head_dim": 512, **SLIDING},
            **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        },
        {"ratio": 0.125, "target": "vllm-cpu"},
    ),
    "phi3": ("phi3", {"hidden_size": 256}, UNIFORM),  # fused projections
    "glm": ("glm", {"head_dim": 64, "partial_rotary_factor": 0.5}, UNIFORM),  # interleaved and partial RoPE
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 64}, UNIFORM),  # RoPE, then a norm
    # queries that grow with their position
    "ministral3": (
        "ministral3",
        {"head_dim": 64, "rope_parameters": WARM | {"original_max_position_embeddings": 8}},
        UNIFORM,
    ),
    "gpt_oss": ("gpt_oss", {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2}, UNIFORM),  # sinks
    # For several ranks: biases and mixed widths; merged heads, and a norm over each head or over all of them
    "qwen2-alone": ("qwen2", {**EIGHT, "num_key_value_heads": 2}, MIXED),
    "qwen3-merged": ("qwen3", EIGHT, {"merge": 4, **UNIFORM}),
    # For llama.cpp: what is neither in its frequencies nor in its softmax
    "portable-yarn": (
        "llama",
        {**EIGHT, "attention_bias": True, "rope_parameters": YARN},
        {"ratio": 0.5, "layout": "portable"},
    ),
    "stock-llama3": ("llama", {**EIGHT, "rope_parameters": LLAMA3}, {"ratio": 0.5, "layout": "stock"}),
    "deci": ("llama", {**EIGHT, "attention_bias": True}, {"ratio": 0.5, "depth": 1, "merge": 1}),
    "llama-merged": ("llama", EIGHT, {"merge": 4, **UNIFORM}),  # wider than the dense heads
    "olmo2-merged": ("olmo2", {**EIGHT, "hidden_size": 512}, {"merge": 2, **UNIFORM}),
}


def main(out: Path, *names: str) -> None:
    data = out / "text"
    data.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("valid", "test")):
        (data / f"{split}.txt").write_text(words(20000, seed))
    for name in names or FOLDERS:
        model_type, options, how = FOLDERS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | options))
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                torch.nn.init.normal_(parameter, std=1.0 if key.endswith("sinks") else 0.08)
        model.save_pretrained(out / f"{name}-dense")
        tiny_tokenizer().save_pretrained(out / f"{name}-dense")
        asked = {"calibration": str(data / "valid.txt"), "eval": (str(data / "test.txt"),), "eval_tokens": 512}
        kvprune.prune(
            out / f"{name}-dense",
            out / name,
            min_width=32,
            calibration_tokens=512,
            repair_tokens=4096,
            calibration_window=64,
            windows=(64,),
            **how,
            **asked,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
