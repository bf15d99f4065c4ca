"""A dense model and a plan -> a smaller model. No scores here: only cutting."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvprune import processes
from kvprune.channels.choice.basis import Basis, Cut, Kept, identity
from kvprune.channels.choice.merging import is_factored
from kvprune.channels.choice.selection import leading
from kvprune.channels.cut import portable
from kvprune.channels.journal import Journal
from kvprune.channels.plan import LayerPlan, PruningPlan
from kvprune.errors import PlanMismatch
from kvprune.models.attention import Attention, AttentionWeights
from kvprune.models.held import coming, held
from kvprune.models.places import Place
from kvprune.models.shelf import Shelf, let_come
from kvprune.models.view import ModelView
from kvprune.runtime import modeling
from kvprune.runtime.dtype import stored_dtype
from kvprune.runtime.twin import twin_config


@torch.no_grad()
def cut(
    view: ModelView,
    plan: PruningPlan,
    bases: Sequence[Basis] | None = None,
    journal: Journal | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> PreTrainedModel:
    """A pruned model that shares every tensor but the attention's with the dense one, which stays as it is.

    Where the dense blocks come and go (see models/held.py) so do the pruned ones; what is new in them lies in the
    journal's folder.

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
        bases = [identity(shape.kv_heads, shape.head_dim) for shape in view.shape.each]
    is_stock = plan.layout in portable.LAYOUTS
    factored = [not is_stock and is_factored(s, w) for s, w in zip(view.shape.each, plan.widths, strict=True)]
    order = None
    if is_stock:
        pruned, order = portable.stock_model(view, plan, bases[0])
        rotary: Any = type(pruned.base_model.rotary_emb)(pruned.config).to(view.device)
    else:
        config = _config(view, plan, factored)
        with torch.device("meta"):
            pruned = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
        rotary = copy.deepcopy(view.rotary)  # some tables change with the context, each its own
    state = dict(dense.state_dict())
    path, stored, there = f"{dense.base_model_prefix}.{view.family.layers}", stored_dtype(dense), coming(view.blocks[0])
    shelf = None if there is None else there.shelf.copy()
    put_away = partial(_put_away, journal=journal or Journal(), stored=stored, computed=dense.dtype)
    for index, (attention, layer) in enumerate(zip(view.attention, plan.layers, strict=True)):
        block = f"{path}.{view.attention_layers[index]}."
        prefix = f"{block}{view.family.attention}."
        goes = prefix if layer.block else block
        state = {name: tensor for name, tensor in state.items() if not name.startswith(goes)}

        def narrow(index: int = index, attention: Attention = attention, layer: LayerPlan = layer):
            with held(view.blocks[view.attention_layers[index]]):
                found = _attention(attention, bases[index], layer, factored[index], order, is_stock)
            if is_stock:
                _make_stock(found, portable.query_scale(view, plan))
            return found

        found = narrow() if shelf is None else put_away(narrow, index, prefix, shelf)
        state |= {prefix + name: tensor for name, tensor in found.items()}
        advance(1)
    pruned.load_state_dict(state, strict=True, assign=True)
    if rotary is not None:
        pruned.base_model.rotary_emb = rotary
    for name, buffer in list(pruned.named_buffers(remove_duplicate=False)):  # those that no checkpoint holds
        module, _, leaf = name.rpartition(".")
        if name not in state and buffer.is_meta:
            pruned.get_submodule(module).register_buffer(leaf, dense.get_buffer(name), persistent=False)
    pruned.tie_weights()
    pruned.config.dtype = stored
    pruned.generation_config = copy.deepcopy(dense.generation_config)
    if shelf is not None:
        places = [Place(coming(block).device, False) for block in view.blocks]
        let_come(pruned, path, shelf, places, beside=view.blocks)
    return pruned.eval()


def _attention(
    attention: Attention, basis: Basis, layer: LayerPlan, factored: bool, order: torch.Tensor | None, is_stock: bool
) -> dict[str, torch.Tensor]:
    """One layer's new tensors, by their names in PrunedAttention."""
    if not layer.block:
        return _nothing(attention)
    maps = _maps(attention, basis, _kept(layer), order, 1.0 if is_stock else attention.stretch)
    return _narrow(attention, basis, maps, factored, is_stock) if layer.width else _constant(attention, basis, maps)


def _put_away(
    make: Callable[[], dict[str, torch.Tensor]],
    index: int,
    prefix: str,
    shelf: Shelf,
    journal: Journal,
    stored: torch.dtype,
    computed: torch.dtype,
) -> dict[str, torch.Tensor]:
    """A layer's new tensors on the shelf, rounded to what will be written, unless an interrupted run had put them
    there; returns them without their numbers, but for indices."""
    known = journal.load_cut(index) is not None
    processes.wait()  # or one might find what another has put there
    if not known:
        journal.save_cut(index, {n: t.to(stored) if t.is_floating_point() else t for n, t in make().items()})
    tensors = journal.load_cut(index)
    assert tensors is not None
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    shelf.also({prefix + name: name for name in floats}, journal.cut_file(index), stored)
    empty = {name: torch.empty_like(tensor, device="meta", dtype=computed) for name, tensor in floats.items()}
    return {name: tensor.clone() for name, tensor in tensors.items() if name not in floats} | empty


def _nothing(attention: Attention) -> dict[str, torch.Tensor]:
    """Of a block that is gone: a constant, which refit may change."""
    bias = torch.zeros(attention.shape.hidden, dtype=attention.dtype, device=attention.device)
    return {"o_proj.weight": bias.new_empty(len(bias), 0), "o_proj.bias": bias}


def _kept(layer: LayerPlan) -> Kept:
    qk = torch.tensor(layer.qk, dtype=torch.int64)
    vo = leading(*qk.shape) if layer.vo is None else torch.tensor(layer.vo, dtype=torch.int64)
    return Kept(qk, vo)


def _config(view: ModelView, plan: PruningPlan, factored: Sequence[bool]):
    """The pruned twin's config, as a checkpoint has it."""
    config = twin_config(
        view.lm.config,
        view.shape.head_dim,
        plan.widths,
        plan.merge,
        factored,
        dropped=plan.dropped_blocks,
        **view.twin,
    )
    config.tie_word_embeddings = view.is_tied
    config.auto_map = modeling.auto_map(view.family.model_type)
    config._attn_implementation = view.lm.config._attn_implementation
    return config


def _maps(attention: Attention, basis: Basis, kept: Kept, order: torch.Tensor | None, stretch: float) -> Cut:
    """The maps to the kept coordinates and back, on the layer's device. order (width,): which of the kept coordinates
    of Q and K stands where; None: as they are. stretch: what RoPE multiplies queries and keys by as it turns them."""
    maps = basis.cut(kept)
    if attention.family.norm_behind_rope:  # what is kept does not turn any more
        maps = replace(maps, rope=torch.full_like(maps.rope, attention.shape.head_dim))
    if stretch != 1:  # what RoPE leaves alone has it from the queries
        still = (maps.rope == attention.shape.head_dim).repeat_interleave(basis.heads.shape[1], 0).unsqueeze(1)
        maps = replace(maps, queries=torch.where(still, maps.queries * stretch**2, maps.queries))
    if order is not None:
        maps = replace(maps, keys=maps.keys[:, order], queries=maps.queries[..., order], rope=maps.rope[:, order])
    return Cut(*(x.to(attention.device) for x in vars(maps).values()))


def _constant(attention: Attention, basis: Basis, maps: Cut) -> dict[str, torch.Tensor]:
    """Of a layer without attention: what biases add, behind a matrix that reads nothing."""
    w = attention.weights()
    bias = _output_bias(w, basis, maps, attention.constant).to(w.o.dtype)
    return {"o_proj.weight": bias.new_empty(len(bias), 0), "o_proj.bias": bias}


def _narrow(attention: Attention, basis: Basis, maps: Cut, factored: bool, is_stock: bool) -> dict[str, torch.Tensor]:
    """Q, K, V and O of the kept coordinates, named as PrunedAttention names them."""
    w = attention.weights()
    members, hidden, dtype = basis.heads.flatten(), w.k.shape[-1], w.k.dtype
    state = {"rope_index": attention.columns.to(maps.rope.device)[maps.rope]}
    # What does not turn adds the same for all keys, which no softmax sees
    is_plain = not (is_stock or attention.is_more_than_scores)
    is_constant = (maps.rope == attention.shape.head_dim) & is_plain
    state |= (
        _behind_norms(attention, basis, maps)
        if attention.is_normed
        else _queries_and_keys(w, basis, maps, factored, is_constant)
    )
    if attention.source is None:
        state |= _values(w, basis, maps, attention.has_normed_values)
    o = w.o[members].double()  # (H, query heads of each, D, hidden), in the order of the groups
    if attention.is_gated:
        state["gate_proj.weight"] = _grouped(attention.rows("gate")[0], len(w.k), members).flatten(0, 1)
    if factored or attention.is_gated:
        state["o_mix.weight"] = maps.outputs.mT
    else:
        o = maps.outputs.mT.unsqueeze(1) @ o
    state["o_proj.weight"] = o.permute(3, 0, 1, 2).reshape(hidden, -1)
    if w.o_bias is not None or attention.constant is not None:
        state["o_proj.bias"] = _output_bias(w, basis, maps, attention.constant)
    found = {n: t.contiguous().clone() if n == "rope_index" else t.to(dtype).contiguous() for n, t in state.items()}
    if attention.has_sinks:
        sinks = attention.module.sinks.detach()  # type: ignore[union-attr, operator]
        found["sinks"] = sinks.unflatten(0, (len(members), -1))[members].flatten().clone()
    return found


def _queries_and_keys(
    w: AttentionWeights, basis: Basis, maps: Cut, factored: bool, is_constant: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Q and K, written out at the kept width, or Q as wide as it was with a matrix behind it. is_constant (groups,
    width): coordinates whose bias adds the same to all of a query's scores, and so nothing: it takes the mean away."""
    heads, members, hidden = basis.heads, basis.heads.flatten(), w.k.shape[-1]
    q = w.q[members].double()  # (H, query heads of each, D, hidden)
    q_bias = None if w.q_bias is None else w.q_bias[members].double().unsqueeze(-1)
    k = w.k[heads].flatten(1, 2).double()  # (groups, m * D, hidden)
    state = {"k_proj.weight": (maps.keys @ k).reshape(-1, hidden)}
    if factored:
        state["q_mix.weight"] = maps.queries
    else:
        back = maps.queries.mT.unsqueeze(1)  # (H, 1, width, D)
        q = back @ q
        q_bias = None if q_bias is None else back @ q_bias
    state["q_proj.weight"] = q.reshape(-1, hidden)
    if q_bias is not None:
        state["q_proj.bias"] = q_bias.reshape(-1)
    if w.k_bias is not None:
        centred = w.k_bias.double().clone()
        centred[:, basis.slow] -= basis.slow_means().squeeze(1).to(centred)
        plain, without_mean = (
            (maps.keys @ bias[heads].flatten(1).unsqueeze(-1)).squeeze(-1) for bias in (w.k_bias.double(), centred)
        )
        state["k_proj.bias"] = torch.where(is_constant, without_mean, plain).reshape(-1)
    return state


def _values(w: AttentionWeights, basis: Basis, maps: Cut, is_normed: bool) -> dict[str, torch.Tensor]:
    """V, written out at the kept width, or, with a norm behind it, as it was, head by head in the order of the groups,
    and the matrix behind the norm."""
    rows = w.v[basis.heads].flatten(1, 2)  # (groups, m * D, hidden)
    state = {"v_proj.weight": rows if is_normed else maps.values @ rows.double()}
    if w.v_bias is not None:
        bias = w.v_bias[basis.heads].flatten(1)
        state["v_proj.bias"] = bias if is_normed else (maps.values @ bias.double().unsqueeze(-1)).squeeze(-1)
    state = {name: part.flatten(0, 1) for name, part in state.items()}
    return state | ({"v_mix.weight": maps.values.mT} if is_normed else {})


def _behind_norms(attention: Attention, basis: Basis, maps: Cut) -> dict[str, torch.Tensor]:
    """Q and K as they were, head by head in the order of the groups, with their norms, and the matrices behind them. A
    norm is taken over all of a head, so cutting what goes into it would change what is kept [ours; cf. docs]."""
    s, members, state = attention.shape, basis.heads.flatten(), {}
    there = attention.order.argsort().to(maps.keys.device)  # from the order of Attention to the family's
    for name in "qk" if attention.source is None else "q":
        for part, rows in zip(("weight", "bias"), attention.rows(name), strict=False):
            state[f"{name}_proj.{part}"] = _grouped(rows, s.kv_heads, members).flatten(0, 1)
        norm = getattr(attention.family, f"{name}_norm")
        for part, values in attention.module.get_submodule(norm).named_parameters():
            over_all = values.numel() > s.head_dim
            heads = values.unflatten(0, (-1, s.head_dim)) if over_all else values
            state[f"{name}_norm.{part}"] = _grouped(heads, s.kv_heads, members).flatten() if over_all else values
    state["q_mix.weight"] = maps.queries[:, there]
    if attention.source is not None:
        return state
    m = basis.heads.shape[1]
    keys = maps.keys.unflatten(-1, (m, s.head_dim))[..., there].flatten(-2)  # (groups, width, m * D)
    return state | {"k_mix.weight": keys.mT}


def _grouped(heads: torch.Tensor, kv_heads: int, members: torch.Tensor) -> torch.Tensor:
    """Query or KV heads (heads, ...) in the order of their KV heads' groups."""
    return heads.unflatten(0, (kv_heads, -1))[members].flatten(0, 1)


def _make_stock(state: dict[str, torch.Tensor], query_scale: float) -> None:
    """Turn one layer's PrunedAttention tensors into those of the stock attention."""
    del state["rope_index"]
    for name in ("q_proj.weight", "q_proj.bias"):
        if name in state:
            state[name] = state[name] * query_scale


def _output_bias(w: AttentionWeights, basis: Basis, maps: Cut, constant: torch.Tensor | None) -> torch.Tensor:
    """O's bias, plus what V's bias loses on the way to the kept coordinates and back, where that is a constant behind O
    (kv_heads, D); see Attention.constant."""
    total = torch.zeros(w.o.shape[-1], dtype=torch.float64, device=w.o.device)
    if w.o_bias is not None:
        total += w.o_bias.double()
    if constant is not None:
        bias = constant[basis.heads].flatten(1).double().unsqueeze(-1)  # (groups, m * D, 1)
        lost = (bias - maps.projections()[1] @ bias).view(-1, constant.shape[1])  # (H, D)
        total += torch.einsum("kd,kgdh->h", lost, w.o[basis.heads.flatten()].double())
    return total
