"""Runs a GGUF file with llama.cpp (package xllamacpp) and writes what it says as JSON.

python llama.py FILE ASKED.json ANSWERS.json; asked: {"prompts": [token ids], "texts": [...], "new_tokens": n, "top":
how many tokens' log-probabilities are told, "kv": "F32", "F16", "Q8_0" or "Q4_0", "forced": a token to go on with, or
null for the likeliest}. Log-probabilities are those before anything is forced. A forced token must be one of plain
letters: llama.cpp tells nothing of tokens that are no whole characters.
"""

import json
import sys
import urllib.request

import xllamacpp


def main(file: str, asked_file: str, answers_file: str) -> None:
    with open(asked_file) as opened:
        asked = json.load(opened)
    how = xllamacpp.CommonParams()
    how.model.path = file
    how.n_ctx, how.n_parallel, how.warmup = 1024, 1, False
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = 1
    how.cache_type_k = how.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{asked['kv']}")
    bias = {} if asked["forced"] is None else {"logit_bias": {str(asked["forced"]): 1000.0}}
    server = xllamacpp.Server(how)
    answers = []
    for prompt in asked["prompts"]:
        wanted = {"prompt": prompt, "n_predict": asked["new_tokens"], "temperature": 0, "n_probs": asked["top"]}
        found = server.handle_completions(wanted | bias | {"ignore_eos": True, "cache_prompt": False})
        steps = found["choices"][0]["logprobs"]["content"]
        answers.append([{one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in steps])
    tokens = [tokenize(server.listening_address, text) for text in asked["texts"]]
    with open(answers_file, "w") as opened:
        json.dump({"steps": answers, "tokens": tokens}, opened)


def tokenize(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


if __name__ == "__main__":
    main(*sys.argv[1:])
