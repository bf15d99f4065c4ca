"""Tiny random models of every family, a tokenizer for them, and the dense references: masked, and projected.

The references are written from the exactness rules with plain loops and share no code with the library.
"""

import copy
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kvprune.channels.choice.basis import Basis, Kept, basis_of, identity, slow_channels
from kvprune.channels.cut.surgery import cut
from kvprune.channels.evidence.moments import AttentionMoments, attention_moments
from kvprune.channels.plan import LayerPlan, Model, PruningPlan
from kvprune.channels.widths.sensitivity import Probe
from kvprune.models.view import ModelView
from kvprune.progress import Progress

# for prune: few tokens; and widths in small steps
QUICK = {"calibration_tokens": 512, "calibration_window": 64, "eval_tokens": 512, "windows": (32, 64), "device": "cpu"}
COARSE = {**QUICK, "repair_tokens": 4096, "align": 2, "min_width": 4}
VOCABULARY = 300
# RoPE so slow that half of the pairs do not turn at all over a tiny text: then mixing them is exact.
STILL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e60}}


def rope(kind, **settings):
    """A Llama with this kind of RoPE scaling."""
    return LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "llama3-rope": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "longrope": rope("longrope", factor=8.0, original_max_position_embeddings=64),  # and its factors: tiny_model
    "yarn": rope("yarn", factor=8.0, original_max_position_embeddings=16),
    "linear": rope("linear", factor=2.0),
    "dynamic": rope("dynamic", factor=2.0),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-sliding": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
}


def tiny_model(
    family: str,
    *,
    kv_heads=2,
    groups=1,
    head_dim=16,
    layers=2,
    attention="sdpa",
    seed=0,
    positions=128,
    hidden=None,
    **extra,
):
    """A random model in eval mode, float32, with biases that are not zero."""
    config_class, model_class, options = FAMILIES[family]
    options = options | extra
    if options.get("rope_parameters", {}).get("rope_type") == "longrope":  # one factor for each dense pair
        factors = {"short_factor": 0.1, "long_factor": 0.3}
        lists = {name: [1 + step * i for i in range(head_dim // 2)] for name, step in factors.items()}
        options = options | {"rope_parameters": lists | options["rope_parameters"]}
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=hidden or 12 * kv_heads * groups,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        attn_implementation=attention,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        scale = 0.5 if name.endswith("bias") else 0.1
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model


def make_plan(model, layers, ratio=0.5, merge=1) -> PruningPlan:
    """A plan from [(qk, vo), (qk, vo, heads) or (qk, vo, heads, block) per layer], lists of kept channels, or
    coordinates, per KV head of the pruned model, and of the dense KV heads that it stands for."""
    view = ModelView(model)
    return PruningPlan(
        model=Model(source="tiny", revision=None, architecture=view.family.model_type, **vars(view.shape)),
        ratio=ratio,
        layout="per-layer",
        merge=merge,
        method={},
        calibration=None,
        sensitivity=None,
        seed=0,
        versions={},
        layers=tuple(
            LayerPlan.model_validate(dict(zip(("qk", "vo", "heads", "block"), layer, strict=False))) for layer in layers
        ),
    )


def measured_bases(model, merge, *, slow=False, text=None) -> list[Basis]:
    """Bases across groups of `merge` KV heads, from what the attention does on random text; slow: mix slow pairs, or
    these pairs, whether they are slow or not."""
    view = ModelView(model)
    channels = [slow_channels(a) if slow is True else view.units[slow or []].flatten() for a in view.attention]
    moments = attention_moments(view, batches() if text is None else text, channels, merge, lambda layers: None)
    return [basis_of(m, a.weights(), c)[0] for m, a, c in zip(moments, view.attention, channels, strict=True)]


def random_bases(model, merge, seed=0) -> list[Basis]:
    """Bases from random moments, across groups of KV heads in any order."""
    view = ModelView(model)
    s, generator = view.shape, torch.Generator().manual_seed(seed)

    def covariances(*shape, dtype=torch.float64):
        factors = torch.randn(*shape, shape[-1], dtype=dtype, generator=generator)
        return factors @ factors.mH / shape[-1]

    nothing = torch.empty(0, dtype=torch.int64)
    found = []
    for attention in view.attention:
        moments = AttentionMoments(
            heads=torch.randperm(s.kv_heads, generator=generator).view(-1, merge),
            queries=torch.rand(s.kv_heads, s.head_dim // 2, dtype=torch.float64, generator=generator) + 0.5,
            keys=covariances(s.kv_heads, s.head_dim // 2, merge, dtype=torch.complex128),
            slow_queries=torch.zeros(s.kv_heads, 0, 0, dtype=torch.float64),
            slow_keys=torch.zeros(s.kv_heads, 0, 0, dtype=torch.float64),
            slow_means=torch.zeros(s.kv_heads, 0, dtype=torch.float64),
            outputs=covariances(s.kv_heads, merge * s.head_dim),
        )
        found.append(basis_of(moments, attention.weights(), nothing)[0])
    return found


def merged_plan(model, bases, widths, seed=0) -> PruningPlan:
    """A plan for these bases that keeps random pairs of the keys' coordinates, and the leading ones of the values."""
    generator = torch.Generator().manual_seed(seed)
    merge = bases[0].heads.shape[1]
    layers = []
    for basis, width in zip(bases, widths, strict=True):
        half, qk = basis.width // 2, []
        for _ in basis.heads:
            pairs = torch.randperm(half, generator=generator)[: width // 2].tolist()
            qk.append(sorted(pairs + [p + half for p in pairs]))
        layers.append((qk, None, basis.heads.tolist()))
    kept = sum(widths) / sum(basis.width for basis in bases)
    return make_plan(model, layers, ratio=1 - kept, merge=merge)


def merged_model(model, widths, merge=2, seed=0):
    """(projected dense, pruned), with random bases, pairs and groups of `merge` KV heads."""
    bases = random_bases(model, merge, seed)
    plan = merged_plan(model, bases, widths, seed)
    return project_dense(model, plan, bases), cut(ModelView(model), plan, bases)


def random_layers(model, widths, seed=0):
    """Random kept channels of the given widths, RoPE pairs whole, different for every head."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    half = config.head_dim // 2
    layers = []
    for width in widths:
        qk, vo = [], []
        for _ in range(config.num_key_value_heads):
            pairs = torch.randperm(half, generator=generator)[: width // 2].tolist()
            qk.append(sorted(pairs + [p + half for p in pairs]))
            vo.append(sorted(torch.randperm(config.head_dim, generator=generator)[:width].tolist()))
        layers.append((qk, vo))
    return layers


def stop(*_args):
    """In place of what would go on: a run that is cut short there."""
    raise RuntimeError("stopped")


def batches():
    """Token ids of five windows, in batches of two and one."""
    return list(torch.randint(3, VOCABULARY, (5, 13), generator=torch.Generator().manual_seed(1)).split(2))


def probes_of(layers, head_dim=16):
    """One probe a layer, of its kept channels (qk, vo)."""
    return [
        Probe(i, Kept(torch.tensor(qk), torch.tensor(vo)), identity(len(qk), head_dim))
        for i, (qk, vo) in enumerate(layers)
    ]


def mask_dense(model, layers):
    """A copy of the dense model with the removed channels masked: Q/K rows zeroed with their biases, V rows zeroed
    without theirs, O untouched."""
    masked = copy.deepcopy(model)
    d = model.config.head_dim
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for block, (qk, vo) in zip(masked.model.layers, layers, strict=True):
            attention = block.self_attn
            for kv_head in range(model.config.num_key_value_heads):
                for channel in range(d):
                    if channel not in qk[kv_head]:
                        zero_row(attention.k_proj, kv_head * d + channel)
                        for group in range(groups):
                            zero_row(attention.q_proj, (kv_head * groups + group) * d + channel)
                    if channel not in vo[kv_head]:
                        attention.v_proj.weight[kv_head * d + channel] = 0
    return masked


@torch.no_grad()
def project_dense(model, plan, bases):
    """A copy of the dense model whose keys (weights and biases) and values (weights alone) go to the kept coordinates
    and back, Q and O untouched, and whose mixed pairs do not turn. The maps there and back are the bases'; the rest is
    written out."""
    projected = copy.deepcopy(model)
    d = model.config.head_dim
    still = [channel for channel in bases[0].slow.tolist() if channel < d // 2]
    for name in ("inv_freq", "original_inv_freq"):
        getattr(projected.model.rotary_emb, name)[still] = 0
    for block, layer, basis in zip(projected.model.layers, plan.layers, bases, strict=True):
        attention, width = block.self_attn, layer.width
        leading = [list(range(width)) for _ in layer.qk]
        maps = basis.cut(Kept(torch.tensor(layer.qk), torch.tensor(leading)))
        before = {name: t.double().clone() for name, t in attention.state_dict().items()}
        for g, group in enumerate(layer.heads or [[head] for head in range(len(layer.qk))]):
            rows = [head * d + channel for head in group for channel in range(d)]
            for j, head in enumerate(group):
                own = slice(head * d, (head + 1) * d)
                for name, down, up in (("k", maps.keys, maps.queries), ("v", maps.values, maps.outputs)):
                    there_and_back = up[g * len(group) + j] @ down[g]  # (d, m * d)
                    linear = getattr(attention, f"{name}_proj")
                    linear.weight[own] = (there_and_back @ before[f"{name}_proj.weight"][rows]).to(model.dtype)
                    if name == "k" and linear.bias is not None:
                        linear.bias[own] = (there_and_back @ before["k_proj.bias"][rows]).to(model.dtype)
    return projected


def zero_row(linear, row):
    linear.weight[row] = 0
    if linear.bias is not None:
        linear.bias[row] = 0


WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "river",
    "saw",
    "found",
    "built",
    "near",
    "old",
    "new",
    "green",
    "small",
    "and",
    "then",
    "of",
    "in",
    "to",
]


def words(count: int, seed: int = 0) -> str:
    """A text of random words, in lines."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count,), generator=generator).tolist()
    lines = [" ".join(WORDS[i] for i in picks[start : start + 12]) for start in range(0, count, 12)]
    return "\n".join(lines) + "\n"


class Counted(Progress):
    """[name, total, steps done] of every phase."""

    def __init__(self):
        super().__init__()
        self.phases = []

    @contextmanager
    def _show(self, name, total):
        phase = [name, total, 0]
        self.phases.append(phase)

        def advance(steps, note=""):
            phase[2] += steps

        yield advance


class Heard(Progress):
    """What is said, line by line."""

    def __init__(self):
        super().__init__()
        self.said = []

    def say(self, message):
        self.said.append(message)


def too_large_as_a_whole(needs):
    """room.needs_of for memory that is too little for the whole model, whatever it is, and enough for its blocks."""
    return lambda *given, streamed: needs(*given, streamed=True) if streamed else {"weights": 2**62}


def tensors_of(folder):
    """name -> tensor, of all the safetensors files there."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on such text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(2000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
