"""Paired differences over seeds, and the one rule by which every report judges them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t at 97.5 %, by degrees of freedom (one fewer than seeds); beyond the list, the last.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
ROUNDING = 1e-9  # where one seed alone differs, mean and standard error are the same number, whatever it is
RULE = (
    "Rule for every difference (paired: the same seed on both sides, so the same head, images and order; mean ± its standard "
    "error over the seeds): **no difference seen** where the mean is within one standard error of 0; **clear** where it is "
    "outside the 95 % interval of Student's t as well; between the two, **a hint**, which equal methods show often by chance."
)


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds.

    Attributes:
        mean: of second less first.
        error: its standard error; None for one seed.
        clear: whether 0 is outside the 95 % interval.
    """

    mean: float
    error: float | None
    clear: bool

    @property
    def sign(self) -> int:
        """1 or -1 where a difference is seen, 0 where none is."""
        seen = self.error is not None and abs(self.mean) > self.error * (1 + ROUNDING)
        return (1 if self.mean > 0 else -1) if seen else 0

    @property
    def verdict(self) -> str:
        """In words."""
        if self.error is None:
            return "one seed: not judged"
        if self.sign == 0:
            return "no difference seen"
        return ("clear: " if self.clear else "a hint: ") + ("more" if self.sign > 0 else "less")


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Second less first, seed by seed.

    Raises:
        ValueError: not one number a seed on both sides.
    """
    each = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(each)
    if len(each) < 2:
        return Difference(mean, None, False)
    error = statistics.stdev(each) / math.sqrt(len(each))
    return Difference(mean, error, abs(mean) > QUANTILES[min(len(each) - 1, len(QUANTILES)) - 1] * error)


def within_by_chance(seeds: int) -> float:
    """How often a paired difference that is truly 0 stays within one standard error of it: Student's t between -1 and 1."""
    free, steps = seeds - 1, 2000
    density = math.gamma((free + 1) / 2) / (math.sqrt(free * math.pi) * math.gamma(free / 2))
    middles = ((k + 0.5) / steps for k in range(steps))
    return 2 * density * statistics.fmean(math.pow(1 + t * t / free, -(free + 1) / 2) for t in middles)
