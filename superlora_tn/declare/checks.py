"""What a declaration is refused with, and the checks of single values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from superlora_tn.declare.bounds import MAX_AXES, MAX_RANK


class SpecError(ValueError):
    """A wrong declaration: says what was given, what was expected and what to do."""


def shown(value: object, most: int = 60) -> str:
    """A value as an error quotes it: its repr, cut where it would fill the screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        text = f"a value of type {type(value).__name__}, too large to show"
    return text if len(text) <= most else f"{text[:most]}..."


def near(name: object, known: Iterable[object], most: int = 60) -> str:
    """What to do about a name that is not known: those that may have been meant, or at most `most` of all."""
    names = [str(one) for one in known]
    close = get_close_matches(str(name), names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {', '.join(close[:-1])}{' or ' if close[1:] else ''}{close[-1]}?"
    return f"there are {', '.join(names[:most])}{', ...' if len(names) > most else '.'}"


def check_number(owner: str, name: str, value: object, most: float = math.inf) -> None:
    """Raise unless `value` is a finite number, of at most `most` either way."""
    try:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        good = False
    if not good:
        raise SpecError(f"{owner} was given {name}={shown(value)}; {name} is a finite number.")
    assert isinstance(value, int | float)
    if abs(value) > most:
        raise SpecError(f"{owner} was given {name}={shown(value)}; {name} is a number from {-most:g} to {most:g}.")


def check_flag(owner: str, name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise SpecError(f"{owner} was given {name}={shown(value)}; give True or False.")


def check_count(owner: str, name: str, value: object, most: int) -> None:
    """Raise unless `value` is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise SpecError(f"{owner} was given {name}={shown(value)}; {name} is a whole number from 1 to {most}.")


def check_rank(owner: str, rank: object) -> None:
    """Raise unless `rank` is a whole number between 1 and 2**20."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SpecError(f"{owner} was given rank={shown(rank)}; a rank is a whole number of at least 1. Choose rank >= 1.")
    if rank > MAX_RANK:
        raise SpecError(f"{owner} was given rank={shown(rank)}; a rank is at most {MAX_RANK:,}. Choose a lower one.")


def check_ranks(owner: str, rank: int | tuple[int, ...]) -> None:
    """Raise unless `rank` is a rank or a non-empty tuple of ranks, no more than a fold has modes."""
    if isinstance(rank, tuple) and not 1 <= len(rank) <= MAX_AXES:
        what = f"a tuple of {len(rank):,} ranks" if rank else "an empty tuple of ranks"
        raise SpecError(f"{owner} was given {what}; give one number, or one a bond.")
    for one in rank if isinstance(rank, tuple) else (rank,):
        check_rank(owner, one)


def is_seed(value: object) -> bool:
    """Whether torch's generators take it: a whole number of 64 bits, numpy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool) and -(1 << 63) <= int(value) < 1 << 64


def checked_seed(owner: str, seed: Any) -> int:
    """The seed, or an error where it is none."""
    if not is_seed(seed):
        raise SpecError(f"{owner} was given seed={shown(seed)}; a seed is a whole number from -2**63 to 2**64 - 1.")
    return int(seed)
