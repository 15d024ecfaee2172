"""Which learning rate was best, and whether it lies at the edge of those that were tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def best(found: Mapping[str, float]) -> float:
    """The rate of the lowest loss, of losses by rate; one that is not finite is never the lowest."""
    return float(min(found, key=lambda rate: (not math.isfinite(found[rate]), found[rate])))


def at_the_edge(rate: float, tried: Iterable[float]) -> bool:
    """Whether a rate is the smallest or the largest of those tried, so that a better one may lie outside."""
    every = [float(one) for one in tried]
    return rate in (min(every), max(every))
