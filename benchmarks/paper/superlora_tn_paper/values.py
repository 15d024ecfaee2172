"""Values of many tensors at once: kept aside, and put back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def copied(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Their values now."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def put(places: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Set each tensor to its value, in place."""
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
