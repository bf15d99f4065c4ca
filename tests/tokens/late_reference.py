"""Late admission written out: one sequence, one token, one layer, one head at a time, from docs/tokens.md.

It shares nothing with the library but the model's own weights. The least difference between a score that was kept and
one that was not is kept, so that a test can ask for a margin.
"""

import math
from dataclasses import dataclass

import torch
from reference import cos, mixed, rotate

MEMORY = 0.8 ** (1 / 64)  # of the mean key, per token


@dataclass
class Found:
    logits: torch.Tensor
    kept: list[list[list[int]]]  # [layer][KV head]: positions of the tokens that are in the cache at the end
    margin: float


@torch.no_grad()
def run(model, ids, *, keep, block, window, sinks):
    """model: dense, or pruned with or without merged heads; ids: a list of token ids."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    n, margin = len(ids), math.inf
    cos_table, sin_table = model.model.rotary_emb(torch.zeros(1, n, 1), torch.arange(n)[None])
    cos_table = torch.cat((cos_table, torch.ones(1, n, 1)), -1)  # what RoPE leaves alone has the number behind the last
    sin_table = torch.cat((sin_table, torch.zeros(1, n, 1)), -1)
    caches = [[[] for _ in range(kv_heads)] for _ in model.model.layers]  # of (position, score, key, value)
    sums = [[None] * kv_heads for _ in caches]
    numbers = [0] * len(caches)  # of the tokens kept of those that were decided
    logits = []
    for t, token in enumerate(ids):
        h = model.model.embed_tokens.weight[token]
        for index, layer in enumerate(model.model.layers):
            att, cache = layer.self_attn, caches[index]
            own_window = getattr(att, "sliding_window", getattr(config, "sliding_window", None))
            x = layer.input_layernorm(h)
            d = att.head_dim
            k, v = (p(x).view(kv_heads, d) for p in (att.k_proj, att.v_proj))
            channels = att.rope_index if hasattr(att, "rope_index") else [range(d)] * kv_heads
            rows = [(cos_table[0, t, list(own)], sin_table[0, t, list(own)]) for own in channels]
            if t % block == 0 and t >= window + block and own_window is None:
                number = min(max(math.floor(keep * t + 1e-6) - window - numbers[index], 0), block)
                if t == window + block:
                    number = max(number, sinks)
                for head in range(kv_heads):
                    due = [entry for entry in cache[head] if t - window - block <= entry[0] < t - window]
                    assert len(due) == block
                    due.sort(key=lambda entry: (entry[0] >= sinks, -entry[1]))
                    gone = {entry[0] for entry in due[number:]}
                    if 0 < number < block and due[number - 1][0] >= sinks:
                        margin = min(margin, due[number - 1][1] - due[number][1])
                    cache[head] = [entry for entry in cache[head] if entry[0] not in gone]
                numbers[index] += number
            for head in range(kv_heads):
                before = sums[index][head]
                score = -cos(k[head], before) if before is not None else 0.0
                unit = k[head] / k[head].norm()
                sums[index][head] = unit if before is None else MEMORY * before + unit
                cache[head].append((t, score, rotate(k[head], *rows[head]), v[head]))
            q = mixed(att.q_proj(x), getattr(att, "q_mix", None), heads)
            parts = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                query = rotate(q[head], *rows[kv])
                seen = [entry for entry in cache[kv] if own_window is None or t - entry[0] < own_window]
                weights = torch.stack([query @ entry[2] * att.scaling for entry in seen]).softmax(0)
                parts.append(sum(w * entry[3] for w, entry in zip(weights, seen, strict=True)))
            h = h + att.o_proj(mixed(torch.cat(parts), getattr(att, "o_mix", None), heads).flatten())
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        logits.append(model.lm_head(model.model.norm(h)))
    kept = [[[entry[0] for entry in head] for head in cache] for cache in caches]
    return Found(torch.stack(logits), kept, margin)
