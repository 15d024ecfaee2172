"""dW of a convolution as thin layers: what an adapter gives, and what a convolution runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Links:
    """dW of a convolution as a chain of thin layers, scale included; see `contraction.chain.Chain`, whose names these are."""

    before: Tensor | None
    core: Tensor
    after: Tensor | None
    left: Tensor | None
    terms: int
    sizes: tuple[int, int, int, int]
