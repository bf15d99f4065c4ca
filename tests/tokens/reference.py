"""Token Filtering written out: one sequence, one token, one layer, one head at a time, from docs/tokens.md.

It shares nothing with the library but the model's own weights, and the S and T of every decision are kept, so that a
test can ask for a margin.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Found:
    logits: torch.Tensor
    skipped: list[list[bool]]  # [layer][token]
    margin: float = math.inf  # the least |S - T| of all decisions that hung on it
    kept: list[int] = field(default_factory=list)  # cached tokens per layer


def cos(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def quantile(history, share):
    if share <= 0 or not history:
        return math.inf
    return -math.inf if share >= 1 else float(torch.quantile(torch.tensor(history, dtype=torch.float64), 1 - share))


def rotate(x, cos_row, sin_row):
    half = len(x) // 2
    return x * cos_row + torch.cat((-x[half:], x[:half])) * sin_row


def mixed(x, mix, heads):
    """(heads, channels), each head times the matrix of its dense KV head, if there are any."""
    x = x.view(heads, -1)
    if mix is None:
        return x
    each = heads // len(mix.weight)  # query heads of a dense KV head
    return torch.stack([x[head] @ mix.weight[head // each] for head in range(heads)])


@torch.no_grad()
def run(model, ids, *, rates, drop_rates=None, prompt_ends=(), options):
    """model: dense, or pruned with or without merged heads; ids: a list of token ids; rates: {layer: rate}; options:
    the fields of Settings (with drop_rates, only the threshold "quantile")."""
    o, config = options, model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    n = len(ids)
    cos_table, sin_table = model.model.rotary_emb(torch.zeros(1, n, 1), torch.arange(n)[None])
    layers = [
        dict(
            keys=[],
            values=[],
            at=[],
            ak=None,
            av=None,
            out=None,
            level=math.inf,
            drop=math.inf,
            rate=dict(rates).get(i, 0.0),
            history=[],
            flags=[],
            dropped=[],
        )
        for i, _ in enumerate(model.model.layers)
    ]
    found = Found(torch.empty(n, config.vocab_size), [state["flags"] for state in layers])
    for t, token in enumerate(ids):
        h = model.model.embed_tokens.weight[token]
        for index, (block, state) in enumerate(zip(model.model.layers, layers, strict=True)):
            att = block.self_attn
            x = block.input_layernorm(h)
            d = att.head_dim
            k, v = (p(x).view(kv_heads, d) for p in (att.k_proj, att.v_proj))
            channels = att.rope_index if hasattr(att, "rope_index") else [slice(None)] * kv_heads
            rows = [(cos_table[0, t, own], sin_table[0, t, own]) for own in channels]
            rk = torch.stack([rotate(k[i], *rows[i]) for i in range(kv_heads)])
            skip = dropped = False
            if index in rates:
                signal = rk if o["keys"] == "post-rope" else k
                if state["ak"] is None:
                    state["ak"], state["av"] = signal.clone(), v.clone()
                ck = [cos(signal[i], state["ak"][i]) for i in range(kv_heads)]
                cv = [cos(v[i], state["av"][i]) for i in range(kv_heads)]
                mk, mv = sum(ck) / kv_heads, sum(cv) / kv_heads
                fusion = o.get("fusion", "variance")
                if fusion != "variance":
                    s = {"mean": (mk + mv) / 2, "key": mk, "value": mv}[fusion]
                elif kv_heads == 1:
                    s = (mk + mv) / 2
                else:
                    vk, vv = sum((c - mk) ** 2 for c in ck) / kv_heads, sum((c - mv) ** 2 for c in cv) / kv_heads
                    wk = (1 / (vk + 1e-6)) / (1 / (vk + 1e-6) + 1 / (vv + 1e-6))
                    s = wk * mk + (1 - wk) * mv
                s += 1e-5 * (t * 0.6180339887498949 % 1)
                state["ak"] = o["gamma"] * state["ak"] + (1 - o["gamma"]) * signal
                state["av"] = o["gamma"] * state["av"] + (1 - o["gamma"]) * v
                first = max(math.ceil(max(o["warmup"], o["sinks"]) / o["block"]), 1) * o["block"]
                free = t >= first and t + 1 not in prompt_ends
                alike = [i for i in sorted(rates) if (drop_rates or rates)[i] == (drop_rates or rates)[index]]
                every = o.get("decide_every", 1)
                leader = layers[alike[alike.index(index) // every * every]]
                skip = free and s > state["level"]
                drop_level = state["level"] if drop_rates is None else state["drop"]
                dropped = free and s > drop_level
                if leader is not state:
                    skip, dropped = leader["flags"][t], leader["dropped"][t]
                elif free:
                    found.margin = min(found.margin, abs(s - state["level"]), abs(s - drop_level))
                state["flags"].append(skip)
                state["dropped"].append(dropped)
                state["history"] = [*state["history"], s][-256:] if t else []
                if (t + 1) % o["block"] == 0 and t + 1 >= first and o.get("threshold") == "adaptive":
                    if math.isinf(state["level"]):
                        state["level"] = quantile(state["history"], rates[index])
                    else:
                        memory = o["beta"] ** o["block"]
                        share = sum(state["flags"][-o["block"] :]) / o["block"]
                        state["rate"] = memory * state["rate"] + (1 - memory) * share
                        if abs(state["rate"] - rates[index]) > o["eta"]:
                            state["level"] += o["alpha"] * (state["rate"] - rates[index])
                elif (t + 1) % o["block"] == 0 and t + 1 >= first:
                    for name, flags, rate in (
                        ("level", state["flags"], rates[index]),
                        ("drop", state["dropped"], (drop_rates or rates)[index]),
                    ):
                        late = flags[first:]
                        share = rate + (rate * len(late) - sum(late)) / 32
                        state[name] = quantile(state["history"], share if rate else 0)
            else:
                state["flags"].append(False)
            if not skip:
                keys, values, at = [*state["keys"], rk], [*state["values"], v], [*state["at"], t]
                q = mixed(att.q_proj(x), getattr(att, "q_mix", None), heads)
                parts = []
                for head in range(heads):
                    kv = head // (heads // kv_heads)
                    query = rotate(q[head], *rows[kv])
                    window = getattr(att, "sliding_window", getattr(config, "sliding_window", None))
                    seen = [i for i in range(len(keys)) if window is None or t - at[i] < window]
                    scores = torch.stack([query @ keys[i][kv] * att.scaling for i in seen])
                    weights = scores.softmax(0)
                    parts.append(sum(w * values[i][kv] for w, i in zip(weights, seen, strict=True)))
                output = att.o_proj(mixed(torch.cat(parts), getattr(att, "o_mix", None), heads).flatten())
                old = output if state["out"] is None else state["out"]
                state["out"] = o["output_gamma"] * old + (1 - o["output_gamma"]) * output
            else:
                output = state["out"] if o["on_skip"] == "anchor" else torch.zeros_like(h)
            if not dropped:
                state["keys"].append(rk), state["values"].append(v), state["at"].append(t)
            h = h + output
            h = h + block.mlp(block.post_attention_layernorm(h))
        found.logits[t] = model.lm_head(model.model.norm(h))
    found.kept = [len(state["keys"]) for state in layers]
    return found
