"""Where the fit of a sum starts from: each term in turn at what the others leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from superlora_tn.tools.als import Fitting, environments
from superlora_tn.tools.problem import Problem
from superlora_tn.tools.starts import EXACT, Start, preimage, starts
from superlora_tn.tools.summed import AnyProblem, SumProblem, Term

SWEEPS = 5  # of a term, before the next takes what it leaves


def any_starts(problem: AnyProblem, given: Sequence[Tensor], restarts: int, generator: torch.Generator) -> Iterator[Start]:
    """Starts of a fit with their names, the most promising first; see `starts`.

    A sum's terms are fitted greedily, in the order that they are declared in and in the reverse, then from chance.
    """
    if isinstance(problem, Problem):
        yield from starts(problem, given, restarts, generator)
        return
    tensor, nodes = preimage(problem), list(given)
    if len(problem.terms) == 1:
        (term,) = problem.terms
        for name, found in starts(_alone(problem, term, tensor, set()), term.own(nodes), restarts, generator):
            yield name, _put(term, nodes, found)
        return
    for order in (problem.terms, problem.terms[::-1]):
        yield "one term after another", _greedy(problem, tensor, order, nodes, generator)
    for _ in range(restarts):
        yield "chance", _chance(problem, tensor, nodes, generator)


def _alone(problem: SumProblem, term: Term, left: Tensor, found: set[int]) -> Problem:
    """The problem of one term, in which nodes that are found already stay."""
    trained = tuple(problem.trained[k] and k not in found for k in term.numbers)
    return Problem(replace(term.equation, trained=trained), term.kept, left.reshape(-1) / term.weight)


def _put(term: Term, nodes: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    """All nodes with a term's own."""
    found = list(nodes)
    for k, node in zip(term.numbers, own, strict=True):
        found[k] = node.reshape(found[k].shape)
    return found


def _greedy(
    problem: SumProblem, tensor: Tensor, order: Sequence[Term], given: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Each term fitted to what the others leave; those to come are at their first values, and so zero or cancelled."""
    nodes, found = list(given), set[int]()
    for term in order:
        left = tensor - problem.value(*nodes) + term.value(nodes).reshape(problem.shape)
        one = _alone(problem, term, left, found)
        missed = float((left - term.value(nodes).reshape(problem.shape)).norm())
        if not one.free or missed <= EXACT * float(tensor.norm()):
            continue
        _, start = next(starts(one, term.own(nodes), 1, generator))
        fitting = Fitting(one, environments(one.equation), start)
        for _ in range(SWEEPS):
            before = fitting.error
            if fitting.sweep() > 0.99 * before:
                break
        nodes = _put(term, nodes, fitting.nodes)
        found |= {k for k in term.numbers if problem.trained[k]}
    return nodes


def _chance(problem: SumProblem, tensor: Tensor, given: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Normal numbers in the free nodes, each term about as large as its part of what is wanted."""
    nodes = [
        torch.randn(n.shape, dtype=torch.float64, generator=generator) if free else n
        for n, free in zip(given, problem.trained, strict=True)
    ]
    left = set(problem.free)
    for term in problem.terms:
        own, size = left & set(term.numbers), float(term.value(nodes).norm())
        if own and size > 0:
            factor = (float(tensor.norm()) / (size * math.sqrt(len(problem.terms)))) ** (1 / len(own))
            nodes = [n * factor if k in own else n for k, n in enumerate(nodes)]
        left -= own
    return nodes
