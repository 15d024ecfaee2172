"""Alternating least squares: each node in turn at its best beside the others, in closed form (Kroonenberg & de Leeuw 1980).

A node's best is where its environment's normal equations hold. They are solved for the step from where it stands, so that the
rounding of one step is mended by the next, and through the elements that are seen where these are not the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from superlora_tn.contraction.layout import Equation
from superlora_tn.tools.environment import Environment, Surroundings
from superlora_tn.tools.problem import Posed, open_indices

INNER, INNER_TOLERANCE = 40, 1e-10  # of the conjugate gradients within a step


class Fitting:
    """The nodes of a problem while they are improved. No step makes the error larger.

    Attributes:
        problem: what is wanted.
        environments: of the free nodes.
        nodes: their values now.
        tensor: the network's tensor, as it was before the sweep where the unfolding is linear.
        residual: what it misses.
    """

    def __init__(self, problem: Posed, environments: Sequence[Surroundings], nodes: Sequence[Tensor]) -> None:
        self.problem, self.environments = problem, environments
        self.wanted = float(problem.wanted.norm())
        self.move(nodes)

    def move(self, nodes: Sequence[Tensor]) -> None:
        """Go on from other nodes."""
        self.nodes = list(nodes)
        self.tensor = self.problem.value(*self.nodes)
        self.residual = self.problem.residual(self.tensor)

    @property
    def error(self) -> float:
        """The norm of what is missing, over that of what is wanted."""
        return float(self.residual.norm()) / self.wanted

    def sweep(self) -> float:
        """Each free node once.

        Returns:
            The error behind it.
        """
        for environment in self.environments:
            self._improve(environment)
        self.move(self.nodes)  # contracted again, so that the roundings of many steps do not add up
        return self.error

    def _improve(self, environment: Surroundings) -> None:
        """One node to its best."""
        unfolding, nodes, tensor = self.problem.unfolding, self.nodes, self.tensor
        right = environment.pull(nodes, unfolding.pull(tensor, self.residual))
        spectrum = environment.spectrum(nodes)

        def through(step: Tensor) -> Tensor:
            return environment.pull(nodes, unfolding.pull(tensor, unfolding.push(tensor, environment.push(nodes, step))))

        if unfolding.isometric and spectrum.exact:
            step = spectrum.solve(right)
        else:
            step = conjugate_gradients(through, right, spectrum.solve, INNER, INNER_TOLERANCE)
        if self._moved(environment.push(nodes, step)):
            nodes[environment.node] = nodes[environment.node] + step

    def _moved(self, step: Tensor) -> bool:
        """Take a step of the network's tensor, unless it makes the error larger; whether it was taken."""
        unfolding, before = self.problem.unfolding, float(self.residual.norm())
        if unfolding.linear:
            # In place, and the tensor waits for the end of the sweep: fresh memory of this size costs more than the sums.
            change = unfolding.push(self.tensor, step)
            better = float(self.residual.sub_(change).norm()) <= before
            if not better:
                self.residual.add_(change)
            return better
        after = self.tensor + step
        residual = self.problem.residual(after)
        better = float(residual.norm()) <= before
        if better:
            self.tensor, self.residual = after, residual
        return better


def environments(equation: Equation) -> tuple[Environment, ...]:
    """Those of the free nodes."""
    return tuple(Environment(equation, k) for k, free in enumerate(equation.trained) if free)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    most: int,
    tolerance: float,
) -> Tensor:
    """``A x = right`` by preconditioned conjugate gradients from zero (Hestenes & Stiefel 1952).

    Args:
        apply: A, symmetric without negative eigenvalues.
        right: in A's range.
        precondition: an approximate inverse of A, of the same kind.
        most: steps.
        tolerance: of the preconditioned residual's norm, over the first one.
    """
    x, left = torch.zeros_like(right), right.clone()
    turned = precondition(left)
    direction, size = turned, float((left * turned).sum())
    enough = tolerance**2 * size
    for _ in range(most):
        image = apply(direction) if size > enough else None
        bend = 0.0 if image is None else float((direction * image).sum())
        if image is None or bend <= 0:
            break
        x = x + size / bend * direction
        left = left - size / bend * image
        turned = precondition(left)
        size, before = float((left * turned).sum()), size
        direction = turned + size / before * direction
    return x


def balanced(equation: Equation, nodes: Sequence[Tensor], whole: bool = True) -> list[Tensor]:
    """The same tensor from free nodes of sizes that are alike, for each value of each bond and (`whole`) in all: a gauge."""
    found, opened = list(nodes), set(open_indices(equation))
    for index in dict.fromkeys(i for term in equation.inputs for i in term if i not in opened):
        places = [(k, term.index(index)) for k, term in enumerate(equation.inputs) if index in term]
        if len(places) < 2 or not all(equation.trained[k] for k, _ in places):
            continue
        norms = torch.stack([found[k].movedim(a, 0).reshape(found[k].shape[a], -1).norm(dim=1) for k, a in places])
        factors = torch.where((norms > 0).all(0), norms.log().mean(0).exp() / norms, 1.0)
        for (k, a), own in zip(places, factors, strict=True):
            found[k] = found[k] * own.reshape([-1 if b == a else 1 for b in range(found[k].ndim)])
    free = [k for k, trained in enumerate(equation.trained) if trained and whole]
    norms = torch.stack([found[k].norm() for k in free]) if free else torch.zeros(1)
    if bool((norms > 0).all()):
        for k, own in zip(free, math.exp(float(norms.log().mean())) / norms, strict=True):
            found[k] = found[k] * own
    return found
