"""What multiplies one node of a network: its environment, the network with that node left out.

A network is linear in each of its nodes: ``T = E_k X_k``. Nothing here builds E_k. ``E_k X`` contracts the network with X in
the node's place, ``E_k' R`` contracts a tensor with all other nodes, and ``E_k' E_k`` contracts the other nodes with
themselves; the last falls apart into one factor for each piece that the others form without the node (a Tucker core sees one
small matrix a factor), and is kept so. All are planned as any contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.layout import Equation, Indices, volume
from superlora_tn.contraction.plan import plan_equation

Contract = Callable[..., Tensor]

MAX_SIDE = 1024  # an eigendecomposition of this side takes about a second in float64 on one core
# A gram has twice the network's operands; searching all paths of 8 takes seconds, which no fit of this size wins back.
SEARCHED_UP_TO = 6
# E'E is known to about eps, so what lies below some hundred times of it is rounding.
SINGULAR = 1e-13


def contraction(inputs: Sequence[Indices], result: Indices, size: Mapping[str, int]) -> Contract:
    """A contraction of operands with one axis an index, planned and compiled."""
    names = tuple(f"n{k}" for k in range(len(inputs)))
    shapes = tuple(tuple(size[i] for i in indices) for indices in inputs)
    axes = tuple((i,) for i in result)
    equation = Equation(names, tuple(inputs), shapes, (False,) * len(names), axes, tuple(size.items()))
    return compiled(plan_equation(equation, optimize="dp" if len(inputs) <= SEARCHED_UP_TO else "greedy"))


class Solved(Protocol):
    """A node's normal equations."""

    @property
    def exact(self) -> bool:
        """Whether they are known whole."""

    @property
    def largest(self) -> float:
        """Their largest eigenvalue, or more."""

    def solve(self, right: Tensor, damping: float = 0.0) -> Tensor:
        """Their solution, or one near it."""


class Surroundings(Protocol):
    """What multiplies one node, in one network (`Environment`) or in several (`summed.SumEnvironment`)."""

    @property
    def node(self) -> int:
        """Its number."""

    def pull(self, nodes: Sequence[Tensor], tensor: Tensor) -> Tensor:
        """``E' R``."""

    def push(self, nodes: Sequence[Tensor], node: Tensor) -> Tensor:
        """``E X``."""

    def spectrum(self, nodes: Sequence[Tensor]) -> Solved:
        """``E' E``."""


class Environment:
    """One node's place in a network.

    Args:
        equation: the network: one operand a node, with one axis an index; one axis of the result an open index.
        node: which operand is left out.

    Attributes:
        node: its number.
        indices: the node's own indices.
    """

    def __init__(self, equation: Equation, node: int) -> None:
        self.node, self.indices = node, equation.inputs[node]
        size, opened = dict(equation.sizes), tuple(i for axis in equation.result for i in axis)
        self._others = tuple(k for k in range(len(equation.inputs)) if k != node)
        inputs = [equation.inputs[k] for k in self._others]
        outside = {i for term in inputs for i in term}
        self._pull = contraction([opened, *inputs], self.indices, size)
        self._push = contraction(list(equation.inputs), opened, size)
        self._batch = tuple(i for i in self.indices if i in opened and i in outside)
        self._private = tuple(i for i in self.indices if i in opened and i not in outside)
        self._pieces = [self._piece(piece, equation, size, opened) for piece in self._separated(equation)]
        self._size = size

    def _separated(self, equation: Equation) -> list[tuple[int, ...]]:
        """The other nodes in pieces that share nothing but indices which the node repeats for each of its values."""
        left, pieces = list(self._others), list[tuple[int, ...]]()
        while left:
            found, ahead = [left[0]], [left[0]]
            while ahead:
                touched = set(equation.inputs[ahead.pop()]) - set(self._batch)
                more = [k for k in left if k not in found and touched & set(equation.inputs[k])]
                found, ahead = found + more, ahead + more
            pieces.append(tuple(sorted(found)))
            left = [k for k in left if k not in found]
        return pieces

    def _piece(self, piece: tuple[int, ...], equation: Equation, size: Mapping[str, int], opened: Indices) -> _Piece:
        inputs = [equation.inputs[k] for k in piece]
        held = {i for term in inputs for i in term}
        batch = tuple(i for i in self._batch if i in held)
        bonds = tuple(i for i in self.indices if i in held and i not in opened)
        again = [tuple(i if i in opened else f"{i}'" for i in term) for term in inputs]
        sizes = {**size, **{f"{i}'": s for i, s in size.items()}}
        result = (*batch, *bonds, *(f"{i}'" for i in bonds))
        return _Piece(piece, batch, bonds, contraction([*inputs, *again], result, sizes))

    def pull(self, nodes: Sequence[Tensor], tensor: Tensor) -> Tensor:
        """``E' R``: a tensor over the open indices, contracted with all other nodes to the node's shape."""
        return self._pull(tensor, *(nodes[k] for k in self._others))

    def push(self, nodes: Sequence[Tensor], node: Tensor) -> Tensor:
        """``E X``: the network's tensor with X in the node's place."""
        operands = list(nodes)
        operands[self.node] = node
        return self._push(*operands)

    def spectrum(self, nodes: Sequence[Tensor]) -> Spectrum:
        """``E' E`` by eigenvectors."""
        rows = volume(self._batch, self._size)
        weight, blocks, runs = torch.ones(rows, dtype=nodes[0].dtype), list[_Block](), [self._batch, self._private]
        held = [p for p in self._pieces if volume(p.bonds, self._size) <= MAX_SIDE]
        for piece in held:
            side = volume(piece.bonds, self._size)
            gram = self._repeated(piece.gram(*(nodes[k] for k in piece.nodes * 2)), piece.batch).reshape(rows, side, side)
            if not piece.bonds:
                weight = weight * gram[:, 0, 0]
                continue
            runs.append(piece.bonds)
            blocks.append(_Block(*torch.linalg.eigh((gram + gram.mT) / 2)))
        runs.append(tuple(i for p in self._pieces if p not in held for i in p.bonds))
        axes = tuple(self.indices.index(i) for run in runs for i in run)
        shape = tuple(volume(run, self._size) for run in runs)
        return Spectrum(axes, shape, weight, tuple(blocks), len(held) == len(self._pieces))

    def _repeated(self, gram: Tensor, batch: Indices) -> Tensor:
        """The matrices of a piece, repeated for the batch indices that it does not hold."""
        rest = gram.shape[len(batch) :]
        wanted = [self._size[i] for i in self._batch]
        return gram.reshape([self._size[i] if i in batch else 1 for i in self._batch] + list(rest)).expand([*wanted, *rest])


@dataclass(frozen=True)
class _Piece:
    nodes: tuple[int, ...]
    batch: Indices
    bonds: Indices
    gram: Contract


@dataclass(frozen=True)
class _Block:
    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Spectrum:
    """``E' E`` of a node as a Kronecker product of small symmetric matrices, by their eigenvectors.

    Attributes:
        axes: the node's axes in the order: repeated, free, then one run a matrix.
        shape: the sizes of these runs.
        exact: whether every matrix is there; one above `MAX_SIDE` counts as the identity.
    """

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    weight: Tensor
    blocks: tuple[_Block, ...]
    exact: bool

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self._values().max())

    def _values(self) -> Tensor:
        """All eigenvalues: products of one of each matrix, (rows, 1, n_1, ..., n_C, 1)."""
        found = self.weight.reshape(-1, *(1 for _ in self.shape[1:]))
        for k, block in enumerate(self.blocks):
            # Below this an eigenvalue is rounding; zero marks it.
            values = block.values.where(block.values > SINGULAR * block.values.amax(-1, keepdim=True), 0.0)
            found = found * values.reshape(values.shape[0], *(-1 if a == k + 2 else 1 for a in range(1, len(self.shape))))
        return found

    def solve(self, right: Tensor, damping: float = 0.0) -> Tensor:
        """``(E' E + damping)^-1`` of a tensor of the node's shape; without damping the pseudo-inverse."""
        turned = self._turn(right.permute(self.axes).reshape(self.shape), back=False)
        values = self._values() + damping
        turned = turned * torch.where(values > 0, 1 / values, 0.0)
        back = self._turn(turned, back=True).reshape([right.shape[a] for a in self.axes])
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return back.permute(inverse)

    def _turn(self, tensor: Tensor, back: bool) -> Tensor:
        for k, block in enumerate(self.blocks):
            matrix = block.vectors.mT if back else block.vectors
            moved = tensor.movedim(2 + k, -1)
            rows = moved.reshape(moved.shape[0], -1, moved.shape[-1]) @ matrix
            tensor = rows.reshape(moved.shape).movedim(-1, 2 + k)
        return tensor
