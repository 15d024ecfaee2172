"""Declarations of the fixed maps F that take a network's vector up to a group's vector (`projection` computes them)."""

from __future__ import annotations

from dataclasses import dataclass

from superlora_tn.nodes import SpecError, check_flag


def _check_map(owner: str, ratio: float, seed: int) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio <= 1.0:
        raise SpecError(f"{owner} was given ratio={ratio!r}; the compression ratio is above 0 and at most 1.")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise SpecError(f"{owner} was given seed={seed!r}; a seed is a whole number from 0 to 2**63 - 1.")


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


@dataclass(frozen=True)
class Fastfood:
    """The fixed fastfood map ``y = H G P H B x``, truncated (SuperLoRA, section 2; Le et al. 2013).

    Args:
        ratio: rho, the length of x over the length of y, in (0, 1].
        seed: fixes B, P and G, the same for every group.
        tanh: apply tanh to the result (the paper's nonlinear map).
    """

    ratio: float = 0.5
    seed: int = 0
    tanh: bool = False

    def __post_init__(self) -> None:
        _check_map("Fastfood", self.ratio, self.seed)
        check_flag("Fastfood", "tanh", self.tanh)


Projection = Shuffle | Fastfood
