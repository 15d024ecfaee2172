"""Axes of a mode, cut into runs of its digits, and the names of the finest of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from superlora_tn.declare.bounds import CROPPED_SPARE, CROPPED_TIMES
from superlora_tn.declare.fold import factorise
from superlora_tn.declare.parts import TOKEN, SpecError


def sides_above(size: int, count: int) -> list[int]:
    """So many sides, as even as can be and the smaller first, whose product is at least the size: 50 gives 7 and 8."""
    sides = []
    for left in range(count, 1, -1):
        side = round(size ** (1 / left))
        side -= side**left > size
        sides.append(max(side, 1))
        size = -(-size // sides[-1])
    return [*sides, size]


@dataclass(frozen=True)
class Axis:
    """A run of digits of a root index: value = (root value // stride) % size.

    Of its fastest positions, `whole` are not taken apart by a Kronecker product. `padded` is the size of a root that is larger
    than its mode, of which the surplus is cropped; 0 where it is not.
    """

    root: str
    stride: int
    size: int
    whole: int = field(default=1, compare=False)
    padded: int = field(default=0, compare=False)
    is_digit: bool = field(default=False, compare=False)

    def split(self, sizes: Sequence[int]) -> tuple[Axis, ...]:
        """Cut into finer axes, slowest first."""
        strides = [self.stride * math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        return tuple(
            Axis(self.root, stride, size, padded=self.padded, is_digit=True)
            for stride, size in zip(strides, sizes, strict=True)
        )

    def grown(self, size: int) -> Axis:
        """The axis in a larger one, of which the surplus is cropped.

        Raises:
            SpecError: it is only some digits of its mode, or so much larger that most of it would be cropped.
        """
        if size == self.size:
            return self
        if self.stride > 1 or self.is_digit:
            raise SpecError(
                f"crop=True takes {self.size} positions of the mode '{self.root}' as {size}, but they are only some of its "
                "digits; crop the outermost split, and divide within it."
            )
        if size > CROPPED_TIMES * self.size + CROPPED_SPARE:
            raise SpecError(
                f"crop=True takes the mode '{self.root}' of size {self.size:,} from one of {size:,}, most of which would be "
                "cut; choose smaller sizes."
            )
        return replace(self, size=size, padded=size)

    def cropped(self, count: int, factor: int) -> tuple[Axis, ...]:
        """Cut in so many sides as even as can be, or in the first and what it takes, whether they divide the size or not."""
        first = [] if factor == -1 else [min(factor, self.size // self.whole)]
        sizes = sides_above(-(-(self.size // self.whole) // math.prod(first)), count - len(first))
        *slow, last = self.grown(math.prod(first + sizes) * self.whole).split([*first, *sizes[:-1], sizes[-1] * self.whole])
        return (*slow, replace(last, whole=self.whole))

    def factors(self, count: int, factor: int) -> tuple[Axis, ...]:
        """Cut in so many by PEFT's rule, slowest first; what is to stay together stays with the last."""
        sizes = factorise(self.size // self.whole, count, factor)
        *slow, last = self.split([*sizes[:-1], sizes[-1] * self.whole])
        return (*slow, replace(last, whole=self.whole))


def refine(axes: list[Axis]) -> dict[Axis, tuple[str, ...]]:
    """Name the finest digits: each axis becomes the run of indices between all borders that any axis draws."""
    borders: dict[str, set[int]] = {}
    for axis in axes:
        borders.setdefault(axis.root, set()).update((axis.stride, axis.stride * axis.size))
    fine: dict[Axis, tuple[str, ...]] = {}
    taken = {*borders, TOKEN}
    by_root: dict[str, list[Axis]] = {}
    for axis in axes:
        by_root.setdefault(axis.root, []).append(axis)
    for root, cuts in borders.items():
        chain = sorted(cuts)
        for low, high in pairwise(chain):
            if high % low:
                raise SpecError(
                    f"the mode '{root}' of size {chain[-1]} is split in two ways that do not fit together "
                    f"(borders {low} and {high}); give both parts the same split."
                )
        runs = list(pairwise(chain))[::-1]
        names = [root] if len(runs) == 1 else _digit_names(root, len(runs), taken)
        for (low, high), name in zip(runs, names, strict=True):
            fine[Axis(root, low, high // low)] = (name,)
        for axis in by_root[root]:
            fine[axis] = tuple(
                n for (low, high), n in zip(runs, names, strict=True) if axis.stride <= low and high <= axis.stride * axis.size
            )
    return fine


def _digit_names(root: str, count: int, taken: set[str]) -> list[str]:
    """``out1 out2 ...``, with underscores in between where other indices are called so."""
    mark = ""
    while any(f"{root}{mark}{k + 1}" in taken for k in range(count)):
        mark += "_"
    names = [f"{root}{mark}{k + 1}" for k in range(count)]
    taken.update(names)
    return names
