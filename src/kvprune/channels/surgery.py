"""A dense model and a plan -> a smaller model. No scores here: only cutting."""

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvprune.channels import portable
from kvprune.channels.masking import removed
from kvprune.channels.plan import PruningPlan
from kvprune.channels.repair.rotate import Rotation
from kvprune.channels.selection import Kept
from kvprune.errors import PlanMismatch
from kvprune.models.attention import AttentionWeights
from kvprune.models.view import ModelView
from kvprune.runtime import modeling
from kvprune.runtime.dtype import stored_dtype
from kvprune.runtime.twin import twin_config


@torch.no_grad()
def cut(view: ModelView, plan: PruningPlan, rotations: Sequence[Rotation] | None = None) -> PreTrainedModel:
    """A pruned model that shares every tensor but the attention's with the dense one, which stays as it is.

    Its logits equal the dense model's with the removed channels masked: Q/K rows zeroed, V rows zeroed but for
    their biases. Where the plan has no vo, V and O are rotated with that layer's of `rotations` and keep the leading
    directions. Raises PlanMismatch if the plan is for another model, or wants rotations that are not given.
    """
    if plan.is_rotated and rotations is None:
        raise PlanMismatch("the plan rotates V and O on its calibration text: apply it with kvprune prune --plan")
    plan.check(view.family.model_type, view.shape, view.units.tolist())
    dense = view.lm
    is_portable = plan.layout == "portable"
    if is_portable:
        pruned = portable.stock_model(view, plan)
        rotary = type(pruned.base_model.rotary_emb)(pruned.config).to(view.device)
    else:
        with torch.device("meta"):
            pruned = AutoModelForCausalLM.from_config(_config(view, plan), dtype=dense.dtype)
        rotary = copy.deepcopy(dense.base_model.rotary_emb)  # some tables change with the context, each its own
    state = dict(dense.state_dict())
    base = dense.base_model_prefix
    for index, (attention, layer) in enumerate(zip(view.attention, plan.layers, strict=True)):
        prefix = f"{base}.{view.family.layers}.{index}.{view.family.attention}."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        kept = Kept(torch.tensor(layer.qk), None if layer.vo is None else torch.tensor(layer.vo))
        weights = attention.weights()
        if kept.vo is None:
            assert rotations is not None
            weights = rotations[index].turned(weights)
        narrow = _narrow(weights, kept)
        if is_portable:
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


def _config(view: ModelView, plan: PruningPlan):
    """The pruned twin's config, as a checkpoint has it."""
    config = twin_config(view.lm.config, view.shape.head_dim, plan.widths)
    config.tie_word_embeddings = view.is_tied
    config.auto_map = modeling.auto_map(view.family.model_type)
    config._attn_implementation = view.lm.config._attn_implementation
    return config


def _narrow(w: AttentionWeights, kept: Kept) -> dict[str, torch.Tensor]:
    """The kept rows of Q, K, V and columns of O, named as PrunedAttention names them."""
    device, hidden = w.k.device, w.k.shape[-1]
    qk, vo = kept.qk.to(device), kept.values.to(device)
    head = torch.arange(len(qk), device=device).unsqueeze(1)  # (kv_heads, 1), beside (kv_heads, width)

    def rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """(kv_heads, D, ...) -> (kv_heads, width, ...)"""
        return tensor[head, index]

    q = rows(w.q.transpose(1, 2), qk).transpose(1, 2)  # (kv_heads, groups, width, hidden)
    o = rows(w.o.transpose(1, 2), vo).transpose(1, 2)
    state = {
        "rope_index": qk,
        "q_proj.weight": q.reshape(-1, hidden),
        "k_proj.weight": rows(w.k, qk).reshape(-1, hidden),
        "v_proj.weight": rows(w.v, vo).reshape(-1, hidden),
        "o_proj.weight": o.permute(3, 0, 1, 2).reshape(hidden, -1),
    }
    if w.q_bias is not None:
        state["q_proj.bias"] = rows(w.q_bias.transpose(1, 2), qk).transpose(1, 2).reshape(-1)
    if w.k_bias is not None:
        state["k_proj.bias"] = rows(w.k_bias, qk).reshape(-1)
    if w.v_bias is not None:
        state["v_proj.bias"] = rows(w.v_bias, vo).reshape(-1)
    if w.o_bias is not None or w.v_bias is not None:
        state["o_proj.bias"] = _output_bias(w, vo)
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _make_stock(state: dict[str, torch.Tensor], query_scale: float) -> None:
    """Turn one layer's PrunedAttention tensors into those of the stock attention."""
    del state["rope_index"]
    for name in ("q_proj.weight", "q_proj.bias"):
        if name in state:
            state[name] = state[name] * query_scale


def _output_bias(w: AttentionWeights, vo: torch.Tensor) -> torch.Tensor:
    """O's bias, plus what the removed V channels' biases put out: attention weights sum to one, so it is constant."""
    total = torch.zeros(w.o.shape[-1], dtype=torch.float64, device=w.o.device)
    if w.o_bias is not None:
        total += w.o_bias.double()
    if w.v_bias is not None:
        gone = removed(vo, w.v.shape[1]).to(w.v_bias.device)
        lost = torch.where(gone, w.v_bias, 0).double()  # (kv_heads, D)
        total += torch.einsum("kd,kgdh->h", lost, w.o.double())
    return total.to(w.o.dtype)
