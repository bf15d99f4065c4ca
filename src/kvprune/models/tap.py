"""What attention is given, seen and changed where every family hands it over: at the attention function.

transformers lets an attention function be registered by name. Under `tapped` every attention of a dense model calls
ours, which shows queries, keys and values as the model uses them (behind norms and RoPE) to whoever watches a layer,
lets them be changed, and goes on as before. So no family's arithmetic is written a second time.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvprune.models.attention import Attention
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import rotate_half

NAME = "kvprune_tap"
WATCHER = "kvprune_watcher"  # of an attention module, while someone watches it


@dataclass(frozen=True)
class Seen:
    """One call of one layer's attention: query (B, heads, T, D), key and value (B, kv_heads, T, D), all behind RoPE, in
    the order of channels of `Attention`; mask (B or 1, 1, T, T), bool or what is added, or None for a causal one.

    turn: cos and sin (T, D) in that order, None without RoPE, and with a norm behind it. softcap, sinks (heads,):
    None where there are none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    turn: tuple[torch.Tensor, torch.Tensor] | None
    softcap: float | None
    sinks: torch.Tensor | None

    def before_rope(self, x: torch.Tensor, channels: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Queries or keys (..., T, D) as they were before RoPE; of some channels, that are pairs."""
        if self.turn is None:
            return x[..., channels]
        cos, sin = self.turn
        back = (x * cos - rotate_half(x) * sin) / (cos.square() + sin.square())
        return back[..., channels]


Watcher = Callable[[Seen], Seen | None]


def _tap(inner: Any, module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An attention function that shows what it is given to the module's watcher, and then does as `inner` does."""
    watching: tuple[Attention, Watcher] | None = vars(module).get(WATCHER)
    if watching is not None:
        attention, watcher = watching
        order = None if attention.is_in_order else attention.order.to(query.device)
        seen = Seen(
            query if order is None else query[..., order],
            key if order is None else key[..., order],
            value,
            attention_mask,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            _turn(attention, module, query),
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
        )
        changed = watcher(seen)
        if changed is not None:
            query, key, value = changed.query, changed.key, changed.value
            if order is not None:
                query, key = (x[..., order.argsort()] for x in (query, key))
    function = inner or sys.modules[type(module).__module__].eager_attention_forward
    return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _turn(attention: Attention, module: nn.Module, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin (T, D) of this call, one for all of a batch, in the order of channels of `Attention`; None where RoPE
    turns nothing, and where what is seen cannot be turned back, for a norm stands behind it."""
    tables = vars(module).get(NAME)
    if tables is None or attention.family.norm_behind_rope or not bool((attention.frequencies != 0).any()):
        return None
    columns = attention.columns[:-1].to(query.device)
    cos, sin = (table.float()[0] for table in tables)
    cos, sin = torch.nn.functional.pad(cos, (0, 1), value=1.0), torch.nn.functional.pad(sin, (0, 1))
    return cos[:, columns], sin[:, columns]


def _keep_tables(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A pre-hook: the table of cos and sin that an attention is called with."""
    given = kwargs.get("position_embeddings")
    if given is None:
        given = next((a for a in args if isinstance(a, tuple) and len(a) == 2), None)
    vars(module)[NAME] = given


@contextmanager
def tapped(view: ModelView) -> Iterator[None]:
    """The dense model's attention goes through `_tap` while this lasts; within another one it changes nothing."""
    lm: PreTrainedModel = view.lm
    before = lm.config._attn_implementation
    if before == NAME:
        yield
        return
    inner = None if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]

    def tap(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _tap(inner, module, *args, **kwargs)

    AttentionInterface.register(NAME, tap)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[before])
    hooks = [a.module.register_forward_pre_hook(_keep_tables, with_kwargs=True) for a in view.attention]
    try:
        lm.set_attn_implementation(NAME)
        yield
    finally:
        lm.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        for attention in view.attention:
            vars(attention.module).pop(NAME, None)


@contextmanager
def watched(attention: Attention, watcher: Watcher) -> Iterator[None]:
    """Show every call of one layer's attention to `watcher`, which may give back what is to be attended with instead;
    under `tapped`."""
    module = vars(attention.module)
    module[WATCHER] = (attention, watcher)
    try:
        yield
    finally:
        del module[WATCHER]


def hidden_in(seen: Seen) -> torch.Tensor:
    """(T, T), True where a query may not look at a key, in the call's first sequence."""
    if seen.mask is None:
        length = seen.query.shape[2]
        return torch.ones(length, length, dtype=torch.bool, device=seen.query.device).triu(1)
    mask = seen.mask[0, 0]
    return ~mask if mask.dtype == torch.bool else mask < 0


def weights_of(seen: Seen, scores: torch.Tensor, heads: slice, hidden: torch.Tensor) -> torch.Tensor:
    """Scores (heads, T, T), already scaled, of some query heads -> attention weights, with the call's cap and sinks.
    hidden: see `hidden_in`. The scores are used up."""
    if seen.softcap is not None:
        scores = torch.tanh(scores / seen.softcap) * seen.softcap
    scores.masked_fill_(hidden, -torch.inf)
    if seen.sinks is None:
        return scores.softmax(-1)
    own = seen.sinks[heads].to(scores).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.cat((scores, own), -1).softmax(-1)[..., :-1]
