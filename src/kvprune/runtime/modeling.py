# Copyright the kvprune authors. SPDX-License-Identifier: Apache-2.0
"""The code a pruned checkpoint needs, and all of it: it imports only torch and transformers.

This file is copied into every checkpoint that kvprune writes, so that it loads with
`trust_remote_code=True` where kvprune is not installed. A pruned model is the dense family's own
model in which each layer's attention has been replaced by `PrunedAttention`. Notable choices:

- One attention serves every family, decided by what it holds: the projections are four plain matrices whatever the
  family's are, a norm on queries and keys is the family's own module. `words` in the config say where the dense modules
  are; what is not said is as in Llama.
- The dense modules are built first, from the same config read at the dense width, and hand over
  all they know (softmax scale, sliding window, biases, rotary table). Nothing is re-derived from
  the smaller head_dim, which is how pruned models go silently wrong.
- `rope_index` holds, per KV head, the columns of the family's table of cos and sin for the kept Q/K channels, so a kept
  RoPE pair keeps its original frequency, whatever way the family pairs channels; the column behind the last is no turn.
- A KV head may stand for several dense ones (merged heads): `num_key_value_heads` is what the cache holds, and
  `dense_kv_heads` what the dense model had. Q and O are then written out at the merged width, or, where that would read
  more bytes, stay at the dense width with a small matrix per dense KV head behind Q and before O (`HeadMix`).
- Merged heads are wider than dense ones, which costs nothing where memory is what limits (decoding), and time where
  arithmetic is (prefill). So for many new tokens at once the same small matrices lead keys and values, not queries and
  outputs, and attention runs at the dense width: the same numbers, since RoPE and these matrices commute.
- Widths live in `per_layer_config[i].head_dim`, which transformers and vLLM both read. `config.head_dim` is the one
  width where all layers have the same, so that whoever makes a cache by it is right, and else the dense head_dim. Where
  dense layers differ, so do `num_key_value_heads`, `dense_kv_heads` and `dense_head_dim`, which stand there too.
- A layer may have no attention, or no block at all. It stays where it was, with a constant, so that the numbers of the
  layers are the dense model's, and tells the cache of its tokens.
- In a hybrid not every dense block has attention (`attention_layers` in the config says which). The others stay the
  family's own, with their place in the cache, whatever state they keep there.
- Folders live for years, and transformers renames what a block hands its attention. The KV cache is taken under any
  name; where none comes although one is wanted, that is an error and never a model without a memory.
"""

import copy
import sys
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Every dense model_type that has a pruned twin here, where transformers knows it.
# fmt: off
FAMILIES = (
    "apertus", "arcee", "cohere", "cohere2", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "internlm3", "jais2", "lfm2", "llama", "minimax_m2",
    "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi",
    "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
)
# fmt: on
PREFIX = "kvprune_"  # model_type of the twin: kvprune_llama, ...
# Of this file. 1 (which said no number) loses the cache from transformers 5.24 on; 2 knows no merged heads; 3 has no
# channels that RoPE leaves alone; 4 knows Llama, Mistral and Qwen2 alone; 5 drops no blocks, and refuses tensor
# parallelism; 7 wants dense layers that are alike, each with its own keys; 8 hides sinks from vLLM, and runs
# experts one by one.
VERSION = 9
MANY = 256  # new tokens at once from which attention at the dense width saves more than leading keys and values there
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")  # what transformers has called it, or may
# What it is called here, in calls of a model and in what a model returns: "cache" from transformers 5.24 on.
CACHE = CACHE_NAMES[0] if CACHE_NAMES[0] in BaseModelOutputWithPast.__dataclass_fields__ else CACHE_NAMES[1]
# Before 5.24 that was the name of a paged cache, which attention functions themselves read and write.
PAGED = "" if CACHE == "cache" else "cache"
# Other heads on the same base model, which they get from AutoModel
HEADS = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)


# Where a family has what PrunedAttention needs, below the base model, a block and its attention; what `words` in the
# config leave out. norm_of: what the norms on queries and keys take together, "head", "all" heads, or "" for none;
# norm_behind_rope: RoPE comes first, at the dense width. v_norm: the norm on each head of values, if there is one.
# temperature: the name among rope_parameters of how much queries grow with the logarithm of their position.
# gated: the matrix of Q has of each head a query and a gate.
WORDS: dict[str, Any] = {
    **{"layers": "layers", "attention": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    **{"qkv": "", "norm_of": "", "q_norm": "q_norm", "k_norm": "k_norm", "norm_behind_rope": False, "v_norm": ""},
    **{"temperature": "", "gated": False},
}


def take_cache(arguments: dict[str, Any]) -> Any:
    """Remove the KV cache from keyword arguments, under whatever name it comes; None where there is none.

    A `Cache`, or one layer of a cache, is known by its class too. Raises TypeError for two different ones, and for
    something else under a cache's name.
    """
    named = [name for name in CACHE_NAMES if name != PAGED]
    names = [n for n, v in arguments.items() if n in named or isinstance(v, (Cache, CacheLayerMixin))]
    found = None
    for name in names:
        value = arguments.pop(name)
        if value is None or value is found:
            continue
        if found is not None:
            raise TypeError(f"two different KV caches came in one call: {', '.join(names)}; give one")
        if not hasattr(value, "update") or isinstance(value, dict):
            raise TypeError(f"{name} is a {type(value).__name__}, not a KV cache that kvprune knows; update kvprune")
        found = value
    return found


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn every pair (a_c, a_{c + d/2}) of the last dim by 90 degrees: (-a_{c + d/2}, a_c)."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def with_still(_module: Any, _args: Any, output: Any) -> Any:
    """A forward hook of the rotary table: cos and sin (B or 1, T, channels) and one that does not turn."""
    cos, sin = output
    return nn.functional.pad(cos, (0, 1), value=1.0), nn.functional.pad(sin, (0, 1))


def place_of(projection: nn.Module) -> tuple[int, int]:
    """(rank, ranks) of a linear layer that tensor parallelism splits: as vLLM's classes say it, or the mesh of its
    weight in transformers; (0, 1) of one that is whole."""
    mesh = getattr(getattr(projection, "weight", None), "device_mesh", None)
    if mesh is not None:
        return mesh.get_local_rank(), mesh.size()
    return getattr(projection, "tp_rank", 0), getattr(projection, "tp_size", 1)


def share_of(heads: int, rank: int, ranks: int) -> slice:
    """Which of the heads a rank holds; where there are more ranks, several hold the same one. Raises ValueError."""
    if heads % ranks and ranks % heads:
        raise ValueError(
            f"{heads} KV heads cannot be split among {ranks} tensor-parallel ranks; take a number of ranks that "
            f"divides {heads}, or a multiple of {heads}"
        )
    first = rank * heads // ranks
    return slice(first, first + max(heads // ranks, 1))


def vllm_ranks(config: Any) -> int:
    """How many tensor-parallel ranks vLLM builds this model for; 1 outside vLLM."""
    engine: Any = sys.modules.get("vllm.distributed") if config._attn_implementation == "vllm" else None
    return engine.get_tensor_model_parallel_world_size() if engine else 1


def split_plan(config: Any, words: dict[str, str]) -> dict[str, str]:
    """How the projections are split among ranks, in the words of transformers' plans. K and V of fewer heads than ranks
    are whole on each; a norm over all heads wants them together."""
    ranks, layers = vllm_ranks(config), config.per_layer_config
    kv_heads = {layer.num_key_value_heads for layer in layers}
    for heads in kv_heads | {layer.dense_kv_heads or layer.num_key_value_heads for layer in layers}:
        share_of(heads, 0, ranks)
    normed = "colwise_gather_output" if words["norm_of"] == "all" else "colwise"
    split = {"q_proj": normed, "o_proj": "rowwise"}
    split |= {"gate_proj": "colwise"} if words["gated"] else {}
    return split | {"k_proj": normed, "v_proj": "colwise"} if ranks <= min(kv_heads) else split


class HeadMix(nn.Module):
    """One matrix (before, behind) for each dense KV head, applied to each of its query heads."""

    def __init__(self, kv_heads: int, before: int, behind: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kv_heads, before, behind))
        nn.init.normal_(self.weight, std=before**-0.5)  # of a model made without weights; transformers leaves it alone

    def forward(self, x: torch.Tensor, place: tuple[int, int] = (0, 1)) -> torch.Tensor:
        """x (..., query heads * before), of the rank at this place -> (..., query heads * behind)."""
        weight = self.weight[share_of(len(self.weight), *place)]
        kv_heads, before, _ = weight.shape
        grouped = x.reshape(-1, kv_heads, x.shape[-1] // (kv_heads * before), before).transpose(0, 1)
        mixed = grouped.flatten(1, 2) @ weight  # (kv_heads, rows * groups, behind)
        return mixed.unflatten(1, grouped.shape[1:3]).transpose(0, 1).reshape(*x.shape[:-1], -1)


class DenseHeads(nn.Module):
    """What attention functions ask of a layer, for `PrunedAttention` at the dense width."""

    def __init__(self, of: "PrunedAttention", dense_kv_heads: int):
        super().__init__()
        self.config, self.layer_idx, self.scaling, self.is_causal = of.config, of.layer_idx, of.scaling, of.is_causal
        self.head_dim, self.sliding_window = of.dense_head_dim, of.sliding_window
        self.num_key_value_groups = of.config.num_attention_heads // dense_kv_heads


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, s_aux=None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' families write it: grouped queries, and, where a family has them, a cap on the scores and sinks,
    one a query head, which take part in the softmax and give nothing."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)), -1)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PrunedAttention(nn.Module):
    """Attention with `width` channels per head (half-split RoPE, GQA).

    Q, K, V: hidden -> heads * width; O: heads * width -> hidden; the cache holds width numbers per
    KV head for K and for V. factored: Q and O have the dense head_dim per head, and `q_mix` and `o_mix` lead to the
    width and back. Where the family has a norm on queries and keys, Q and K have it too, since the norm is taken over
    all of a head, and `q_mix` and `k_mix` stand behind it; likewise V and `v_mix`. Where a gate multiplies what a head
    puts out, channel by channel, it and O have the dense head_dim, with `o_mix` before them. O has a bias where V had
    one: a removed V channel's bias is a constant at the output, and that is where it is kept. own: this layer's config,
    where layers differ.
    """

    def __init__(self, dense: nn.Module, config, width: int, factored: bool = False, own: Any = None):
        super().__init__()
        words, own_config = WORDS | (config.words or {}), own or config
        self.words = words
        self.config = config
        self.layer_idx = dense.layer_idx
        self.head_dim = width
        self.scaling = dense.scaling  # 1 / sqrt(dense head_dim), or whatever the family says
        self.attention_dropout = _dropout_of(dense)
        self.is_causal = getattr(dense, "is_causal", True)
        # Families with a window pass it on with every call; the mask is made by the model.
        self.sliding_window = window_of(dense, config)
        # Whether it attends to keys and values of a layer before it, or lets others attend to its own (Gemma 4)
        self.is_kv_shared_layer = getattr(dense, "is_kv_shared_layer", False)
        self.store_full_length_kv = getattr(dense, "store_full_length_kv", False)
        self.layer_type = getattr(dense, "layer_type", None)
        self.softcap = getattr(dense, "attn_logit_softcapping", None)
        self.sinks = getattr(dense, "sinks", None)

        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, own_config.num_key_value_heads
        self.num_key_value_groups = heads // kv_heads
        dense_kv_heads, channels = own_config.dense_kv_heads or kv_heads, own_config.dense_head_dim
        self.dense_head_dim = channels
        is_normed, v_normed, is_gated = bool(words["norm_of"]), bool(words["v_norm"]), words["gated"]
        own = channels if factored else width
        o_own = channels if is_gated else own
        q_own, k_all = (channels, dense_kv_heads * channels) if is_normed else (own, kv_heads * width)
        names = {name: words["qkv"] or words[name] for name in "qkv"} | {"o": words["o"]}
        if getattr(dense, names["v"], None) is None:  # K's projection is V's too
            names["v"] = names["k"]
        has_bias = {n: getattr(getattr(dense, names[n], None), "bias", None) is not None for n in "qkvo"}
        self.q_proj = nn.Linear(hidden, heads * q_own, bias=has_bias["q"])
        v_all = dense_kv_heads * channels if v_normed else kv_heads * width
        if not self.is_kv_shared_layer:
            self.k_proj = nn.Linear(hidden, k_all, bias=has_bias["k"])
            self.v_proj = nn.Linear(hidden, v_all, bias=has_bias["v"])
        constant = has_bias["v"] and self.sinks is None and not v_normed  # attention weights sum to one
        self.o_proj = nn.Linear(heads * o_own, hidden, bias=has_bias["o"] or constant)
        self.gate_proj = nn.Linear(hidden, heads * channels, bias=False) if is_gated else None
        if is_normed:
            self.q_norm: Any = getattr(dense, words["q_norm"])
            self.k_norm: Any = getattr(dense, words["k_norm"], None)
        self.q_mix = HeadMix(dense_kv_heads, q_own, width) if factored or is_normed else None
        own_keys = not self.is_kv_shared_layer
        self.k_mix = HeadMix(kv_heads, k_all // kv_heads, width) if is_normed and own_keys else None
        self.v_norm = getattr(dense, words["v_norm"], None) if v_normed else None
        self.v_mix = HeadMix(kv_heads, v_all // kv_heads, width) if v_normed and own_keys else None
        self.o_mix = HeadMix(dense_kv_heads, width, o_own) if factored or is_gated else None
        rebuilt = config.rebuilds and factored and width > own and not is_gated
        self.dense_heads = DenseHeads(self, dense_kv_heads) if rebuilt else None
        self.columns = channels if own_config.rope_columns is None else own_config.rope_columns  # of cos and sin
        self.rope_index: torch.Tensor
        # Until weights come: the pairs in turn. (kv_heads, width)
        pairs, half = torch.arange(width // 2), max(self.columns // 2, 1)
        self.register_buffer("rope_index", torch.cat((pairs % half, pairs % half + half)).repeat(kv_heads, 1))

    def turns(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B or 1, T, columns, or one more) at the kept channels' own frequencies, (B or 1,
        this rank's kv_heads, T, width); where rope_index is behind the columns RoPE leaves a channel alone."""
        if cos.shape[-1] == self.columns:
            cos, sin = with_still(None, None, (cos, sin))
        index = self.rope_index[self.share(len(self.rope_index))]
        return cos[..., index].transpose(1, 2), sin[..., index].transpose(1, 2)

    def share(self, heads: int) -> slice:
        """Which of so many heads this rank holds; all of them without tensor parallelism."""
        return share_of(heads, *place_of(self.q_proj))

    def _of_rank(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        """This rank's heads of (..., heads, numbers), where a projection gave all of them."""
        return states[..., self.share(heads), :] if states.shape[-2] == heads else states

    def _rotate(self, query, key, cos, sin):
        """RoPE at the kept channels' own frequencies.

        query (B, heads, T, width), key (B, kv_heads, T, width), or None where it is another layer's, cos and sin (B or
        1, T, columns).
        """
        own_cos, own_sin = (x.to(query.dtype) for x in self.turns(cos, sin))
        if key is not None:
            key = key * own_cos + rotate_half(key) * own_sin
        if query.shape[-1] != self.head_dim:
            # At the dense width a channel turns if the cache has any that turns with it; what it has none of is zero.
            d = query.shape[-1]
            turned = torch.isin(torch.arange(d, device=cos.device), self.rope_index)
            cos, sin = (x[..., :d].where(turned, y).unsqueeze(1) for x, y in ((cos, 1.0), (sin, 0.0)))
            return query * cos + rotate_half(query) * sin, key
        grouped = query.unflatten(1, (own_cos.shape[1], -1))  # (B, kv_heads, groups, T, width)
        grouped = grouped * own_cos.unsqueeze(2) + rotate_half(grouped) * own_sin.unsqueeze(2)
        return grouped.flatten(1, 2), key

    def normed(self, projected: torch.Tensor, norm: nn.Module, turn: Any = None) -> torch.Tensor:
        """Queries or keys (..., heads * dense head_dim) behind the family's norm, over each head or all of them. turn:
        cos and sin, where RoPE comes first."""
        if self.words["norm_of"] == "all":
            return norm(projected)
        heads = projected.unflatten(-1, (-1, self.dense_head_dim))
        if turn is not None:
            cos, sin = (x[..., : heads.shape[-1]].unsqueeze(-2).to(heads.dtype) for x in turn)
            heads = heads * cos + rotate_half(heads) * sin
        return norm(heads).flatten(-2)

    def dense_queries(self, hidden: torch.Tensor, turn: Any = None) -> torch.Tensor:
        """hidden (..., hidden) -> queries before `q_mix`; turn: see `normed`."""
        query = self.q_proj(hidden)
        if not self.words["norm_of"]:
            return query
        query = self.normed(query, self.q_norm, turn).unflatten(-1, (-1, self.dense_head_dim))
        return self._of_rank(query, self.config.num_attention_heads).flatten(-2)

    def queries(self, hidden: torch.Tensor, turn: Any = None) -> torch.Tensor:
        """hidden (..., hidden) -> queries before RoPE, (..., heads * width); turn: see `normed`."""
        query = self.dense_queries(hidden, turn)
        return query if self.q_mix is None else self.q_mix(query, place_of(self.q_proj))

    def keys(self, hidden: torch.Tensor, turn: Any = None) -> torch.Tensor:
        """hidden (..., hidden) -> keys before RoPE, (..., kv_heads * width); turn: see `normed`."""
        key = self.k_proj(hidden)
        heads, width = self.rope_index.shape if self.k_mix is None else self.k_mix.weight.shape[:2]
        share = self.share(heads)
        if key.shape[-1] not in (heads * width, (share.stop - share.start) * width):
            raise ValueError(
                f"layer {self.layer_idx}: {key.shape[-1]} numbers of {heads} KV heads of {width} came; tensor "
                "parallelism splits whole heads only: take a number of ranks that divides them, or vLLM"
            )
        if self.k_mix is None:
            return key
        place = (0, 1) if key.shape[-1] == heads * width else place_of(self.q_proj)
        return self.k_mix(self.normed(key, self.k_norm, turn), place)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., hidden) -> values (..., kv_heads * width)."""
        value = self.v_proj(hidden)
        if self.v_mix is None:
            return value
        heads, width = self.v_mix.weight.shape[:2]
        place = (0, 1) if value.shape[-1] == heads * width else place_of(self.q_proj)
        assert self.v_norm is not None
        return self.v_mix(self.v_norm(value.unflatten(-1, (-1, self.dense_head_dim))).flatten(-2), place)

    def _warmed(self, query: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """query (B, heads, T, width) times 1 + beta log(1 + floor(position / original length)), where the family has it
        (Ministral 3, after Llama 4); positions (B or 1, T)."""
        if not self.words["temperature"]:
            return query
        if positions is None:
            raise TypeError(f"layer {self.layer_idx}: queries depend on position_ids, and none came")
        rope = self.config.rope_parameters
        steps = torch.floor(positions / rope["original_max_position_embeddings"])
        warmth = 1 + rope[self.words["temperature"]] * torch.log(1 + steps)
        return query * warmth[:, None, :, None].to(query.dtype)

    def outputs(self, attended: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Mixed values (..., heads * width) -> (..., hidden). hidden: what came in, for the gate."""
        mixed = attended if self.o_mix is None else self.o_mix(attended, place_of(self.q_proj))
        return self.o_proj(mixed if self.gate_proj is None else mixed * torch.sigmoid(self.gate_proj(hidden)))

    def _rebuild(self, key, value):
        """Keys (with RoPE) and values (B, kv_heads, tokens, width) -> those of the dense heads and width, (B, dense KV
        heads, tokens, dense head_dim). What mixes channels that turn alike commutes with RoPE."""
        mixes: Any = self.q_mix, self.o_mix
        shape = (key.shape[1], -1)  # of the heads: groups, and those of each
        to_keys, to_values = (mix.weight[self.share(len(mix.weight))].unflatten(0, shape) for mix in mixes)
        to_keys = to_keys.mT  # like to_values (groups, heads of each, width, dense head_dim)
        return (key.unsqueeze(2) @ to_keys).flatten(1, 2), (value.unsqueeze(2) @ to_values).flatten(1, 2)

    def _is_rebuilt(self, tokens, cache, kwargs):
        """Whether keys and values are led to the dense width: for many new tokens, where no engine reads the cache."""
        own = cache is None or isinstance(cache, (Cache, CacheLayerMixin))
        engine = self._engine(kwargs) is not None or kwargs.get(PAGED) is not None
        return self.dense_heads is not None and tokens >= MANY and own and not engine

    def _update(self, cache, key, value, kwargs):
        """Keys and values (B, kv_heads, T, width) -> all that are cached; a paged cache reads and changes kwargs."""
        place = () if isinstance(cache, CacheLayerMixin) else (self.layer_idx,)
        told = {"kwargs": kwargs} if CACHE_NAMES[0] == CACHE else {}
        return cache.update(key, value, *place, **told)

    def _engine(self, kwargs):
        """vLLM's attention of this layer: handed over, or a part of this module in newer ones; None elsewhere."""
        return (kwargs.get("attention_instances") or {}).get(self.layer_idx) or getattr(self, "attn", None)

    def _check_engine(self, kwargs):
        """vLLM before 0.27.2 gives all layers the one head_dim of the config, and would mix up tokens; older ones leave
        out sinks without a word."""
        engine = self._engine(kwargs)
        if engine is not None and self.sinks is not None and not getattr(engine, "has_sink", False):
            raise ValueError(
                f"layer {self.layer_idx} has attention sinks, which this vLLM leaves out; update vLLM, or serve the "
                "folder with transformers"
            )
        if engine is not None and getattr(engine, "head_size", self.head_dim) != self.head_dim:
            raise ValueError(
                f"layer {self.layer_idx} has {self.head_dim} channels a head and this vLLM gives it "
                f"{engine.head_size}; update vLLM, or prune with --layout uniform"
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        cache = take_cache(kwargs)
        if cache is None and kwargs.get("use_cache") and kwargs.get(PAGED) is None:
            raise TypeError(
                f"layer {self.layer_idx}: a KV cache is wanted, but this transformers hands none to attention under "
                f"a name that kvprune knows ({', '.join(CACHE_NAMES)}); update kvprune, and run: kvprune refresh DIR"
            )
        self._check_engine(kwargs)
        input_shape = hidden_states.shape[:-1]
        is_rebuilt = self._is_rebuilt(input_shape[-1], cache, kwargs)
        hidden_shape = (*input_shape, -1, self.head_dim)
        turn = None
        if self.words["norm_behind_rope"]:
            turn, position_embeddings = position_embeddings, None
        if is_rebuilt:
            query_states = self.dense_queries(hidden_states, turn)
            query_states = query_states.view(*input_shape, -1, self.dense_head_dim).transpose(1, 2)
        else:
            query_states = self.queries(hidden_states, turn).view(hidden_shape).transpose(1, 2)
        shared, kv_heads = kwargs.pop("shared_kv_states", None), len(self.rope_index)
        key_states = value_states = None
        if not self.is_kv_shared_layer:
            key_states = self._of_rank(self.keys(hidden_states, turn).view(hidden_shape), kv_heads).transpose(1, 2)
            value_states = self._of_rank(self.values(hidden_states).view(hidden_shape), kv_heads).transpose(1, 2)

        if position_embeddings is not None:
            query_states, key_states = self._rotate(query_states, key_states, *position_embeddings)
        query_states = self._warmed(query_states, kwargs.get("position_ids"))

        if self.is_kv_shared_layer:
            key_states, value_states = (states.to(query_states.device) for states in shared[self.layer_type])
        elif cache is not None:
            key_states, value_states = self._update(cache, key_states, value_states, kwargs)
        if self.store_full_length_kv and shared is not None:
            shared[self.layer_type] = key_states, value_states
        if is_rebuilt:
            key_states, value_states = self._rebuild(key_states, value_states)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        attn_output, attn_weights = attention_interface(
            self.dense_heads if is_rebuilt else self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,  # vLLM looks for it in this call's source
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output) if is_rebuilt else self.outputs(attn_output, hidden_states), attn_weights


class Countless(DynamicLayer):
    """A cache layer whose keys have no width; DynamicLayer takes what has no numbers for no tokens."""

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


class NoAttention(nn.Module):
    """Of a layer that has lost its attention: a constant, its O's bias. It still tells the cache of its tokens,
    with keys and values of no width: models ask the first layer how many there are."""

    head_dim = 0

    def __init__(self, dense: nn.Module, config, own: Any = None):
        super().__init__()
        self.config = config
        self.kv_heads = (own or config).num_key_value_heads
        self.layer_idx: Any = dense.layer_idx
        with warnings.catch_warnings():  # torch has one for a matrix that reads nothing
            warnings.simplefilter("ignore")
            self.o_proj = nn.Linear(0, config.hidden_size)
        nn.init.zeros_(self.o_proj.bias)
        # Read by whoever makes masks and caches, as of the others
        self.is_causal, self.sliding_window = getattr(dense, "is_causal", True), window_of(dense, config)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        cache = take_cache(kwargs)
        if cache is not None:
            batch, tokens, _ = hidden_states.shape
            nothing = hidden_states.new_empty(batch, self.kv_heads, tokens, 0)
            if isinstance(cache, CacheLayerMixin):
                cache.update(nothing, nothing)
            else:
                self._count_only(cache)
                cache.update(nothing, nothing, self.layer_idx)
                self._count_only(cache)  # where a cache makes its layers on the way
        return self.o_proj(hidden_states[..., :0]), None

    def _count_only(self, cache: Any) -> None:
        """Have this layer's place in a cache count tokens, whatever the cache does with keys and values."""
        layers = cache.layers
        if self.layer_idx >= len(layers) or isinstance(layers[self.layer_idx], Countless):
            return
        layer = layers[self.layer_idx]
        if isinstance(layer, DynamicLayer) and not layer.is_sliding:
            layers[self.layer_idx] = Countless()
            if layer.is_initialized:
                layers[self.layer_idx].update(layer.keys, layer.values)


class Skipped(nn.Module):
    """In place of a block that has gone, attention, MLP and norms: the residual stream goes on, with a constant added.
    The constant is the bias of what stands for its attention, which still tells the cache of its tokens."""

    def __init__(self, dense: nn.Module, config, attention: str, own: Any = None):
        nn.Module.__init__(self)  # nothing of the block's own
        self.stand_in = attention  # its name, the family's, as in the other blocks
        setattr(self, attention, NoAttention(getattr(dense, attention), config, own))

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """hidden_states (B, T, hidden) -> the same. Some families hand the cache over by place, so all gets a name."""
        kwargs |= {f"argument_{place}": value for place, value in enumerate(args)}
        return hidden_states + getattr(self, self.stand_in)(hidden_states, **kwargs)[0]


def skipped(block: nn.Module, config, attention: str, own: Any = None) -> nn.Module:
    """A `Skipped` that is one of the block's own class too, and of its name: by these transformers knows what hidden
    states to record, and accelerate what to keep on one device."""
    kind = type(type(block).__name__, (Skipped, type(block)), {})
    return kind(block, config, attention, own)


def _dropout_of(dense: nn.Module) -> float:
    """Of attention weights in training, under any of its names."""
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        value = getattr(dense, name, None)
        if value is not None:
            return float(getattr(value, "p", value))
    return 0.0


def window_of(dense: nn.Module, config: Any) -> int | None:
    """Of sliding-window attention; some families give the number to every layer, and say apart whether it slides."""
    window = getattr(dense, "sliding_window", getattr(config, "sliding_window", None))
    return (window or None) if getattr(dense, "is_sliding", True) else None


def _look_at_copy(name: Any) -> None:
    """Where this file is kvprune's own, and not a copy in a folder: have it look at how old a folder's copy is."""
    look = getattr(sys.modules.get(__package__ or ""), "look_at_copy", None)
    if look is not None and name:
        look(name)


def _twin(model_type: str) -> tuple[Any, Any, Any]:
    """The pruned config, base model and causal LM of one dense family, made from its own classes."""
    dense_config: Any = CONFIG_MAPPING[model_type]
    dense_model: Any = MODEL_MAPPING[dense_config]
    dense_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]
    stem = _stem(model_type)
    # "sdpa" leaves out a cap on the scores; transformers 5.16 to 5.19 take it for Gemma 2 all the same
    has_sdpa = dense_model._supports_sdpa and not getattr(dense_config(), "attn_logit_softcapping", None)

    class Config(dense_config):
        dense_head_dim: int | None = None
        dense_kv_heads: int | None = None  # None: as many as num_key_value_heads
        factored: bool = False
        # Whether factored layers may read many tokens at the dense width; before version 4 what mixed the slowest
        # pairs did not commute with RoPE.
        rebuilds: bool = False
        rope_columns: int | None = None  # of the table of cos and sin; None: dense_head_dim
        block: bool = True  # of one layer: False where the whole block has gone
        words: dict[str, Any] | None = None
        attention_layers: list[int] | None = None  # the numbers of the layers that have attention; None: all

        def __getattribute__(self, key):
            if key == "head_dim" and self.is_heterogeneous:  # where transformers itself would raise
                widths = set(self.widths())
                return widths.pop() if len(widths) == 1 else self.dense_head_dim
            return super().__getattribute__(key)

        def widths(self) -> list[int]:
            """Of the layers with attention, kept channels per KV head."""
            layers = self.per_layer_config
            numbers = range(len(layers)) if self.attention_layers is None else self.attention_layers
            return [layers[number].head_dim for number in numbers]

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
            _look_at_copy(pretrained_model_name_or_path)
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

        @classmethod
        def from_dict(cls, config_dict, **kwargs):  # what AutoConfig calls
            _look_at_copy(kwargs.get("name_or_path"))
            return super().from_dict(config_dict, **kwargs)

        @classmethod
        def is_custom_code(cls) -> bool:
            """The family's own layer types, which older transformers would rename where this is true (5.16)."""
            return False

        def _validate_longrope_rope_parameters(self, *args, **kwargs):
            """As transformers does it, by the width that the factors belong to: they are one for each dense pair."""
            read = self.dense() if self.is_heterogeneous else self
            dense_config._validate_longrope_rope_parameters(read, *args, **kwargs)

        def dense(self):
            """This config as the dense modules must read it: the dense head_dim, and all KV heads."""
            heads = [layer.dense_kv_heads or layer.num_key_value_heads for layer in self.per_layer_config]
            channels = [layer.dense_head_dim for layer in self.per_layer_config]
            config = copy.deepcopy(self)
            config.per_layer_config = None
            config.head_dim, config.num_key_value_heads = channels[0], heads[0]
            if len(set(zip(heads, channels, strict=True))) > 1:
                names = ("num_key_value_heads", "head_dim")
                both = [dict(zip(names, sizes, strict=True)) for sizes in zip(heads, channels, strict=True)]
                config.per_layer_config = dict(enumerate(both))
            return config

    Config.model_type = PREFIX + model_type

    class Model(dense_model):
        config_class = Config
        _supports_attention_backend = True
        _supports_sdpa = has_sdpa
        _can_record_outputs = {**(dense_model._can_record_outputs or {}), "attentions": PrunedAttention}  # noqa: RUF012
        _can_set_experts_implementation, set_experts_implementation = _experts_of(dense_model)

        def __init__(self, config):
            super().__init__(config.dense())
            # The rotary table keeps the dense config: its frequencies belong to the dense width.
            if hasattr(self, "rotary_emb"):
                self.rotary_emb.register_forward_hook(with_still)  # once for all layers
            config._attn_implementation = self.config._attn_implementation
            config._experts_implementation = self.config._experts_implementation
            self.config: Any = config
            words = WORDS | (config.words or {})
            layers: Any = self.get_submodule(words["layers"])
            for index, layer_config in enumerate(config.per_layer_config):
                if config.attention_layers is not None and index not in config.attention_layers:
                    continue
                layer, own = layers[index], (layer_config.head_dim, layer_config.factored)
                if not layer_config.block:
                    layers[index] = skipped(layer, config, words["attention"], layer_config)
                    continue
                dense = getattr(layer, words["attention"])
                attention = PrunedAttention(dense, config, *own, layer_config) if own[0] else None
                setattr(layer, words["attention"], attention or NoAttention(dense, config, layer_config))
            self.post_init()
            where = f"{words['layers']}.*.{words['attention']}."
            plan = {name: style for name, style in self.tp_plan.items() if not name.startswith(where)}
            self._tp_plan = plan | {where + name: style for name, style in split_plan(config, words).items()}

    class ForCausalLM(dense_lm):
        config_class = Config
        _supports_attention_backend = True
        _supports_sdpa = has_sdpa
        _can_set_experts_implementation, set_experts_implementation = _experts_of(dense_lm)

        def __init__(self, config):
            super().__init__(config.dense())
            config._attn_implementation = self.config._attn_implementation
            config._experts_implementation = self.config._experts_implementation
            self.config: Any = config
            setattr(self, self.base_model_prefix, Model(config))
            self.post_init()

        def push_to_hub(self, *args, **kwargs):
            """As transformers does it; where this file is kvprune's own, with tokenizer, plan, record and model card
            beside the weights."""
            push = getattr(sys.modules.get(__package__ or ""), "push_model", None)
            return super().push_to_hub(*args, **kwargs) if push is None else push(self, *args, **kwargs)

        def init_continuous_batching(self, *args, **kwargs):
            """As the family does it, which has one cache for all layers. Raises ValueError for mixed widths."""
            widths = set(self.config.widths())
            if len(widths) > 1:
                raise ValueError(
                    f"transformers' continuous batching has one head_dim for all layers, and these have "
                    f"{sorted(widths)}; use generate or vLLM, or prune with --layout uniform"
                )
            return super().init_continuous_batching(*args, **kwargs)

    for cls, name in ((Config, "Config"), (Model, "Model"), (ForCausalLM, "ForCausalLM")):
        cls.__name__ = cls.__qualname__ = stem + name
        globals()[cls.__name__] = cls
    for auto in HEADS:
        # Its base model comes from AutoModel, and is named as in the causal LM, whose weights it loads
        head = _dense_head(auto, model_type)
        if head is None:
            continue
        name = _head_name(auto, model_type)
        own = {"config_class": Config, "base_model_prefix": dense_lm.base_model_prefix, "__module__": __name__}
        own["_supports_sdpa"] = has_sdpa
        names = ("_can_set_experts_implementation", "set_experts_implementation")
        globals()[name] = type(name, (head,), own | dict(zip(names, _experts_of(head), strict=True)))
    return Config, Model, ForCausalLM


def _experts_of(dense: Any) -> tuple[Any, Any]:
    """How a twin's experts run: whether they can at once, as the family's, and what lets them. transformers reads the
    one in the source of a class's module, which here says nothing of them, and else loops over experts, which vLLM
    cannot compile; and it sets the other in the model's config, where experts have the dense one."""

    def let(self, experts_implementation):
        dense.set_experts_implementation(self, experts_implementation)
        for module in self.modules():
            if getattr(module, "config", None) is not None:
                module.config._experts_implementation = self.config._experts_implementation

    return classmethod(lambda _cls: dense._can_set_experts_implementation()), let


def _dense_head(auto: Any, model_type: str) -> Any:
    """The family's own class for one of HEADS; None where it has none."""
    return auto._model_mapping.get(CONFIG_MAPPING[model_type], None)


def _head_name(auto: Any, model_type: str) -> str:
    kind = getattr(_dense_head(auto, model_type), "__name__", "").partition("For")[2]
    return f"{_stem(model_type)}For{kind}"


def _stem(model_type: str) -> str:
    """What the names of a family's twins begin with; some families have classes of another's."""
    return "KVPrune" + CONFIG_MAPPING[model_type].__name__.removesuffix("Config")


TWINS = {
    model_type: _twin(model_type) for model_type in FAMILIES if model_type in CONFIG_MAPPING
}  # (config, base model, causal LM)


def register() -> None:
    """Make the Auto classes know the pruned twins, in place of those of another copy of this file."""
    for model_type, (config, model, lm) in TWINS.items():
        heads = [(auto, globals().get(_head_name(auto, model_type))) for auto in HEADS]
        heads = [(auto, cls) for auto, cls in heads if cls is not None]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, cls in ((AutoModel, model), (AutoModelForCausalLM, lm), *heads):
            auto.register(config, cls, exist_ok=True)
            # save_pretrained then copies this file and writes auto_map, so that the folder stands alone.
            cls.register_for_auto_class(auto.__name__)
        config.register_for_auto_class("AutoConfig")


register()


def config_class(model_type: str) -> Any:
    """The pruned config class of a dense model_type."""
    return TWINS[model_type][0]


def auto_map(model_type: str) -> dict[str, str]:
    """What config.json needs so that `trust_remote_code=True`, and vLLM, find the classes in the folder."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    module = __name__.rpartition(".")[2]
    return {auto: f"{module}.{cls.__name__}" for auto, cls in zip(names, TWINS[model_type], strict=True)}
