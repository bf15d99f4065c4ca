"""What each engine can take of a pruned model: facts, most of them found by running it. Needs no torch.

What vLLM's backends on a GPU take of a head was read in the source of vLLM 0.32: `supports_head_size` and
`get_supported_head_sizes` in vllm/v1/attention/backends.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kvprune.errors import BadOption

VLLM_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
FLASHINFER = (64, 128, 256, 512)
FLASH_ATTENTION = (32, 64, 96, 128, 192, 256)  # what a width is computed as: the next of them
FLASH_ATTENTION_4 = 512  # its widest, on Hopper; other GPUs fall back to version 2, which ends at 256
STOCK = ("stock", "portable")
OWN = ("per-layer", "uniform")


@dataclass(frozen=True)
class Target:
    """layouts: those that it takes, what prune takes first. widths: those that its attention has, None for any
    multiple of `step`, from `least` to `most`. align: what prune takes for it. skips: whether a layer may have no
    attention at all. caches: dtypes of its KV cache."""

    layouts: tuple[str, ...]
    align: int = 8
    least: int = 16
    most: int | None = None
    step: int = 2
    widths: tuple[int, ...] | None = None
    skips: bool = False
    caches: tuple[str, ...] = ()

    def refused(self, width: int) -> bool:
        """Whether its attention has no such width."""
        if width == 0:
            return not self.skips
        if self.widths is not None:
            return width not in self.widths
        return width % self.step != 0 or width < self.least or (self.most is not None and width > self.most)


TARGETS = {
    "transformers": Target((*OWN, *STOCK), least=2, skips=True, caches=("as computed", "8, 4 or 2 bits (kvprune)")),
    # Triton's kernels want 32 at least. FlashInfer's and FlashAttention's end at 512: the heads of Gemma 4's full
    # layers, which vLLM serves (Gemma4Config in vllm/model_executor/models/config.py)
    "vllm": Target((*OWN, *STOCK), least=32, most=512, step=8, caches=("auto", "fp8")),
    "vllm-cpu": Target((*OWN, *STOCK), align=32, least=32, widths=VLLM_CPU, caches=("auto", "fp8")),
    "llama.cpp": Target(STOCK, align=32, least=2, caches=("f32", "f16", "q8_0 (widths of 32, 64, ...)")),
}
LEAST = {"llama.cpp": 32, "transformers": 16}  # what prune leaves at least, where the engine itself has no such bound


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise BadOption(f"unknown target {name!r}; choose {', '.join(TARGETS)}")
    return TARGETS[name]


def refusals(name: str, *, is_hybrid: bool, widths: Iterable[int] = ()) -> Iterator[str]:
    """What an engine cannot take of a pruned model, each a sentence that begins with its name and says how to mend it.

    is_hybrid: whether some blocks have a mixer of another kind in place of attention. widths: of the layers' heads, 0
    for a layer that lost its attention.
    """
    target = find_target(name)
    if is_hybrid and not target.skips:
        yield f"{name} runs no pruned model some of whose layers never had attention; take transformers"
    no = sorted({width for width in widths if target.refused(width)})
    again = f"prune again with --target {name}, or take transformers"
    if no[:1] == [0]:
        yield f"{name} runs no layer without attention (width 0); {again}"
    if wide := [width for width in no if width]:
        yield f"{name} has no attention for heads of {_list(wide)} channels; {again}"


def with_target(name: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `prune`, and what the engine of that name adds to them: layout, alignment, least width.

    What the user says himself counts, where the engine can take it. Raises BadOption for a contradiction.
    """
    if name is None:
        return options
    target = find_target(name)
    if options.get("plan") is not None:
        raise BadOption("--plan has decided the widths already; leave out --target, and ask kvprune doctor afterwards")
    layout = options.get("layout") or target.layouts[0]
    if layout not in target.layouts:
        raise _contradiction(name, "layout", layout, f"takes the layouts {' and '.join(target.layouts)}")
    align, least = options.get("align"), options.get("min_width")
    bound = LEAST.get(name, target.least)
    if align is not None and align % target.align:
        raise _contradiction(name, "align", align, f"wants widths that are multiples of {target.align}")
    if least is not None and least < bound:
        raise _contradiction(name, "min-width", least, f"wants widths of {bound} at least")
    for option in ("depth", "drop_blocks"):
        if options.get(option) not in (None, 0, "0") and not target.skips:
            what = option.replace("_", "-")
            raise _contradiction(name, what, options[option], "runs no layer without attention")
    return {**options, "layout": layout, "align": align or target.align, "min_width": least or bound}


def _contradiction(name: str, option: str, given: Any, why: str) -> BadOption:
    return BadOption(f"--target {name} {why}, not --{option} {given}; leave out one of them")


def kernels(widths: Iterable[int]) -> dict[str, str]:
    """What vLLM's attention backends on a GPU make of these widths."""
    there = sorted(set(widths))
    wide = [width for width in there if width not in FLASHINFER]
    padded = {width: 1 << (width - 1).bit_length() for width in there if width}
    return {
        "FlashAttention": _flash_attention(there),
        "FlashInfer": f"not with {_list(wide)}" if wide else "as it is",
        "Triton": _as("pads", padded),
    }


def _flash_attention(widths: list[int]) -> str:
    rounded = {width: next((one for one in FLASH_ATTENTION if one >= width), None) for width in widths}
    no = [width for width, taken in rounded.items() if taken is None]
    if no:
        newest = ", except on Hopper (its version 4)" if no[-1] <= FLASH_ATTENTION_4 else ""
        return f"not with {_list(no)}{newest}"
    return _as("computes", {width: taken for width, taken in rounded.items() if taken is not None})


def _as(verb: str, found: dict[int, int]) -> str:
    changed = [f"{width} as {taken}" for width, taken in found.items() if width != taken]
    return f"{verb} {', '.join(changed)}" if changed else "as it is"


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def degrees(heads: int, kv_heads: int, dense_kv_heads: int, others: Iterable[int] = (), most: int = 16) -> list[int]:
    """How many tensor-parallel ranks can share a model: whole query heads, and whole KV heads, of which several ranks
    may hold the same one; dense_kv_heads: before they were merged; others: sizes that must divide, as of the MLP."""

    def shares(n: int) -> bool:
        return all(size % n == 0 or n % size == 0 for size in (kv_heads, dense_kv_heads))

    return [n for n in range(1, most + 1) if shares(n) and all(size % n == 0 for size in (heads, *others))]
