"""Serves a folder with vLLM and writes what it says as JSON: python serve.py FOLDER PROMPTS.json ANSWERS.json [CODE]
[RANKS]

CODE: folder, its own; plugin, kvprune's, in every process of vLLM's; or vllm, its own model of that architecture.
"""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

from vllm import LLM, SamplingParams

NEW_TOKENS = 24


def main(folder: str, prompts_file: str, answers_file: str, code: str = "folder", ranks: str = "1") -> None:
    with open(prompts_file) as file:
        prompts = json.load(file)
    llm = LLM(
        model=folder,
        model_impl="vllm" if code == "vllm" else "auto",
        trust_remote_code=code == "folder",
        tensor_parallel_size=int(ranks),
        enforce_eager="KVPRUNE_TEST_COMPILE" not in os.environ,
        dtype="float32",
        max_model_len=1024,
        enable_prefix_caching=False,
    )
    cache = llm.llm_engine.vllm_config.cache_config
    how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0)
    answers = llm.generate(prompts, how)
    result = {
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "prompt_ids": [a.prompt_token_ids for a in answers],
        "prompt_logprobs": [
            [entry[token].logprob for token, entry in zip(a.prompt_token_ids[1:], a.prompt_logprobs[1:], strict=True)]
            for a in answers
        ],
        "new_ids": [list(a.outputs[0].token_ids) for a in answers],
    }
    with open(answers_file, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
