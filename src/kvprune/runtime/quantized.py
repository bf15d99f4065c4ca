"""transformers' own quantised KV cache, fitted to layers of any width.

Values share a scale with those of the same token and KV head, or of several neighbours where they are narrow: as many
as GROUP numbers hold and as divide what is quantised. Keys share one with the same channel of GROUP tokens, since some
channels are large at every token (KIVI, arXiv 2402.02750). The last RECENT tokens at most stay as they are, and are
quantised together.
"""

import copy
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from kvprune.errors import BadOption

RECENT = 128  # tokens, transformers' default
GROUP = 64  # numbers that share a scale at most (of values one vector, if it is wider), transformers' default
BACKENDS = {8: ("hqq", "fp8"), 4: ("quanto", "hqq"), 2: ("quanto", "hqq")}  # the first that is there


def quantizer(bits: int) -> str:
    """What quantises to so many bits here. Raises BadOption."""
    if bits not in BACKENDS:
        raise BadOption(f"--kv-bits {bits}: choose 8, 4 or 2")
    name = _available(bits)
    if name is not None:
        return name
    remedy = "pip install hqq, or a newer transformers" if bits == 8 else "pip install optimum-quanto, or hqq"
    raise BadOption(f"--kv-bits {bits}: nothing here quantises to that; {remedy}")


def _available(bits: int) -> str | None:
    there = {
        "quanto": is_optimum_quanto_available(),
        "hqq": is_hqq_available(),
        "fp8": hasattr(cache_utils, "Fp8QuantizedLayer"),
    }
    return next((name for name in BACKENDS[bits] if there[name]), None)


def bytes_per_number(bits: int, width: int, dtype: torch.dtype) -> float:
    """Of what is quantised, of vectors so wide, mean of keys and values: the code, and its part of the scale and the
    offset that a group shares. fp8 has one scale for all; where nothing quantises here, as the others do."""
    if _available(bits) == "fp8":
        return bits / 8
    groups = GROUP, max(GROUP // width, 1) * width
    return bits / 8 + sum(2 * dtype.itemsize / group for group in groups) / 2


def recent_tokens(bits: int) -> int:
    """How many tokens such a cache holds at most that are not quantised yet; fp8 quantises at once."""
    return 0 if _available(bits) == "fp8" else RECENT - 1


def quantized_cache(config: PreTrainedConfig, bits: int) -> DynamicCache:
    """An empty cache of so many bits for a model, dense or pruned.

    Raises BadOption where nothing serves, and for sliding windows, which such a cache does not keep.
    """
    name = quantizer(bits)
    plain: list[Any] = list(DynamicCache(config=config).layers)
    plain = plain or [DynamicLayer() for _ in range(config.num_hidden_layers)]
    if any(getattr(layer, "is_sliding", False) for layer in plain):
        raise BadOption("--kv-bits: a quantised cache keeps no sliding window, and this model has some")
    cache = DynamicCache(config=config)  # a TokenFilter takes no other
    cache.layers = [_layer(name, bits) if isinstance(layer, DynamicLayer) else layer for layer in plain]
    return cache


def group_size(tensor: torch.Tensor) -> int:
    """How many numbers of a tensor (B, KV heads, T, width) share a scale: whole vectors of one or more tokens."""
    width = tensor.shape[-1]
    vectors = tensor.shape[1] * tensor.shape[2]
    return width * next(n for n in range(max(GROUP // width, 1), 0, -1) if vectors % n == 0)


def decoding_pieces(bits: int, tokens: int) -> list[int]:
    """In what pieces a text of so many tokens reads what decoding it behind a prompt would: what is new is read as it
    is, and quantised together when RECENT tokens are there; by fp8 at once."""
    step = 1 if quantizer(bits) == "fp8" else RECENT
    first = min(RECENT, tokens)
    rest = range(first, tokens, step)
    return [first, *(min(step, tokens - start) for start in rest)]


class ByChannel(NamedTuple):
    """Quantised keys (B, KV heads, width, tokens and up to GROUP - 1 more), as the backend stores them."""

    codes: Any
    tokens: int


def _layer(name: str, bits: int) -> Any:
    known: Any = cache_utils
    if name == "fp8":
        return known.Fp8QuantizedLayer()
    kind = known.QuantoQuantizedLayer if name == "quanto" else known.HQQQuantizedLayer
    # How each of them says that a group is what lies side by side; the other axis only tells which are keys.
    values, keys = (0, -1) if name == "quanto" else (1, 0)

    class Fitted(kind):  # type: ignore[misc, valid-type]
        """Its groups suit what comes."""

        def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
            if axis == values:
                self.q_group_size = group_size(tensor)
                return super()._quantize(tensor, axis)
            self.q_group_size, tokens = GROUP, tensor.shape[-2]
            filling = tensor[..., -1:, :].expand(*tensor.shape[:-2], -tokens % GROUP, -1)
            channels = torch.cat((tensor, filling), dim=-2).transpose(-1, -2).contiguous()
            return ByChannel(super()._quantize(channels, values), tokens)

        def _dequantize(self, stored: Any) -> torch.Tensor:
            if isinstance(stored, ByChannel):
                return super()._dequantize(stored.codes)[..., : stored.tokens].transpose(-1, -2)
            return super()._dequantize(stored)

    return Fitted(nbits=bits, residual_length=RECENT, axis_key=keys, axis_value=values)


def is_quantized(layer: Any) -> bool:
    return isinstance(layer, getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer))


def stores_of(layer: Any) -> list[Any]:
    """The quantised layers in which a layer of a cache keeps its tokens: itself, one a sequence, or none."""
    return [layer] if is_quantized(layer) else getattr(layer, "stores", [])


def copied_but_stores(layer: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a layer that has stores; their quantised tensors, which are never written into, are shared."""
    new = copy.copy(layer)
    new.stores = [copy.copy(store) for store in layer.stores]
    for name, value in vars(layer).items():
        if name not in ("stores", "empty"):
            setattr(new, name, copy.deepcopy(value, memo))
    return new


def quantized_bytes(layer: Any) -> int:
    """Bytes of a layer of such a cache: codes, scales, and what is not quantised yet."""
    return sum(
        _bytes(getattr(layer, name, None)) for name in ("_quantized_keys", "_quantized_values", "keys", "values")
    )


def _bytes(thing: Any) -> int:
    """Of all tensors in what a backend stores, however it nests them."""
    if isinstance(thing, torch.Tensor):
        if hasattr(thing, "__tensor_flatten__") and type(thing) is not torch.Tensor:
            names, _ = thing.__tensor_flatten__()
            return sum(_bytes(getattr(thing, name)) for name in names)
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(map(_bytes, thing.values()))
    return sum(map(_bytes, thing)) if isinstance(thing, (tuple, list)) and not isinstance(thing, torch.Size) else 0
