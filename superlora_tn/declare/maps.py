"""Declarations of the fixed maps F that take a network's vector up to a group's vector (`projection` computes them)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from superlora_tn.declare.parts import SpecError, check_flag, shown
from superlora_tn.declare.source import Several


def _check_map(owner: str, ratio: float, seed: int) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio <= 1.0:
        raise SpecError(f"{owner} was given ratio={shown(ratio)}; the compression ratio is above 0 and at most 1.")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise SpecError(f"{owner} was given seed={shown(seed)}; a seed is a whole number from 0 to 2**63 - 1.")


@dataclass(frozen=True)
class Shuffle:
    """A fixed random permutation of the group's elements (the paper's "shuffling").

    Args:
        seed: fixes the permutation, the same for every group.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _check_map("Shuffle", 1.0, self.seed)

    @property
    def ratio(self) -> float:
        """A permutation does not compress: 1."""
        return 1.0

    def table_numbers(self, length: int) -> int:
        """Numbers of its tables, where the group's vector is `length` long: the permutation's."""
        return length

    def padded(self, length: int) -> int:
        """A permutation needs no longer vector."""
        return length

    @property
    def linear(self) -> bool:
        """A permutation is linear."""
        return True


Scaling = Literal["variance", "orthonormal", "none"]


def power_above(length: int) -> int:
    """The least power of two that is not below a length: what H and P of the fastfood map act on."""
    return 1 << (length - 1).bit_length()


@dataclass(frozen=True)
class Fastfood:
    """The fixed fastfood map ``y = H G P H B x``, truncated (SuperLoRA, section 2; Le et al. 2013).

    B random signs, H the Walsh-Hadamard transform, P a random permutation, G Gaussian numbers.

    Args:
        ratio: rho, the length of x over the length of y, in (0, 1].
        seed: fixes B, P and G, the same for every group.
        tanh: apply tanh to the result (the paper's nonlinear map).
        order: the factors in the order they are applied, since public codes differ: at most 8 of B, H, P and G. A factor
            that comes again has a table of its own.
        scaling: ``"variance"`` keeps the elements' variance; ``"orthonormal"`` makes each H orthonormal, so that padding
            with zeros lowers the variance by the ratio; ``"none"`` leaves H's entries at +1 and -1.
    """

    ratio: float = 0.5
    seed: int = 0
    tanh: bool = False
    order: str = "BHPGH"
    scaling: Scaling = "variance"

    def __post_init__(self) -> None:
        _check_map("Fastfood", self.ratio, self.seed)
        check_flag("Fastfood", "tanh", self.tanh)
        if not isinstance(self.order, str) or not 1 <= len(self.order) <= 8 or not set(self.order) <= set("BHPG"):
            raise SpecError(
                f"Fastfood was given order={shown(self.order)}; give its factors as they are applied, 1 to 8 of B, H, P, G, "
                "for instance 'BHPGH'."
            )
        if self.scaling not in ("variance", "orthonormal", "none"):
            raise SpecError(f"Fastfood was given scaling={shown(self.scaling)}; choose 'variance', 'orthonormal' or 'none'.")

    @property
    def linear(self) -> bool:
        """Without tanh the map is linear."""
        return not self.tanh

    def table_numbers(self, length: int) -> int:
        """Numbers of its tables at most: those of B, P and G are as long as H's transform, a power of two."""
        return (len(self.order) - self.order.count("H")) * power_above(length)

    def padded(self, length: int) -> int:
        """The length of the longest vector on the way to one of `length`: H and P act on a power of two."""
        return power_above(length) if set(self.order) & set("HP") else length


@dataclass(frozen=True, init=False, repr=False)
class Compose(Several):
    """Fixed maps one after another: ``Compose(Fastfood(0.5), Shuffle(1))`` is the shuffle of the fastfood map.

    The ratio is the product of theirs; the length between two maps is what is left to go, rounded up.

    Args:
        maps: from the network's vector to the group's, at least two.
    """

    maps: tuple[Shuffle | Fastfood, ...]

    def __init__(self, *maps: Shuffle | Fastfood) -> None:
        if not 2 <= len(maps) <= 16 or not all(isinstance(m, Shuffle | Fastfood) for m in maps):
            raise SpecError(f"Compose was given {shown(maps)}; give 2 to 16 maps, each Fastfood(...) or Shuffle(...).")
        object.__setattr__(self, "maps", maps)

    @property
    def ratio(self) -> float:
        """The product of the maps' ratios; what no float holds is the smallest one, as a network has an element at least."""
        return max(math.prod(m.ratio for m in self.maps), math.ulp(0.0))

    @property
    def linear(self) -> bool:
        """Whether all maps are."""
        return all(m.linear for m in self.maps)

    def table_numbers(self, length: int) -> int:
        """Numbers of all maps' tables at most: no length between two maps is above the group's."""
        return sum(m.table_numbers(length) for m in self.maps)

    def padded(self, length: int) -> int:
        """The length of the longest vector on the way to one of `length`, at most."""
        return max(m.padded(length) for m in self.maps)


PROJECTIONS = (Shuffle, Fastfood, Compose)
Projection = Shuffle | Fastfood | Compose
