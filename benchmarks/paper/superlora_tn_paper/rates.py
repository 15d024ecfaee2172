"""Which learning rate was best, and whether it lies at the edge of those that were tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence


def best(found: Mapping[str, float]) -> float:
    """The rate of the lowest loss, of losses by rate; one that is not finite is never the lowest."""
    return float(min(found, key=lambda rate: (not math.isfinite(found[rate]), found[rate])))


def at_the_edge(rate: float, tried: Iterable[float]) -> bool:
    """Whether a rate is the smallest or the largest of those tried, so that a better one may lie outside."""
    every = [float(one) for one in tried]
    return rate in (min(every), max(every))


def searched(first: Sequence[float], factor: float, extensions: int, loss: Callable[[float], float]) -> dict[str, float]:
    """Losses by rate: of the first ones, and of others a factor apart on the side of the best while it is at the edge.

    Args:
        first: rates tried in any case, each `factor` times the one before.
        factor: between neighbours.
        extensions: the most rates that are added.
        loss: of a rate.
    """
    found: dict[str, float] = {}
    wanted = list(first)
    for _ in range(extensions + 1):
        for rate in wanted:
            found[f"{rate:g}"] = loss(rate)
        top = best(found)
        if not at_the_edge(top, map(float, found)):
            break
        wanted = [top / factor if top == min(map(float, found)) else top * factor]
    return found
