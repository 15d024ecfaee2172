"""Updates of several adapters as one: sums, and merges that drop numbers or settle conflicts of signs, as PEFT has them.

Each takes the tensors of all adapters (dW, or one node), their weights, the part of the numbers that is kept, and what draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Merge = Callable[[Sequence[Tensor], Sequence[float], float, torch.Generator], Tensor]


def total(given: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """The weighted sum; nothing is dropped."""
    return sum((weight * delta for delta, weight in zip(given, weights, strict=True)), torch.zeros_like(given[0]))


def _largest(delta: Tensor, density: float) -> Tensor:
    """The largest numbers alone."""
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[kept] = True
    return delta * mask.reshape(delta.shape)


def _some(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Some numbers by chance, scaled up, so that the expectation is dW's."""
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def _elected(given: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of each number the mean over the adapters whose sign is that of the sum."""
    stack = torch.stack(list(given))
    factors = torch.tensor(weights, dtype=torch.float64).reshape(-1, *(1 for _ in given[0].shape))
    chosen = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    return (stack * factors * chosen).sum(0) / chosen.sum(0).clamp_min(1)


def _ties(given: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    return _elected([_largest(delta, density) for delta in given], weights)


def _dare_ties(given: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    return _elected([_some(delta, density, generator) for delta in given], weights)


def _dare(given: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    return total([_some(delta, density, generator) for delta in given], weights, density, generator)


def _magnitude(given: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    return total([_largest(delta, density) for delta in given], weights, density, generator)


MERGES: Mapping[str, Merge] = {
    "svd": total,
    "linear": total,
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
    "magnitude": _magnitude,
}
