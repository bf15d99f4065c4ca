"""What users give as options: presets (several choices at once), lists of numbers, amounts of memory."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from kvprune.errors import BadOption

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LEAST_BYTES = 10**5  # fewer without a unit are meant in another
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def given_of(kind: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of a function's parameters, `locals()`, those that are fields of the dataclass `kind` and are not None: what was
    given, or has a default in the signature. None leaves the choice to a preset, or to the default of `kind`."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in parameters.items() if name in names and value is not None}


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
        names = ", ".join("--" + name.replace("_", "-") for name in decided)
        raise BadOption(f"--preset {preset} decides {names} itself; leave one of them out")
    return presets[preset]


def whole_numbers(option: str, given: str | int | Sequence[int]) -> tuple[int, ...]:
    """Numbers, one number, or "28,25,7", as a tuple. Raises BadOption."""
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        return tuple(int(str(part)) for part in parts)
    except ValueError:
        raise BadOption(f"--{option} {given!r} is no list of whole numbers; give some as 28,25,7") from None


def size_in_bytes(given: str | int) -> int:
    """ "24GiB" -> bytes. Raises BadOption."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(given))
    if found is None or found[2].upper() not in UNITS:
        raise BadOption(f"--memory {given!r} is no amount of memory; give one as 24GiB or 80GB")
    if isinstance(given, str) and not found[2] and float(found[1]) < LEAST_BYTES:
        raise BadOption(f"--memory {given} is so many bytes; say its unit, as {given}GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])
