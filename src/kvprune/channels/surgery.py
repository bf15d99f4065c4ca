"""A dense model and a plan -> a smaller model. No scores here: only cutting."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvprune.channels import portable
from kvprune.channels.basis import Basis, Cut, Kept, identity
from kvprune.channels.merging import is_factored
from kvprune.channels.plan import LayerPlan, PruningPlan
from kvprune.channels.selection import leading
from kvprune.errors import PlanMismatch
from kvprune.models.attention import AttentionWeights
from kvprune.models.view import ModelView
from kvprune.runtime import modeling
from kvprune.runtime.dtype import stored_dtype
from kvprune.runtime.twin import twin_config


@torch.no_grad()
def cut(view: ModelView, plan: PruningPlan, bases: Sequence[Basis] | None = None) -> PreTrainedModel:
    """A pruned model that shares every tensor but the attention's with the dense one, which stays as it is.

    Its logits equal those of the dense model whose K and V (not V's bias) go to the kept coordinates and back: with
    no change of basis, of the dense model with the removed channels masked. Where the plan has no vo, the coordinates
    are those of that layer's of `bases`. Raises PlanMismatch if the plan is for another model, or wants bases that are
    not given.
    """
    if plan.is_rotated and bases is None:
        raise PlanMismatch("the plan changes the basis on its calibration text: apply it with kvprune prune --plan")
    plan.check(view.family.model_type, view.shape)
    dense = view.lm
    if bases is None:
        bases = [identity(view.shape.kv_heads, view.shape.head_dim)] * view.shape.layers
    is_stock = plan.layout in portable.LAYOUTS
    factored = [not is_stock and is_factored(view.shape, width) for width in plan.widths]
    order = None
    if is_stock:
        pruned, order = portable.stock_model(view, plan, bases[0])
        rotary = type(pruned.base_model.rotary_emb)(pruned.config).to(view.device)
    else:
        with torch.device("meta"):
            pruned = AutoModelForCausalLM.from_config(_config(view, plan, factored), dtype=dense.dtype)
        rotary = copy.deepcopy(dense.base_model.rotary_emb)  # some tables change with the context, each its own
    scaling = 1.0 if is_stock else float(getattr(rotary, "attention_scaling", 1.0))
    state = dict(dense.state_dict())
    base = dense.base_model_prefix
    for index, (attention, layer) in enumerate(zip(view.attention, plan.layers, strict=True)):
        prefix = f"{base}.{view.family.layers}.{index}.{view.family.attention}."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        narrow = _narrow(attention.weights(), bases[index], _kept(layer), factored[index], order, scaling)
        if is_stock:
            _make_stock(narrow, portable.query_scale(view, plan))
        state |= {prefix + name: tensor for name, tensor in narrow.items()}
    pruned.load_state_dict(state, strict=True, assign=True)
    pruned.base_model.rotary_emb = rotary
    for name, buffer in dense.named_buffers(remove_duplicate=False):  # those that no checkpoint holds
        module, _, leaf = name.rpartition(".")
        if name not in state and pruned.get_submodule(module).get_buffer(leaf).is_meta:
            pruned.get_submodule(module).register_buffer(leaf, buffer, persistent=False)
    pruned.tie_weights()
    pruned.config.dtype = stored_dtype(dense)
    pruned.generation_config = copy.deepcopy(dense.generation_config)
    return pruned.eval()


def _kept(layer: LayerPlan) -> Kept:
    qk = torch.tensor(layer.qk)
    return Kept(qk, leading(*qk.shape) if layer.vo is None else torch.tensor(layer.vo))


def _config(view: ModelView, plan: PruningPlan, factored: Sequence[bool]):
    """The pruned twin's config, as a checkpoint has it."""
    config = twin_config(view.lm.config, view.shape.head_dim, plan.widths, plan.merge, factored)
    config.tie_word_embeddings = view.is_tied
    config.auto_map = modeling.auto_map(view.family.model_type)
    config._attn_implementation = view.lm.config._attn_implementation
    return config


def _narrow(
    w: AttentionWeights, basis: Basis, kept: Kept, factored: bool, order: torch.Tensor | None, scaling: float
) -> dict[str, torch.Tensor]:
    """Q, K, V and O of the kept coordinates, named as PrunedAttention names them. order (width,): which of the kept
    coordinates of Q and K stands where; None: as they are. scaling: what RoPE multiplies queries and keys by as it
    turns them."""
    maps, dtype, device = basis.cut(kept), w.k.dtype, w.k.device
    if scaling != 1:  # what RoPE leaves alone has it from the queries
        still = (maps.rope == w.k.shape[1]).repeat_interleave(basis.heads.shape[1], 0).unsqueeze(1)
        maps = replace(maps, queries=torch.where(still, maps.queries * scaling**2, maps.queries))
    if order is not None:
        maps = replace(maps, keys=maps.keys[:, order], queries=maps.queries[..., order], rope=maps.rope[:, order])
    heads, hidden = basis.heads, w.k.shape[-1]
    maps = Cut(*(x.to(device) for x in vars(maps).values()))
    members = heads.flatten()  # queries follow the groups, and so does what O reads

    def grouped(rows: torch.Tensor) -> torch.Tensor:
        """(kv_heads, D, x) -> (groups, m * D, x)"""
        return rows[heads].flatten(1, 2).double()

    q, o = w.q[members].double(), w.o[members].double()  # (H, query heads of each, D, hidden)
    q_bias = None if w.q_bias is None else w.q_bias[members].double().unsqueeze(-1)
    state = {
        "rope_index": maps.rope,
        "k_proj.weight": (maps.keys @ grouped(w.k)).reshape(-1, hidden),
        "v_proj.weight": (maps.values @ grouped(w.v)).reshape(-1, hidden),
    }
    if factored:
        state |= {"q_mix.weight": maps.queries, "o_mix.weight": maps.outputs.mT}
    else:
        back = maps.queries.mT.unsqueeze(1)  # (H, 1, width, D)
        q, o = back @ q, maps.outputs.mT.unsqueeze(1) @ o
        q_bias = None if q_bias is None else back @ q_bias
    state |= {"q_proj.weight": q.reshape(-1, hidden), "o_proj.weight": o.permute(3, 0, 1, 2).reshape(hidden, -1)}
    if q_bias is not None:
        state["q_proj.bias"] = q_bias.reshape(-1)
    if w.k_bias is not None:
        state["k_proj.bias"] = (maps.keys @ grouped(w.k_bias.unsqueeze(-1))).reshape(-1)
    if w.v_bias is not None:
        state["v_proj.bias"] = (maps.values @ grouped(w.v_bias.unsqueeze(-1))).reshape(-1)
    if w.o_bias is not None or w.v_bias is not None:
        state["o_proj.bias"] = _output_bias(w, basis, maps)
    return {n: t.contiguous().clone() if n == "rope_index" else t.to(dtype).contiguous() for n, t in state.items()}


def _make_stock(state: dict[str, torch.Tensor], query_scale: float) -> None:
    """Turn one layer's PrunedAttention tensors into those of the stock attention."""
    del state["rope_index"]
    for name in ("q_proj.weight", "q_proj.bias"):
        if name in state:
            state[name] = state[name] * query_scale


def _output_bias(w: AttentionWeights, basis: Basis, maps: Cut) -> torch.Tensor:
    """O's bias, plus what V's bias loses on the way to the kept coordinates and back: attention weights sum to one, so
    it is constant."""
    total = torch.zeros(w.o.shape[-1], dtype=torch.float64, device=w.o.device)
    if w.o_bias is not None:
        total += w.o_bias.double()
    if w.v_bias is not None:
        bias = w.v_bias[basis.heads].flatten(1).double().unsqueeze(-1)  # (groups, m * D, 1)
        lost = (bias - maps.projections()[1] @ bias).view(-1, w.v_bias.shape[1])  # (H, D)
        total += torch.einsum("kd,kgdh->h", lost, w.o[basis.heads.flatten()].double())
    return total
