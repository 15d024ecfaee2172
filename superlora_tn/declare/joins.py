"""How an update joins the weight, where it is not added: scaled row by row, or multiplied from a side. Frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from superlora_tn.declare.parts import SpecError, check_flag, shown


@dataclass(frozen=True)
class Magnitude:
    """DoRA: ``W' = m (W + dW) / ||W + dW||`` row by row, so that magnitude and direction train apart (Liu et al. 2024).

    m has one number for each row of W (each output), trains, and starts at ||W||, so that W' starts at W.

    Args:
        detached: the norm gets no gradient (section 4.3 of the paper, as in PEFT); False differentiates it too.

    Raises:
        SpecError: `detached` is not True or False.
    """

    detached: bool = True

    @property
    def has_rows(self) -> bool:
        """Whether a number trains for each row of W: always."""
        return True

    def __post_init__(self) -> None:
        check_flag("Magnitude", "detached", self.detached)

    def __str__(self) -> str:
        return "rows scaled to trained magnitudes (DoRA)"


@dataclass(frozen=True)
class Multiply:
    """The network times the weight: ``W' = R W`` (left) or ``W' = W R`` (right), with ``R = 1 + N`` or ``R = N``.

    The network N is over (out, out) from the left and over (in, in) from the right: its modes `out` and `in` have that size.

    Args:
        side: ``"left"`` or ``"right"``.
        residual: R is 1 + N; False takes N itself, which then has to start at the identity (rotations, say), without alpha.
        scaled: the rows (outputs) of W' are multiplied by trained numbers, ones at first: ``W' = s R W`` or ``s W R`` (BOFT).

    Raises:
        SpecError: another side, or `residual` or `scaled` is not True or False.
    """

    side: Literal["left", "right"]
    residual: bool = True
    scaled: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether a number trains for each row of W."""
        return self.scaled

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise SpecError(f"Multiply was given side={shown(self.side)}; choose 'left' (W' = R W) or 'right' (W' = W R).")
        check_flag("Multiply", "residual", self.residual)
        check_flag("Multiply", "scaled", self.scaled)

    def sides(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of R for a weight (out, in)."""
        side = shape[0] if self.side == "left" else shape[1]
        return side, side

    def __str__(self) -> str:
        factor = "(1 + N)" if self.residual else "N"
        scales = "s " if self.scaled else ""
        return f"W' = {scales}{factor} W" if self.side == "left" else f"W' = {scales}W {factor}"


Join = Magnitude | Multiply
JOINS = (Magnitude, Multiply)
