"""The least-squares problem of fitting a network to given elements.

An `Unfolding` says which elements the network's tensor gives: all of them, all but a flat fold's surplus, or what a fixed map
makes of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from superlora_tn.contraction.layout import Equation, Indices
from superlora_tn.tools.environment import contraction
from superlora_tn.update.fixed_maps import FixedMap


class Unfolding(ABC):
    """From a network's tensor to the elements that are compared with the weights'.

    Attributes:
        isometric: whether it keeps distances, so that least squares need not go through it.
        linear: whether its derivative is itself.
    """

    isometric, linear = False, True

    @abstractmethod
    def __call__(self, tensor: Tensor) -> Tensor:
        """The elements."""

    @abstractmethod
    def push(self, at: Tensor, step: Tensor) -> Tensor:
        """Its derivative at a tensor, applied to a step."""

    @abstractmethod
    def pull(self, at: Tensor, elements: Tensor) -> Tensor:
        """The derivative's adjoint."""


class Whole(Unfolding):
    """The tensor itself."""

    isometric = True

    def __call__(self, tensor: Tensor) -> Tensor:
        """See `Unfolding`."""
        return tensor

    def push(self, at: Tensor, step: Tensor) -> Tensor:
        """See `Unfolding`."""
        return step

    def pull(self, at: Tensor, elements: Tensor) -> Tensor:
        """See `Unfolding`."""
        return elements


class Picked(Unfolding):
    """Some elements of the tensor, each at most once: the surplus left out, perhaps shuffled.

    Args:
        places: of the elements in the tensor read as a vector.
        shape: of the tensor.
    """

    def __init__(self, places: Tensor, shape: tuple[int, ...]) -> None:
        self.places, self.shape = places, shape
        self.isometric = len(places) == math.prod(shape)

    def __call__(self, tensor: Tensor) -> Tensor:
        """See `Unfolding`."""
        return tensor.reshape(-1)[self.places]

    def push(self, at: Tensor, step: Tensor) -> Tensor:
        """See `Unfolding`."""
        return self(step)

    def pull(self, at: Tensor, elements: Tensor) -> Tensor:
        """See `Unfolding`."""
        return elements.new_zeros(math.prod(self.shape)).index_copy_(0, self.places, elements).reshape(self.shape)


class Matrix(Unfolding):
    """The elements that a linear map makes of the tensor's first ones, by its matrix: for small maps.

    Args:
        matrix: (elements, those of the tensor that it takes).
        shape: of the tensor.
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        self.matrix, self.shape = matrix, shape

    def __call__(self, tensor: Tensor) -> Tensor:
        """See `Unfolding`."""
        return self.matrix @ tensor.reshape(-1)[: self.matrix.shape[1]]

    def push(self, at: Tensor, step: Tensor) -> Tensor:
        """See `Unfolding`."""
        return self(step)

    def pull(self, at: Tensor, elements: Tensor) -> Tensor:
        """See `Unfolding`."""
        return self._padded(self.matrix.mT @ elements)

    def back(self, elements: Tensor) -> Tensor:
        """The tensor of the least norm with the nearest elements."""
        return self._padded(torch.linalg.pinv(self.matrix) @ elements)

    def _padded(self, taken: Tensor) -> Tensor:
        return torch.nn.functional.pad(taken, (0, math.prod(self.shape) - len(taken))).reshape(self.shape)


class Mapped(Unfolding):
    """The elements that a fixed map makes of the tensor's first ones.

    Args:
        fixed: the map.
        count: how many of its elements are in a weight.
        shape: of the tensor.
        linear: whether the map is.
    """

    def __init__(self, fixed: FixedMap, count: int, shape: tuple[int, ...], linear: bool) -> None:
        self.fixed, self.count, self.shape, self.linear = fixed, count, shape, linear

    def __call__(self, tensor: Tensor) -> Tensor:
        """See `Unfolding`."""
        elements: Tensor = self.fixed(tensor.reshape(-1)[: self.fixed.size_in])
        return elements[: self.count]

    def push(self, at: Tensor, step: Tensor) -> Tensor:
        """See `Unfolding`."""
        if self.linear:
            return self(step)
        # The derivative of the adjoint with respect to what it is applied to is the derivative again.
        with torch.enable_grad():
            probe = torch.zeros(self.count, dtype=step.dtype, requires_grad=True)
            return torch.autograd.grad(self._pulled(at, probe, again=True), probe, step)[0]

    def pull(self, at: Tensor, elements: Tensor) -> Tensor:
        """See `Unfolding`."""
        with torch.enable_grad():
            return self._pulled(at, elements)

    def _pulled(self, at: Tensor, elements: Tensor, again: bool = False) -> Tensor:
        place = at.detach().requires_grad_()
        return torch.autograd.grad(self(place), place, elements, create_graph=again)[0]


class Posed(Protocol):
    """What a fit needs of a problem: of one network (`Problem`), or of a sum of them (`summed.SumProblem`)."""

    @property
    def unfolding(self) -> Unfolding:
        """From the tensor to the elements wanted."""

    @property
    def wanted(self) -> Tensor:
        """The elements wanted."""

    @property
    def value(self) -> Callable[..., Tensor]:
        """The tensor from the nodes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the nodes."""

    def residual(self, tensor: Tensor) -> Tensor:
        """What a tensor misses."""


@dataclass(frozen=True)
class Problem:
    """Nodes with the least ``||wanted - unfolding(network)||``.

    Attributes:
        equation: the network: one operand a node, with one axis an index; `trained` says which nodes are free.
        unfolding: from its tensor to the elements wanted.
        wanted: the weights' elements over the scale, float64.
    """

    equation: Equation
    unfolding: Unfolding
    wanted: Tensor

    @cached_property
    def value(self) -> Callable[..., Tensor]:
        """The network's tensor from its nodes."""
        return contraction(self.equation.inputs, self.open, dict(self.equation.sizes))

    @property
    def open(self) -> Indices:
        """The open indices."""
        return open_indices(self.equation)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the network's tensor."""
        size = dict(self.equation.sizes)
        return tuple(size[i] for i in self.open)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the nodes, one axis an index."""
        size = dict(self.equation.sizes)
        return tuple(tuple(size[i] for i in term) for term in self.equation.inputs)

    @property
    def free(self) -> tuple[int, ...]:
        """Numbers of the nodes that may change."""
        return tuple(k for k, trained in enumerate(self.equation.trained) if trained)

    def residual(self, tensor: Tensor) -> Tensor:
        """What the network's tensor misses."""
        return self.wanted - self.unfolding(tensor)


def open_indices(equation: Equation) -> Indices:
    """The indices of an equation's result."""
    return tuple(i for axis in equation.result for i in axis)
