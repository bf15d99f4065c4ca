"""Damaged files: a valid one in which something has been changed, as text or as bytes. All by a seed."""

import copy
import json
import random
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**9, 10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"))
NUMBERS += (float("inf"), float("-inf"))
STRINGS = ("", " ", "a", "0", "1", "nan", "\0", "\ufeff", "\ud800", "x" * 100_000, "../../etc/passwd", "%s{0}{x}", "\n")
STRINGS += ("none", "auto", "[]", "💥", "/", "llama", "float16", "default")
STRAY = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r")
NAMES = ("", "0", "x", "type", "self", "__class__", "files", "source")


def values(seed: random.Random) -> Any:
    """A value of any kind."""
    kind = seed.randrange(9)
    if kind < 3:
        return seed.choice(NUMBERS)
    if kind < 5:
        return seed.choice(STRINGS)
    if kind == 5:
        return seed.choice((None, True, False))
    if kind == 6:
        return [values(seed) for _ in range(seed.choice((0, 1, 2, 5)))]
    if kind == 7:
        return {seed.choice(NAMES): values(seed) for _ in range(seed.choice((0, 1, 2)))}
    deep: Any = seed.choice((0, "a", None))
    for _ in range(seed.choice((3, 50))):
        deep = [deep] if seed.random() < 0.7 else {"x": deep}
    return deep


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in it, however deep."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        here = waiting.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            waiting.append(here[key])
    return found


def changed(document: Any, seed: random.Random) -> Any:
    """A copy with one to three values replaced, removed, doubled, swapped, nudged or added, at any depth; or something
    else altogether, one in forty."""
    if seed.randrange(40) == 0:
        return values(seed)
    document = copy.deepcopy(document)
    for _ in range(seed.choice((1, 1, 1, 2, 3))):
        places = _places(document)
        if not places:
            break
        here, key = seed.choice(places)
        old, how = here[key], seed.randrange(7)
        if how == 0:
            del here[key]
        elif how == 1 and isinstance(here, list):
            here.insert(key, copy.deepcopy(old))
        elif how == 2:
            there, other = seed.choice(places)
            here[key] = copy.deepcopy(there[other])
        elif how == 3 and isinstance(here, dict):
            here[seed.choice(NAMES)] = values(seed)
        elif how == 4 and isinstance(old, (int, float)):
            here[key] = seed.choice((old + 1, old - 1, -old, old * 2, str(old), float(old), old * 10**6))
        else:
            here[key] = values(seed)
    return document


def flipped(content: bytes, seed: random.Random) -> bytes:
    """Bytes flipped, cut off, put in, doubled, or numbers written over."""
    content = bytes(content)
    for _ in range(seed.choice((1, 1, 2, 5))):
        at = seed.randrange(len(content) + 1)
        how = seed.randrange(8)
        if how == 0:
            content = content[:at]
        elif how == 1:
            content = (
                content[:at] + seed.choice((b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r")) + content[at:]
            )
        elif how == 2:
            content = content[:at] + content[at + seed.choice((1, 4, 8, 100)) :]
        elif how == 3:
            width = seed.choice((4, 8))
            number = seed.choice((2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2**31 - 1, 2**20, 0, 1))
            content = content[:at] + number.to_bytes(width, "little") + content[at + width :]
        elif how == 4:
            content = content[:at] + content[max(at - 50, 0) : at] + content[at:]
        elif how == 5:
            content = seed.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"[" * 100_000)) + content
        elif at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << seed.randrange(8))]) + content[at + 1 :]
    return content


def _written(document: Any) -> bytes:
    return json.dumps(document).encode()


def damaged_json(document: Any) -> st.SearchStrategy[bytes]:
    """JSON in which something is wrong: mostly with its values, sometimes with its bytes."""
    plain = _written(document)

    def damaged(number: int) -> bytes:
        seed = random.Random(number)
        return flipped(plain, seed) if seed.randrange(5) == 0 else _written(changed(document, seed))

    return st.integers(0, 2**64 - 1).map(damaged)


def damaged_lines(documents: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON, a value a line."""
    plain = b"".join(_written(one) + b"\n" for one in documents)

    def damaged(number: int) -> bytes:
        seed = random.Random(number)
        if seed.randrange(4) == 0:
            return flipped(plain, seed)
        other = changed(documents, seed)
        return b"".join(_written(one) + b"\n" for one in (other if isinstance(other, list) else [other]))

    return st.integers(0, 2**64 - 1).map(damaged)


def damaged_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(0, 2**64 - 1).map(lambda number: flipped(content, random.Random(number)))
