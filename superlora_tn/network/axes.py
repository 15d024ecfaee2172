"""Axes of a mode, cut into runs of its digits, and the names of the finest of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from superlora_tn.declare.fold import factorise
from superlora_tn.declare.parts import TOKEN, SpecError


@dataclass(frozen=True)
class Axis:
    """A run of digits of a root index: value = (root value // stride) % size.

    Of its fastest positions, `whole` are not taken apart by a Kronecker product.
    """

    root: str
    stride: int
    size: int
    whole: int = field(default=1, compare=False)

    def split(self, sizes: Sequence[int]) -> tuple[Axis, ...]:
        """Cut into finer axes, slowest first."""
        strides = [self.stride * math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        return tuple(Axis(self.root, stride, size) for stride, size in zip(strides, sizes, strict=True))

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
