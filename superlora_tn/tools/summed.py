"""The least-squares problem of a sum of networks, each of which may be cropped from a larger one.

A sum is as linear in each of its nodes as one network: a node's environment is the sum of those in its terms. What is cropped
is not seen, so the normal equations go through the elements that are kept. Filling the others from the present network after
each sweep would solve the same problem, but only as fast as the sweeps forget what was filled in; conjugate gradients through
the kept ones end at rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from superlora_tn.contraction.layout import Equation
from superlora_tn.tools.als import balanced, environments
from superlora_tn.tools.environment import Contract, Environment, Spectrum, Surroundings, contraction
from superlora_tn.tools.problem import Picked, Posed, Problem, Unfolding, open_indices

FLOOR = 1e-12  # of the largest eigenvalue: a mean of inverses has to have all directions that any term sees


@dataclass(frozen=True)
class Term:
    """One network of a sum.

    Attributes:
        weight: what it is multiplied by.
        numbers: of its nodes, in the sum.
        equation: the network, one axis an index; `trained` says which nodes are free.
        kept: from its tensor to the sum's elements, in the order of the modes.
    """

    weight: float
    numbers: tuple[int, ...]
    equation: Equation
    kept: Picked

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its nodes."""
        size = dict(self.equation.sizes)
        return tuple(tuple(size[i] for i in term) for term in self.equation.inputs)

    def own(self, nodes: Sequence[Tensor]) -> list[Tensor]:
        """Its nodes of the sum's, with one axis an index."""
        return [nodes[k].reshape(shape) for k, shape in zip(self.numbers, self.shapes, strict=True)]

    @cached_property
    def _run(self) -> Contract:
        return contraction(self.equation.inputs, open_indices(self.equation), dict(self.equation.sizes))

    def value(self, nodes: Sequence[Tensor]) -> Tensor:
        """What it adds to the sum's elements."""
        return self.weight * self.kept(self._run(*self.own(nodes)))


def total(terms: Sequence[Term], shape: tuple[int, ...], nodes: Sequence[Tensor]) -> Tensor:
    """The sum's tensor over the modes."""
    return torch.stack([term.value(nodes) for term in terms]).sum(0).reshape(shape)


@dataclass(frozen=True)
class SumProblem:
    """Nodes with the least ``||wanted - unfolding(sum)||``; see `Problem`.

    Attributes:
        terms: the networks.
        shapes: of the nodes.
        trained: which nodes are free.
        shape: of the sum's tensor, one axis a mode.
        unfolding: from it to the elements wanted.
        wanted: the weights' elements over the scale, float64.
    """

    terms: tuple[Term, ...]
    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[bool, ...]
    shape: tuple[int, ...]
    unfolding: Unfolding
    wanted: Tensor

    def value(self, *nodes: Tensor) -> Tensor:
        """The sum's tensor from its nodes."""
        return total(self.terms, self.shape, nodes)

    @property
    def free(self) -> tuple[int, ...]:
        """Numbers of the nodes that may change."""
        return tuple(k for k, trained in enumerate(self.trained) if trained)

    def residual(self, tensor: Tensor) -> Tensor:
        """What the sum's tensor misses."""
        return self.wanted - self.unfolding(tensor)


class SumEnvironment:
    """One node's place in all terms that it stands in; see `Environment`.

    Attributes:
        node: its number.
    """

    def __init__(self, problem: SumProblem, node: int) -> None:
        self.node, self._shape, self._whole = node, problem.shapes[node], problem.shape
        held = [term for term in problem.terms if node in term.numbers]
        self._terms = [(term, Environment(term.equation, term.numbers.index(node))) for term in held]

    def pull(self, nodes: Sequence[Tensor], tensor: Tensor) -> Tensor:
        """``E' R``."""
        flat, found = tensor.reshape(-1), torch.zeros(self._shape, dtype=tensor.dtype)
        for term, own in self._terms:
            found = found + term.weight * own.pull(term.own(nodes), term.kept.pull(flat, flat)).reshape(self._shape)
        return found

    def push(self, nodes: Sequence[Tensor], node: Tensor) -> Tensor:
        """``E X``."""
        parts = [
            term.weight * term.kept(own.push(term.own(nodes), node.reshape(term.shapes[own.node]))) for term, own in self._terms
        ]
        return torch.stack(parts).sum(0).reshape(self._whole)

    def spectrum(self, nodes: Sequence[Tensor]) -> SumSpectrum:
        """``E' E`` by eigenvectors, as nearly as its terms have it."""
        found = [(term.weight**2, own.spectrum(term.own(nodes)), term.shapes[own.node]) for term, own in self._terms]
        exact = len(found) == 1 and self._terms[0][0].kept.isometric and found[0][1].exact
        return SumSpectrum(tuple(found), exact)


@dataclass(frozen=True)
class SumSpectrum:
    """A node's ``E' E`` in each term by itself; `exact` where there is but one, of which nothing is cropped."""

    parts: tuple[tuple[float, Spectrum, tuple[int, ...]], ...]
    exact: bool

    @property
    def largest(self) -> float:
        """An upper bound of the largest eigenvalue."""
        return sum(square * own.largest for square, own, _ in self.parts)

    def solve(self, right: Tensor, damping: float = 0.0) -> Tensor:
        """``(E' E + damping)^-1`` of a tensor of the node's shape, of several terms the mean of their inverses."""
        found = torch.zeros_like(right)
        for square, own, shape in self.parts:
            floor = FLOOR * own.largest if len(self.parts) > 1 else 0.0
            found = found + own.solve(right.reshape(shape), damping / square + floor).reshape(right.shape) / square
        return found / len(self.parts)


AnyProblem = Problem | SumProblem


def environments_of(problem: AnyProblem) -> Sequence[Surroundings]:
    """Those of the free nodes."""
    if isinstance(problem, Problem):
        return environments(problem.equation)
    return tuple(SumEnvironment(problem, k) for k in problem.free)


def settled(problem: Posed, nodes: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor from free nodes of sizes that are alike: a choice of gauge.

    A bond's nodes stand in the same terms, so that each bond is balanced in any of them; sizes of whole nodes stay.
    """
    if isinstance(problem, Problem):
        return balanced(problem.equation, nodes)
    assert isinstance(problem, SumProblem)
    found = list(nodes)
    for term in problem.terms:
        own = balanced(term.equation, term.own(found), whole=False)
        for k, node in zip(term.numbers, own, strict=True):
            found[k] = node.reshape(found[k].shape)
    return found
