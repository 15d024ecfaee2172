"""Maps from what is stored to a node of the network: `Node("o i", map=...)`. Frozen values; `update.node_maps` computes them.

A map makes the last one or two axes of its node; the axes before them are a batch, of which each entry is made alike. Each says

- `axes`, how many it makes; `stored(shape)`, the shape of what is stored for a node of a shape;
- `from_zero`, whether the node is zero where what is stored is, and trains from there;
- `init`, how what is stored starts unless the node says so, and `vanishes`, whether the node is zero then;
- `bond`, of a square node, of how many columns it is a product of two thin matrices (None: not thinner than itself);
- `of`, the node of whose stored tensor it is a function (None: of its own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from superlora_tn.declare.checks import SpecError, check_count, check_flag, check_number, shown

MAX_STORED = 2**31


def _check_seed(owner: str, seed: object) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise SpecError(f"{owner} was given seed={shown(seed)}; a seed is a whole number from 0 to 2**63 - 1.")


class _Map:
    vanishes: ClassVar[bool] = False
    bond: ClassVar[int | None] = None
    of: ClassVar[str | None] = None


@dataclass(frozen=True)
class _Placed(_Map):
    """`count` stored numbers at fixed random places of a matrix."""

    count: int
    seed: int = 0
    axes: ClassVar[int] = 2
    from_zero: ClassVar[bool] = True
    init: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        check_count(type(self).__name__, "count", self.count, MAX_STORED)
        _check_seed(type(self).__name__, self.seed)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape: (..., count)."""
        most = math.prod(shape[-2:])
        if self.count > most:
            name = type(self).__name__
            raise SpecError(f"{name} was given count={self.count:,} for a matrix of {most:,} elements; choose at most those.")
        return (*shape[:-2], self.count)


class Selected(_Placed):
    """Trained numbers at fixed random places of a matrix, zero elsewhere (SHiRA's random mask, Bhardwaj et al. 2024).

    Stored: (..., count).

    Args:
        count: how many places.
        seed: fixes them: the first `count` of torch's random permutation of this seed, on the CPU.

    Raises:
        SpecError: no whole number, or more places than the matrix has elements.
    """


class Fourier(_Placed):
    """The real part of the inverse two-dimensional DFT of a spectrum that is trained at fixed random places.

    FourierFT (Gao et al. 2024). The inverse DFT divides by the matrix's elements, so a large alpha is usual (PEFT: 150).
    Stored: (..., count).

    Args:
        count: how many coefficients.
        seed: fixes their places, as PEFT's `random_loc_seed` (777 there).

    Raises:
        SpecError: no whole number, or more coefficients than the matrix has elements.
    """


class Haar(_Placed):
    """A matrix from trained coefficients of its Haar wavelets, one level, at fixed random places.

    WaveFT (Bilican et al. 2025) with PEFT's default wavelet. The quarters of the matrix of coefficients are means, differences
    between rows, between columns, and of both, of squares of 2 x 2 elements, over 2. Stored: (..., count).

    Args:
        count: how many coefficients.
        seed: fixes their places, as PEFT's `random_loc_seed` (777 there).

    Raises:
        SpecError: no whole number, more coefficients than the matrix has elements, or an odd side.
    """

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape: (..., count)."""
        if shape[-2] % 2 or shape[-1] % 2:
            raise SpecError(f"Haar was given a matrix {shape[-2]} x {shape[-1]}; both sides have to be even.")
        return super().stored(shape)


@dataclass(frozen=True)
class Spread(_Map):
    """Each number of the node is one of `count` trained numbers, drawn for it at random (Uni-LoRA, Li et al. 2025).

    A trained number is divided by the root of how often it was drawn, so that the projection keeps lengths. Stored: (count,).

    Args:
        count: how many trained numbers.
        seed: fixes which number goes where.
        of: another node with a `Spread` of as many numbers, whose numbers serve here too; nothing is stored.

    Raises:
        SpecError: no whole number.
    """

    count: int
    seed: int = 0
    of: str | None = None  # type: ignore[misc]
    axes: ClassVar[int] = 0
    from_zero: ClassVar[bool] = True
    init: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        check_count("Spread", "count", self.count, MAX_STORED)
        _check_seed("Spread", self.seed)
        _check_of("Spread", self.of)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of any shape."""
        return (self.count,) if self.of is None else (0,)


@dataclass(frozen=True)
class Same(_Map):
    """The tensor of another node of the network, axis by axis, so that one tensor serves in two places; nothing is stored.

    Args:
        of: the node's name; it has no map.

    Raises:
        SpecError: no name.
    """

    of: str = ""  # type: ignore[misc]
    axes: ClassVar[int] = 0
    from_zero: ClassVar[bool] = False
    init: ClassVar[str] = "zeros"

    def __post_init__(self) -> None:
        _check_of("Same", self.of)
        if not self.of:
            raise SpecError("Same was given no node; give the name of the node whose tensor it is.")

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored: nothing."""
        return (0,)


def _check_of(owner: str, of: object) -> None:
    if of is not None and not isinstance(of, str):
        raise SpecError(f"{owner} was given of={shown(of)}; give the name of another node.")


@dataclass(frozen=True)
class Circulant(_Map):
    """A matrix of circulant blocks, over the number of its columns: C3A (Chen et al. 2024), with PEFT's sign and scale.

    ``M[a p, c q] = w[a, c, (q - p) mod size] / columns``. Stored: (..., rows / size, columns / size, size).

    Args:
        size: side of a block.

    Raises:
        SpecError: no whole number, or one that does not divide both sides of the matrix.
    """

    size: int
    axes: ClassVar[int] = 2
    from_zero: ClassVar[bool] = True
    init: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        check_count("Circulant", "size", self.size, MAX_STORED)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape."""
        rows, columns = shape[-2:]
        if rows % self.size or columns % self.size:
            raise SpecError(
                f"Circulant was given size={self.size} for a matrix {rows} x {columns}; choose a common divisor of both sides."
            )
        return (*shape[:-2], rows // self.size, columns // self.size, self.size)


def _check_square(made: object, what: str, shape: tuple[int, ...]) -> int:
    """The side of a square node."""
    rows, columns = shape[-2:]
    if rows != columns:
        raise SpecError(f"{type(made).__name__} was given a matrix {rows} x {columns}; {what} is square.")
    return rows


@dataclass(frozen=True)
class _Rotation(_Map):
    """A rotation from the numbers above the diagonal of a skew matrix S; it starts at the identity."""

    axes: ClassVar[int] = 2
    from_zero: ClassVar[bool] = False
    init: ClassVar[str] = "zeros"

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape: (..., n (n - 1) / 2)."""
        rows = _check_square(self, "a rotation", shape)
        return (*shape[:-2], rows * (rows - 1) // 2)


@dataclass(frozen=True)
class Cayley(_Rotation):
    """The rotation ``(1 - S) (1 + S)^-1`` of a skew matrix S, Cayley's transform (OFT, Qiu et al. 2023).

    S holds the stored numbers above its diagonal row by row. Stored: (..., n (n - 1) / 2); zeros give the identity.

    Args:
        less_one: the rotation less the identity, for a network that is added, or multiplies as 1 + N; zeros give zero.
        scaled: its rows and then its columns are scaled by trained numbers, of which 2 n more are stored, less 1 (PSOFT).

    Raises:
        SpecError: not True or False, or a matrix that is not square.
    """

    less_one: bool = False
    scaled: bool = False

    def __post_init__(self) -> None:
        check_flag("Cayley", "less_one", self.less_one)
        check_flag("Cayley", "scaled", self.scaled)

    @property
    def vanishes(self) -> bool:  # type: ignore[override]
        """At zeros."""
        return self.less_one

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape."""
        *batch, count = super().stored(shape)
        return (*batch, count + 2 * shape[-1] if self.scaled else count)


class Exponential(_Rotation):
    """The rotation ``exp(S)`` of a skew matrix S, which holds the stored numbers above its diagonal row by row.

    Stored: (..., n (n - 1) / 2); zeros give the identity.
    """


@dataclass(frozen=True)
class Householder(_Map):
    """A product of reflections ``(1 - 2 u_1 u_1^T) ... (1 - 2 u_k u_k^T)``, u the stored columns at unit length (HRA's).

    Yuan et al. 2024. Stored: (..., n, count). With an even count and ``init="auto"`` the columns start in equal pairs, whose
    reflections cancel, so that the product starts at the identity.

    Args:
        count: how many reflections.
        less_one: the product less the identity, which is a product of two matrices of `count` columns, as which x goes
            through it; for a network that is added, or multiplies as 1 + N.

    Raises:
        SpecError: no whole number, a matrix that is not square, or less than one with an odd count, which cannot start at zero.
    """

    count: int
    less_one: bool = False
    axes: ClassVar[int] = 2
    from_zero: ClassVar[bool] = False
    init: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        check_count("Householder", "count", self.count, MAX_STORED)
        check_flag("Householder", "less_one", self.less_one)
        if self.less_one and self.count % 2:
            raise SpecError(f"Householder was given less_one=True and count={self.count}; an odd count cannot start at zero.")

    @property
    def vanishes(self) -> bool:  # type: ignore[override]
        """Pairs cancel."""
        return self.less_one

    @property
    def bond(self) -> int | None:  # type: ignore[override]
        """See the module."""
        return self.count if self.less_one else None

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape."""
        _check_square(self, "a product of reflections", shape)
        return (*shape[:-1], self.count)


@dataclass(frozen=True)
class Identity(_Map):
    """The identity, for a part of a weight that the network leaves in its place; nothing is stored, and it never trains.

    Between an index of `out` and one of `in` it makes a block diagonal, and x goes block by block:
    ``Network("(b o) (c i)", sizes, R="b o i", same=Node("b c", trainable=False, map=Identity()))``.
    """

    axes: ClassVar[int] = 2
    from_zero: ClassVar[bool] = False
    init: ClassVar[str] = "zeros"

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored: nothing."""
        _check_square(self, "the identity", shape)
        return (0,)


@dataclass(frozen=True)
class _Rowwise(_Map):
    axes: ClassVar[int] = 1
    from_zero: ClassVar[bool] = False
    init: ClassVar[str] = "normal"

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape: the same."""
        return shape


@dataclass(frozen=True)
class Softmax(_Rowwise):
    """The softmax of the stored numbers over the last axis: weights that are positive and add up to 1.

    Args:
        top: the softmax of so many of the largest, the others are zero (VB-LoRA, Li et al. 2024); None takes all.

    Raises:
        SpecError: no whole number, or more than there are.
    """

    top: int | None = None

    def __post_init__(self) -> None:
        if self.top is not None:
            check_count("Softmax", "top", self.top, MAX_STORED)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is stored for a node of this shape: the same."""
        if self.top is not None and self.top > shape[-1]:
            raise SpecError(f"Softmax was given top={self.top} of {shape[-1]} numbers; choose at most those.")
        return shape


@dataclass(frozen=True)
class Normalised(_Rowwise):
    """The stored numbers over their length along the last axis: vectors of length 1.

    Args:
        least: shorter vectors are divided by this length, so that a node of zeros is zero and trains (DeLoRA: 1e-4).

    Raises:
        SpecError: a negative number.
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        check_number("Normalised", "least", self.least)
        if self.least < 0:
            raise SpecError(f"Normalised was given least={shown(self.least)}; a length is at least 0.")

    @property
    def from_zero(self) -> bool:  # type: ignore[override]
        """See the module."""
        return self.least > 0


NodeMap = (
    Selected | Fourier | Haar | Spread | Same | Circulant | Cayley | Exponential | Householder | Identity | Softmax | Normalised
)
NODE_MAPS = (
    Selected,
    Fourier,
    Haar,
    Spread,
    Same,
    Circulant,
    Cayley,
    Exponential,
    Householder,
    Identity,
    Softmax,
    Normalised,
)
