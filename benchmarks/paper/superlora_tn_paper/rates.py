"""Which learning rate was best, and whether it lies at the edge of those that were tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Score = TypeVar("Score")
LEVEL = 0.01  # losses this share apart are level: those of two seeds are as far


def best(found: Mapping[str, float]) -> float:
    """The rate of the lowest loss, of losses by rate; one that is not finite is never the lowest."""
    return float(min(found, key=lambda rate: (not math.isfinite(found[rate]), found[rate])))


def lowest_level(found: Mapping[str, float]) -> float:
    """The lowest rate whose loss is level with the lowest (`LEVEL`).

    Short trials cannot tell these apart, and a high rate that does well for a short while may lose its way in a long run.
    """
    rate = best(found)
    least = found[f"{rate:g}"]
    return min([rate, *(float(own) for own, loss in found.items() if loss <= least + LEVEL * abs(least))])


def best_scored(found: Mapping[str, Mapping[str, float]], count: int) -> float:
    """Of the rates whose accuracy is within a standard error of the highest, that of the lowest loss.

    The loss alone would not do after many passes over few images: a run that has learnt more is surer of its mistakes, too, so
    that the lowest loss may be that of a rate at which nothing is learnt. The accuracy alone decides by a few images.

    Args:
        found: accuracy and loss of each rate.
        count: images that they were measured on.
    """
    top = max(one["accuracy"] for one in found.values())
    least = top - math.sqrt(top * (1 - top) / count)
    return best({rate: one["loss"] for rate, one in found.items() if one["accuracy"] >= least})


def at_the_edge(rate: float, tried: Iterable[float]) -> bool:
    """Whether a rate is the smallest or the largest of those tried, so that a better one may lie outside."""
    every = [float(one) for one in tried]
    return rate in (min(every), max(every))


def searched(
    first: Sequence[float],
    factor: float,
    extensions: int,
    score: Callable[[float], Score],
    choose: Callable[[Mapping[str, Score]], float],
) -> dict[str, Score]:
    """Scores by rate: of the first ones, and of others a factor apart on the side of the best while it is at the edge.

    Args:
        first: rates tried in any case, each `factor` times the one before.
        factor: between neighbours.
        extensions: the most rates that are added.
        score: of a rate.
        choose: the best rate of scores by rate.
    """
    found: dict[str, Score] = {}
    wanted = list(first)
    for _ in range(extensions + 1):
        for rate in wanted:
            found[f"{rate:g}"] = score(rate)
        top = choose(found)
        if not at_the_edge(top, map(float, found)):
            break
        wanted = [top / factor if top == min(map(float, found)) else top * factor]
    return found
