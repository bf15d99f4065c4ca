"""What --depth and --drop-blocks may be; apart from depth.py and blocks.py, so that settings need no model."""

from kvprune.errors import BadOption, UnreachableRatio

AUTO = "auto"


def asked_depth(given: int | str) -> int | str:
    """AUTO, or a whole number from 0 up, as given or in words ("2"). Raises BadOption."""
    if given == AUTO:
        return AUTO
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise BadOption(f"--depth {given} must be {AUTO}, or how many layers lose their attention, from 0 up")
    return number


def check_drop_blocks(given: int, layout: str) -> None:
    """Raise BadOption for what is no number from 0 up, and for a layout that has one width for all layers."""
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise BadOption(f"--drop-blocks {given} must be how many whole blocks go, from 0 up")
    check_layout("drop-blocks", given, layout)


def check_layout(option: str, given: int | str, layout: str) -> None:
    """Raise BadOption where whole layers lose something and the layout has one width for all."""
    if given and layout != "per-layer":
        raise BadOption(f"--{option} {given} makes layers differ: that wants --layout per-layer, not {layout}")


def layers_gone(blocks: int, depth: int | str) -> int:
    """How many layers have no attention where so many blocks go, and so many layers more lose theirs; AUTO is none."""
    return blocks + (0 if depth == AUTO else int(depth))


def ratio_left(ratio: float, layers: int, blocks: int, depth: int | str = 0) -> float:
    """The fraction of their KV bytes that the other layers lose, where `ratio` of all goes, so many layers lose their
    block, and so many more their attention. Raises BadOption and UnreachableRatio."""
    gone = layers_gone(blocks, depth)
    if not gone:
        return ratio
    asked = " and ".join(f"--{name} {n}" for name, n in (("depth", depth), ("drop-blocks", blocks)) if n)
    if gone >= layers:
        raise BadOption(f"{asked} leaves none of the {layers} layers their attention")
    if layers * (1 - ratio) > layers - gone + 1e-9:
        raise UnreachableRatio(
            f"{asked} takes more than --ratio {ratio:g} of {layers} layers; at most {int(ratio * layers + 1e-9)}"
        )
    return 1 - (1 - ratio) * layers / (layers - gone)
