"""What --depth may be; apart from depth.py, so that settings need no model."""

from kvprune.errors import BadOption

AUTO = "auto"


def asked_depth(given: int | str) -> int | str:
    """AUTO, or a whole number from 0 up, as given or in words ("2"). Raises BadOption."""
    if given == AUTO:
        return AUTO
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise BadOption(f"--depth {given} must be {AUTO}, or how many layers lose their attention, from 0 up")
    return number
