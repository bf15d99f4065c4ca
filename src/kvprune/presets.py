"""Presets: named choices of several options at once, which leave the rest to the user."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvprune.errors import BadOption


def preset_options(
    preset: str | None,
    presets: Mapping[str, dict[str, Any]],
    given: Mapping[str, Any],
    replaces: Iterable[str] = (),
) -> dict[str, Any]:
    """What `preset` decides, as options; nothing for None.

    given: the user's own options, None where left out; replaces: options that the preset rules out besides its own.
    Raises BadOption for an unknown preset, and where the user gave what it decides.
    """
    if preset is None:
        return {}
    if preset not in presets:
        raise BadOption(f"unknown preset {preset!r}; choose {', '.join(presets)}")
    decided = [name for name in (*presets[preset], *replaces) if given.get(name) is not None]
    if decided:
        raise BadOption(f"--preset {preset} decides {', '.join(decided)} itself; leave one of them out")
    return presets[preset]
