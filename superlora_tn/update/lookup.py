"""Columns or rows of dW looked up in the nodes: of each node that depends on them, only these are taken; dW is never built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.layout import Equation
from superlora_tn.contraction.plan import plan_equation, sub_network
from superlora_tn.contraction.profile import Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.bounds import KEPT_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.declare.parts import TOKEN
from superlora_tn.network.graph import Graph, GraphNode
from superlora_tn.update.base import NOMINAL_TOKENS, TOKEN_STEPS, Run, Side
from superlora_tn.update.eager import is_recorded


@dataclass(frozen=True)
class _Digits:
    """A run of digits of a number: ``(number // stride) % size``."""

    stride: int
    size: int

    def of(self, numbers: Tensor) -> Tensor:
        """The run's value for each number."""
        return (numbers if self.stride == 1 else numbers // self.stride) % self.size


@dataclass(frozen=True)
class _Cut:
    """How a node's axes on a side are cut: which they are, the digits that each counts, and how many rows they make."""

    axes: tuple[int, ...]
    digits: tuple[_Digits, ...]
    rows: int

    def of(self, node: Tensor, numbers: Tensor) -> Tensor:
        """The node with the tokens as its first axis in place of those that are cut."""
        first = node.movedim(self.axes, tuple(range(len(self.axes))))
        place = self.digits[0].of(numbers)
        for digits in self.digits[1:]:
            place = place * digits.size + digits.of(numbers)
        rest = first.shape[len(self.axes) :]
        return functional.embedding(place, first.reshape(self.rows, -1)).reshape(-1, *rest)


@dataclass(frozen=True)
class Lookup:
    """Takes rows (side out) or columns (side in) of dW.

    Attributes:
        cuts: for each node how it is cut; None where it does not depend on that side.
        runs: (tokens from which on, program), from many tokens to few; empty where no node depends on that side.
    """

    cuts: tuple[_Cut | None, ...]
    runs: tuple[tuple[int, Run], ...]

    def __call__(self, numbers: Tensor, nodes: Sequence[Tensor], dtype: torch.dtype, alpha: float) -> Tensor:
        """The rows or columns of these numbers (tokens,), as (tokens, other side), times alpha."""
        tokens = NOMINAL_TOKENS if is_recorded() else len(numbers)
        run = next((run for least, run in self.runs if tokens >= least), self.runs[-1][1])
        pairs = zip(nodes, self.cuts, strict=True)
        taken = [(node if cut is None else cut.of(node, numbers)).to(dtype) for node, cut in pairs]
        return run(*taken, alpha=alpha)


@kept(1024, KEPT_NODES, lambda _, graph, *__, **___: len(graph.nodes))
def lookup(graph: Graph, side: Side, device: Device, optimize: Optimizer, backend: str) -> Lookup | None:
    """The lookup of one member's graph; None where nothing depends on that side (its size is 1), or the fold is flat."""
    wanted = graph.open(side)
    if graph.is_flat or not wanted:
        return None
    strides: dict[str, int] = {}
    below = 1
    for index in reversed(wanted):
        strides[index], below = below, below * graph.size[index]
    found = [_cut(node, wanted, strides, graph) for node in graph.nodes]
    nodes, cuts = [node for node, _ in found], tuple(own for _, own in found)
    other = graph.open("in" if side == "out" else "out")
    sizes = tuple((i, s) for i, s in graph.sizes if i not in wanted)
    cut = replace(graph, nodes=tuple(nodes), sizes=sizes, modes=tuple(m for m in graph.modes if m[0].role != side))
    runs: list[tuple[int, Run]] = []
    for tokens in TOKEN_STEPS:
        plain = sub_network(cut, nodes, ((TOKEN,), other))
        shapes = tuple(None if own is not None else shape for own, shape in zip(cuts, plain.shapes, strict=True))
        equation = Equation(plain.names, plain.inputs, shapes, plain.trained, plain.result, (*sizes, (TOKEN, tokens)))
        runs.insert(0, (tokens if runs else 0, compiled(plan_equation(equation, "delta", device, optimize), backend)))
    return Lookup(cuts, tuple(runs))


def _cut(node: GraphNode, wanted: Sequence[str], strides: dict[str, int], graph: Graph) -> tuple[GraphNode, _Cut | None]:
    """A node with one token axis in front for its axes on a side, and how these are cut.

    Axes of members are gone before, so that the axes of what is left are counted without them.
    """
    member = set(graph.open("member"))
    kept = [k for k, axis in enumerate(node.axes) if not (axis and member.issuperset(axis))]
    cuts: list[tuple[int, _Digits]] = []
    left: list[int] = []
    for place, k in enumerate(kept):
        axis = node.axes[k]
        if axis and axis[0] in wanted:
            cuts.append((place, _Digits(strides[axis[-1]], node.shape[k])))
        else:
            left.append(k)
    if not cuts:
        return node, None
    axes = ((TOKEN,), *(node.axes[k] for k in left))
    rows = math.prod(digits.size for _, digits in cuts)
    cut = _Cut(tuple(place for place, _ in cuts), tuple(digits for _, digits in cuts), rows)
    return replace(node, axes=axes, shape=(0, *(node.shape[k] for k in left))), cut
