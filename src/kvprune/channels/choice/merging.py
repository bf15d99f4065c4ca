"""How many KV heads become one, and how Q and O are then written: rules of sizes alone, which need no model [ours]."""

from collections.abc import Callable

from kvprune.errors import BadOption, UnreachableRatio
from kvprune.models.attention import AttentionShape

AUTO = "auto"
WIDEST = 256  # channels of a head that all of FlashAttention takes; a model with wider ones has another kernel


def asked_merge(given: int | str) -> int | str:
    """AUTO, or a whole number from 1 up, as given or in words ("4"). Raises BadOption."""
    if given == AUTO:
        return AUTO
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if not isinstance(number, int) or number < 1:
        raise BadOption(f"--merge {given} must be {AUTO}, or how many KV heads become one, from 1 up")
    return number


def merge_of(asked: int | str, kv_heads: int, head_dim: int, ratio: float) -> int:
    """How many KV heads become one where `ratio` of the KV bytes goes. Raises BadOption for a number that cannot be.

    asked: as `asked_merge` gives it. auto: the most that divide the KV heads and keep the mean width within WIDEST
    channels, or a dense head's, which is where attention kernels stop.
    """
    possible = divisors(kv_heads)
    fits = [merge for merge in possible if is_within(merge, head_dim, ratio)]
    if asked == AUTO:
        return max(fits)
    choices = f"choose {AUTO}, {', '.join(map(str, fits))}"
    if asked not in possible:
        raise BadOption(f"--merge {asked} does not divide the {kv_heads} KV heads; {choices}")
    if asked not in fits:
        raise BadOption(
            f"--merge {asked} makes heads of {round(int(asked) * head_dim * (1 - ratio))} channels at --ratio "
            f"{ratio:g}, and attention kernels take {max(WIDEST, head_dim)}; {choices}"
        )
    return int(asked)


def divisors(kv_heads: int) -> list[int]:
    """What may be merged into one, ascending: all must become heads of as many."""
    return [merge for merge in range(1, kv_heads + 1) if kv_heads % merge == 0]


def stock_merge(asked: int | str, kv_heads: int, ratio: float) -> int:
    """How many KV heads become one of the dense width (layout stock): the number whose ratio, 1 - 1/m, is nearest.

    Raises UnreachableRatio, BadOption.
    """
    possible = divisors(kv_heads)
    reached = ", ".join(f"{1 - 1 / m:.4g} (merge {m})" for m in possible if m > 1) or "none, of a single KV head"
    told = f"layout stock merges whole KV heads; the ratios that it reaches: {reached}"
    if not 0 <= ratio < 1:  # also refuses NaN
        raise UnreachableRatio(f"--ratio {ratio:g} must lie from 0 to below 1; {told}")
    nearest = min(possible, key=lambda m: (abs(1 - 1 / m - ratio), m))
    if ratio > 0 and nearest == 1:
        raise UnreachableRatio(f"--ratio {ratio:g} is nearest to removing nothing; {told}; or use --layout uniform")
    if asked not in (AUTO, nearest):
        raise BadOption(f"--merge {asked} contradicts --ratio {ratio:g} (merge {nearest}); leave one out; {told}")
    return nearest


def for_ranks(merge: int, may_change: bool, kv_heads: int, ranks: int, say: Callable[[str], None]) -> int:
    """How many KV heads become one where so many tensor-parallel ranks share what is left [ours].

    merge, or, where it may change, the most up to that which leaves each rank the same number of heads of its own; none
    are merged where there are fewer heads than ranks. Raises BadOption for heads that cannot be shared.
    """
    if ranks == 1:
        return merge
    even = [m for m in divisors(kv_heads) if m <= merge and (kv_heads // m) % ranks == 0]
    if may_change:
        merge = max(even, default=1)
    left = kv_heads // merge
    if left % ranks and ranks % left:
        choices = f"; choose --merge {', '.join(map(str, even))}" if even else ""
        raise BadOption(
            f"--tensor-parallel {ranks} cannot share the {left} KV heads that --merge {merge} leaves{choices}"
        )
    if left < ranks:
        say(f"{ranks} ranks share {left} KV heads: each head is held {ranks // left} times")
    return merge


def check_alike(
    shape: AttentionShape,
    layout: str,
    drop_blocks: int,
    depth: int | str = 0,
    allocation: str = "uniform",
    importance: str = "variance",
) -> None:
    """Raise BadOption for what wants layers with heads that are alike, of a model that has others, and for what looks
    at one layer's keys and values where others attend to them too."""
    asked = {
        f"--layout {layout}": layout != "per-layer",
        f"--drop-blocks {drop_blocks}": bool(drop_blocks),
        f"--depth {depth}": bool(depth),
        f"--allocation {allocation}": allocation not in ("uniform", *(() if shape.sources else ("budget",))),
        f"--importance {importance}": bool(shape.sources) and importance != "variance",
    }
    options = [option for option, is_asked in asked.items() if is_asked]
    if options and shape.sources:
        raise BadOption(f"{options[0]} takes layers alone, and this model's share keys and values: leave it out")
    if options and shape.per_layer:
        sizes = " or ".join(f"{heads} KV heads of {size}" for heads, size in sorted(set(shape.per_layer)))
        raise BadOption(f"{options[0]} wants layers that are alike; this model's have {sizes} channels: leave it out")


def is_within(merge: int, head_dim: int, ratio: float) -> bool:
    """Whether attention kernels take the mean width; heads that stay apart are no wider than they were."""
    # A ratio is a rounded number, and one that is none is refused elsewhere
    return merge == 1 or not merge * head_dim * (1 - ratio) > max(WIDEST, head_dim) + 1e-6


def is_factored(shape: AttentionShape, width: float) -> bool:
    """Whether a step of decoding reads fewer weights if Q and O stay as wide as they were, with a matrix for each KV
    head between them and the kept coordinates, than if they are written out at the kept width."""
    heads = shape.kv_heads * shape.groups
    return heads * (width - shape.head_dim) * shape.hidden > shape.kv_heads * shape.head_dim * width
