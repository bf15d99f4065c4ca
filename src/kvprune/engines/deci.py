"""Layers without attention in llama.cpp: its "deci" has numbers of heads for each layer, 0 among them.

Everything else of a folder must be as in a stock model: one width, and heads whose channels turn alike. Then the
channels of each head are put into one order, and what frequencies they have is said once, as in the portable layout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kvprune.errors import UnsupportedArchitecture
from kvprune.models.family import family_of
from kvprune.runtime import PREFIX
from kvprune.runtime.files import weight_files

STILL = 1e30  # divides the frequency of a pair that does not turn


@dataclass(frozen=True)
class Deci:
    """order: per layer with attention, where the rows of each KV head's pairs go, (KV heads, pairs). columns: of the
    dense table of cos and sin, for each pair; what is behind its end does not turn. constants: what is left of the
    attention of the other layers, (hidden,) each."""

    width: int
    order: dict[int, torch.Tensor]
    columns: torch.Tensor
    constants: dict[int, torch.Tensor]

    def factors(self, plain: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        """What divides each pair's own frequency, plain (pairs,); frequencies: of the dense pairs."""
        turning = self.columns < len(frequencies)
        found = torch.full_like(plain, STILL)
        found[turning] = plain[turning] / frequencies[self.columns[turning]]
        return found

    def ordered(self, rows: torch.Tensor, layer: int) -> torch.Tensor:
        """Rows of Q or K, (heads * width, ...), in the order that all heads share."""
        order = self.order[layer]
        heads = rows.unflatten(0, (len(order), -1, self.width))  # (KV heads, of each, width, ...)
        whole = torch.cat((order, order + self.width // 2), dim=1)
        found = [head[:, one] for head, one in zip(heads, whole, strict=True)]
        return torch.stack(found).flatten(0, 2)


def read(folder: Path, config: Any, mend: str) -> Deci:
    """What a folder of kvprune's own layouts is as such a model. Raises UnsupportedArchitecture, which says `mend`, for
    one that is none."""
    widths = {layer.head_dim for layer in config.per_layer_config} if config.per_layer_config else {config.head_dim}
    family = family_of(config.model_type.removeprefix(PREFIX))
    mixed = any(layer.factored for layer in config.per_layer_config) if config.per_layer_config else config.factored
    if 0 not in widths or len(widths) != 2 or mixed or family.portable_as is None:
        raise UnsupportedArchitecture(mend)
    half = (config.dense_head_dim if config.rope_columns is None else config.rope_columns) // 2
    order, columns, constants = {}, None, {}
    for name, tensor in _small(folder):
        layer = int(name.split(".")[2])
        if name.endswith("o_proj.bias"):
            if config.per_layer_config[layer].head_dim == 0:
                constants[layer] = tensor.float()
            continue
        pairs, other = tensor.chunk(2, dim=1)
        turned = pairs < half
        order[layer] = pairs.argsort(dim=1, stable=True)
        there = pairs.gather(1, order[layer]).clamp(max=half)
        columns = there[0] if columns is None else columns
        if bool((there != columns).any()) or bool((other[turned] != pairs[turned] + half).any()):
            raise UnsupportedArchitecture(mend)
    assert columns is not None
    return Deci(max(widths), order, columns, constants)


def _small(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """rope_index and the biases of O, of all layers."""
    found = []
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.endswith(("rope_index", "o_proj.bias"))]  # noqa: SIM118
            found += [(name, weights.get_tensor(name)) for name in names]
    return found
