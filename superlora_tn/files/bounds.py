"""JSON from a stranger: its size, values, depth, names and numbers are bounded, and it says each thing once.

The bounds come before the work: bytes and values are counted before anything is parsed, so that parsing what they let
through stays below 200 MB and a second.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from superlora_tn.files.errors import CheckpointError

_SHORT = reprlib.Repr()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 20
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


@dataclass(frozen=True)
class Bounds:
    """What a JSON text may hold at most.

    Attributes:
        size: bytes.
        values: commas and opening brackets, which no text has fewer of than values.
        depth: levels of lists and dicts in each other.
        text: characters of a string.
        digits: characters of a whole number.
    """

    size: int
    values: int
    depth: int = 64
    text: int = 4096
    digits: int = 40


def shown(value: object) -> str:
    """A value as an error may quote it: its repr, cut where a stranger's would fill the screen."""
    return _SHORT.repr(value)


def parse(data: bytes, source: str, bounds: Bounds) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        data: the whole text.
        source: what an error calls it.
        bounds: what it may hold.

    Raises:
        CheckpointError: more than the bounds allow, a name twice in one dict, NaN or an infinity, or no JSON.
    """
    if len(data) > bounds.size:
        raise CheckpointError(f"{source} has more than {bounds.size:,} bytes; an adapter's has at most that many.")
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > bounds.values:
        raise CheckpointError(f"{source} holds {values:,} values; an adapter's holds at most {bounds.values:,}.")

    def whole(text: str) -> int:
        if len(text) > bounds.digits:
            raise ValueError(f"it holds a number of {len(text):,} digits, more than {bounds.digits}")
        return int(text)

    # Asked once for the whole text, since asking at each number takes as long as all the rest.
    long = re.search(rb"(?<![0-9])[0-9]{%d}" % bounds.digits, data)
    numbers = whole if long else None
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite, parse_int=numbers
        )
        _check(value, bounds)
    except RecursionError as error:
        raise CheckpointError(f"{source} is not JSON of an adapter: it nests deeper than {bounds.depth} levels.") from error
    except ValueError as error:
        raise CheckpointError(f"{source} is not JSON of an adapter ({error}); it is damaged, cut short or foreign.") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it says one name twice in a dict")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {shown(text)}, which is not finite")
    return number


def _check(value: Any, bounds: Bounds) -> None:
    """Depth and strings, level by level: a recursion would end where the caller's stack does."""
    level, depth = [value], 0
    while level:
        if depth > bounds.depth:
            raise ValueError(f"it nests deeper than {bounds.depth} levels")
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                deeper += one.keys()
                deeper += one.values()
            elif isinstance(one, list):
                deeper += one
            elif isinstance(one, str):
                _check_text(one, bounds)
        level, depth = deeper, depth + 1


def _check_text(text: str, bounds: Bounds) -> None:
    if len(text) > bounds.text:
        raise ValueError(f"it holds a string of {len(text):,} characters, more than {bounds.text:,}")
    if not text.isascii():
        text.encode()  # half a surrogate pair is no text: no error could be printed that quotes it
