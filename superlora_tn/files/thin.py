"""dW of one weight as thin factors: ``dW = up down``, exact at the network's own rank, or truncated where it is told to be.

A network falls apart into components that share no index: LoKr's w1 and w2 are two, LoRA is one. Each component is cut in
two between its out and its in (`contraction.cut`), or built where it is small or cannot be cut; the whole is their Kronecker
product, and so are its singular vectors, its singular values the products of theirs. So dW is built only where it is one
component that cannot be cut, in float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from superlora_tn.contraction.backend import DEFAULT, compiled
from superlora_tn.contraction.cut import halves
from superlora_tn.contraction.plan import plan_equation, sub_network
from superlora_tn.contraction.profile import CPU
from superlora_tn.declare.fold import FlatGroup, Group, Mode, Shape
from superlora_tn.declare.joins import Magnitude
from superlora_tn.declare.parts import Dense, Part, SpecError
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.record import Entry, magnitude_name, tensor_name
from superlora_tn.files.weight import Weight
from superlora_tn.network.expand import lower
from superlora_tn.network.graph import Graph, GraphNode
from superlora_tn.update.make import make_adapter

Indices = tuple[str, ...]
NO_KERNELS: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True, eq=False)
class Filled:
    """The network of one weight with its values.

    Attributes:
        name: of the weight.
        shape: (out, in).
        part: what is declared, over the modes of the graph.
        graph: the network with sizes, of all members of its group.
        nodes: the values in graph order, the member's own. A flat fold's weight is held as one dense node.
        scale: of dW.
        kernel: the sizes of a convolution's kernel, () for a matrix.
        flipped: whether it is an embedding's.
        turned: whether an embedding's dW is held as (in, out), as torch has its table.
        magnitude: DoRA's, (out,); None where dW is added.
    """

    name: str
    shape: Shape
    part: Part
    graph: Graph
    nodes: tuple[Tensor, ...]
    scale: float
    kernel: tuple[int, ...] = ()
    flipped: bool = False
    turned: bool = False
    magnitude: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the values'."""
        found = self.nodes[0].dtype
        for node in self.nodes[1:]:
            found = torch.promote_types(found, node.dtype)
        return found


def filled(
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    kernels: Mapping[str, tuple[int, ...]] = NO_KERNELS,
    joined: bool = False,
) -> Iterator[Filled]:
    """Each weight of a saved adapter with its network's values.

    Args:
        entries: the declarations with their targets.
        tensors: by ``group<k>.<node>``, groups numbered through all entries.
        kernels: target -> sizes of its kernel, of those that are convolutions.
        joined: DoRA is taken, with its magnitudes.
    """
    k = 0
    for entry in entries:
        try:
            dora = joined and isinstance(entry.spec.join, Magnitude)
            (replace(entry.spec, join=None) if dora else entry.spec).check_added("formats of other libraries are")
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        for group, graph in entry.spec.lay_out(entry.targets):
            yield from filled_group(entry, k, group, graph, tensors, kernels)
            k += 1


def filled_group(
    entry: Entry,
    k: int,
    group: Group,
    graph: Graph,
    tensors: Mapping[str, Tensor],
    kernels: Mapping[str, tuple[int, ...]] = NO_KERNELS,
) -> Iterator[Filled]:
    """Each weight of one group, whatever its nodes are functions of; a network that multiplies is no dW and is not asked.

    Args:
        entry: the declaration, with which the group and its graph were laid out.
        k: the group's number through all entries.
        tensors, kernels: see `filled`.
    """
    values = [tensors[tensor_name(k, node)].detach() for node in graph.nodes]
    lengths = [entry.targets[name][0] for name in group.members]
    held = tensors.get(magnitude_name(k))
    norms = [None] * len(lengths) if held is None else torch.split(held.detach(), lengths)
    if isinstance(group, FlatGroup) or graph.terms or graph.is_mapped:
        for one, norm in zip(_whole(entry, group, graph, values), norms, strict=True):
            yield replace(one, kernel=kernels.get(one.name, ()), magnitude=norm)
        return
    for (name, positions), norm in zip(group.members.items(), norms, strict=True):
        own = tuple(v[s] for v, s in zip(values, graph.select(positions), strict=True))
        kernel, scale = kernels.get(name, ()), entry.spec.scale
        yield Filled(name, group.shape, entry.spec.network, graph, own, scale, kernel, magnitude=norm)


def _whole(entry: Entry, group: Group, graph: Graph, values: list[Tensor]) -> Iterator[Filled]:
    """dW itself: a flat fold's weights are slices of its vector, a sum is no one network, and nodes with maps make others."""
    adapter = make_adapter(entry.spec, group, graph, torch.float64)
    with torch.no_grad():
        for own, value in zip(adapter.stored(), values, strict=True):
            own.copy_(value)
    for name in group.members:
        d_out, d_in = entry.targets[name]
        with torch.no_grad():
            delta = adapter.delta(name).to(torch.promote_types(values[0].dtype, torch.float32))
        yield Filled(name, (d_out, d_in), Dense(), lower(Dense(), _modes((d_out, d_in))), (delta,), 1.0)


def _modes(shape: Shape) -> tuple[Mode, ...]:
    return Mode("out", shape[0], "out"), Mode("in", shape[1], "in")


def of_weight(weight: Weight) -> Filled:
    """The same of a weight that was read without a model.

    Raises:
        CheckpointError: it is no network that can be declared.
    """
    try:
        part = replace(weight, shared=frozenset()).spec.network
        graph, values = lower(part, _modes(weight.shape)), weight.tensors()
    except SpecError as error:
        raise CheckpointError(f"'{weight.name}': {error}") from error
    nodes = tuple(values[n.name] for n in graph.nodes)
    return Filled(weight.name, weight.shape, part, graph, nodes, weight.scale, weight.kernel, weight.flipped, weight.turned)


@dataclass(frozen=True, eq=False)
class _Component:
    """A part of the network that shares no index with the rest: ``outer (out, bond)`` times ``inner (bond, in)``."""

    out: Indices
    inward: Indices
    outer: Tensor
    inner: Tensor

    @cached_property
    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left vectors (out, n), values (n,), right vectors (in, n)."""
        left, upper = torch.linalg.qr(self.outer)
        right, lower_ = torch.linalg.qr(self.inner.T)
        u, s, v = torch.linalg.svd(upper @ lower_.T, full_matrices=False)
        return left @ u, s, right @ v.T


@dataclass(frozen=True, eq=False)
class Thin:
    """dW, taken apart; `scale` is not in the factors.

    Attributes:
        filled: the network.
        components: of it; their Kronecker product is dW / scale.
    """

    filled: Filled
    components: tuple[_Component, ...]

    @property
    def rank(self) -> int:
        """Of the exact factors: no larger than out or in."""
        return min(math.prod(c.outer.shape[1] for c in self.components), *self.filled.shape)

    @cached_property
    def values(self) -> Tensor:
        """The singular values of dW, the largest first, scale included."""
        product = torch.ones(1, dtype=torch.float64)
        for component in self.components:
            product = torch.outer(product, component.singular[1]).reshape(-1)
        return abs(self.filled.scale) * product.sort(descending=True).values

    def norm(self) -> float:
        """The Frobenius norm of dW."""
        return float(torch.linalg.vector_norm(self.values))

    def rank_for(self, error: float) -> int:
        """The smallest rank whose best approximation is off by at most `error`, relative in the Frobenius norm."""
        squares = self.values.square()
        tails = squares.flip(0).cumsum(0).flip(0)
        left = torch.cat([tails, tails.new_zeros(1)])
        good = left <= (error * self.norm()) ** 2
        return max(1, int(good.nonzero()[0]))

    def exact(self) -> tuple[Tensor, Tensor]:
        """(up (out, r), down (r, in)) in float64 with ``dW = scale up down``, of the network's own rank."""
        if math.prod(c.outer.shape[1] for c in self.components) > self.rank:
            return self.truncated(self.rank)
        bonds = [f"bond {k}" for k in range(len(self.components))]
        up = _product([(c.outer, (*c.out, b), c.out) for c, b in zip(self.components, bonds, strict=True)], self, "out", bonds)
        down = _product(
            [(c.inner.T, (*c.inward, b), c.inward) for c, b in zip(self.components, bonds, strict=True)], self, "in", bonds
        )
        return up, down.T

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest (up, down) of a rank, the singular values shared evenly (Eckart and Young 1936)."""
        sizes = [c.singular[1].numel() for c in self.components]
        product = torch.ones(1, dtype=torch.float64)
        for component in self.components:
            product = torch.outer(product, component.singular[1]).reshape(-1)
        chosen = product.argsort(descending=True, stable=True)[:rank]
        root = product[chosen].sqrt()
        places = torch.unravel_index(chosen, sizes)
        left = [(c.singular[0][:, p], (*c.out, "one"), c.out) for c, p in zip(self.components, places, strict=True)]
        right = [(c.singular[2][:, p], (*c.inward, "one"), c.inward) for c, p in zip(self.components, places, strict=True)]
        return _product(left, self, "out", ["one"]) * root, (_product(right, self, "in", ["one"]) * root).T


def _product(parts: Sequence[tuple[Tensor, Indices, Indices]], thin: Thin, role: str, bonds: list[str]) -> Tensor:
    """Matrices over parts of the open indices, as one over all of them in order, (all, bonds)."""
    graph = thin.filled.graph
    place: dict[str, int] = {}
    operands: list[Tensor | list[int]] = []
    for matrix, indices, own in parts:
        tensor = matrix.reshape(*(graph.size[i] for i in own), matrix.shape[1])
        operands += [tensor, [place.setdefault(i, len(place)) for i in indices]]
    result = [place[i] for i in (*graph.open(role), *bonds)]
    size = thin.filled.shape[0 if role == "out" else 1]
    return torch.einsum(*operands, result).reshape(size, -1)


def thin(weight: Filled | Weight) -> Thin:
    """Take dW of a weight apart.

    Raises:
        CheckpointError: its values are not finite.
    """
    own = weight if isinstance(weight, Filled) else of_weight(weight)
    if not all(bool(torch.isfinite(node).all()) for node in own.nodes) or not math.isfinite(own.scale):
        raise CheckpointError(f"'{own.name}' holds NaN or infinity; look at the training that made it.")
    nodes = [node.double() for node in own.nodes]
    return Thin(own, tuple(_component(own.graph, part, nodes) for part in _parts(own.graph)))


def _parts(graph: Graph) -> list[list[int]]:
    """Numbers of the nodes, by what hangs together."""
    parts: list[tuple[set[str], list[int]]] = []
    for k, node in enumerate(graph.nodes):
        indices, mine = set(graph.indices_of(node, fixed=True)), [k]
        apart = []
        for other, numbers in parts:
            if other & indices:
                indices, mine = indices | other, numbers + mine
            else:
                apart.append((other, numbers))
        parts = [*apart, (indices, mine)]
    return [sorted(numbers) for _, numbers in parts]


def _component(graph: Graph, part: Sequence[int], nodes: Sequence[Tensor]) -> _Component:
    own = [graph.nodes[k] for k in part]
    used = {i for n in own for i in graph.indices_of(n, fixed=True)}
    out, inward = (tuple(i for i in graph.open(role) if i in used) for role in ("out", "in"))
    values = [nodes[k] for k in part]
    cut = halves(_sub_graph(graph, own, out, inward), CPU, "dp")
    rows, columns = (math.prod(graph.size[i] for i in side) for side in (out, inward))
    if cut is not None and cut.bond < min(rows, columns):
        outer, inner = (
            compiled(half.plan, DEFAULT)(*(values[k] for k in half.nodes), alpha=1.0) for half in (cut.outer, cut.inner)
        )
        return _Component(out, inward, outer.reshape(rows, cut.bond), inner.reshape(cut.bond, columns))
    run = compiled(plan_equation(sub_network(graph, own, (out, inward)), "delta", CPU, "dp"), DEFAULT)
    return _Component(out, inward, *_sides(run(*values, alpha=1.0).reshape(rows, columns)))


def _sub_graph(graph: Graph, nodes: Sequence[GraphNode], out: Indices, inward: Indices) -> Graph:
    """Some of a graph's nodes, for one member, with the modes that are left to them."""
    fixed = tuple(GraphNode(n.name, graph.shape_of(n, True), _axes_of(graph, n), n.init, n.trainable) for n in nodes)
    used = {i for n in fixed for i in n.indices}
    modes = tuple(
        (Mode(role, math.prod(graph.size[i] for i in indices), role), indices)
        for role, indices in (("out", out), ("in", inward))
    )
    return Graph(fixed, tuple((i, s) for i, s in graph.sizes if i in used), modes)


def _axes_of(graph: Graph, node: GraphNode) -> tuple[Indices, ...]:
    member = set(graph.open("member"))
    return tuple(axis for axis in node.axes if not (axis and member.issuperset(axis)))


def _sides(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as a product with the identity on its shorter side."""
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (matrix, eye) if columns <= rows else (eye, matrix)


def distance(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> float:
    """``||up down - other_up other_down||`` in the Frobenius norm, from the factors, without cancellation."""
    left = torch.linalg.qr(torch.cat([up, -other_up], 1)).R
    right = torch.linalg.qr(torch.cat([down, other_down]).T).R
    return float(torch.linalg.matrix_norm(left @ right.T))
