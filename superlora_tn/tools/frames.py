"""One group of a fold as least-squares problems: between its weights and its networks' tensors.

For a physical fold the network's tensor is the stacked weights with other axes, one problem. For a flat fold each of its
groups is a problem of its own, for a run of the weights' vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import pairwise

import torch
from torch import Tensor

from superlora_tn.contraction.layout import Equation
from superlora_tn.contraction.plan import sub_network
from superlora_tn.declare.fold import KERNEL, FlatGroup, Group, PhysicalGroup
from superlora_tn.declare.maps import Compose, Projection, Shuffle
from superlora_tn.network import graph as networks
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.environment import contraction
from superlora_tn.tools.problem import Mapped, Matrix, Picked, Problem, Unfolding, Whole, open_indices
from superlora_tn.tools.summed import AnyProblem, SumProblem, Term, total
from superlora_tn.update.fixed_maps import fixed_map

Load = Callable[[str], Tensor]

MAX_MATRIX = 1 << 20  # numbers of a map's matrix, whose pseudo-inverse takes about a second


def equation_of(graph: Graph, fixed: bool) -> Equation:
    """A graph's network with one axis an index: all members together, or (`fixed`) one group of a flat fold."""
    opened = graph.open("flat") if fixed else tuple(i for _, indices in graph.modes for i in indices)
    return sub_network(graph, graph.nodes, tuple((i,) for i in opened), fixed)


def _term(graph: Graph, term: networks.Term, fixed: bool) -> Term:
    """A term of a graph, with the elements that are kept of it and the nodes that are trained in the whole."""
    own = replace(equation_of(term.graph, fixed), trained=tuple(graph.nodes[k].trainable for k in term.nodes))
    modes = zip(graph.modes, term.graph.modes, strict=True)
    sides = [(mode.size, larger.size) for (mode, _), (larger, _) in modes if mode.role == "flat" or not fixed]
    larger = torch.arange(math.prod(size for _, size in sides)).reshape([size for _, size in sides])
    kept = larger[tuple(slice(size) for size, _ in sides)].reshape(-1)
    return Term(term.weight, term.nodes, own, Picked(kept, tuple(term.graph.size[i] for i in open_indices(own))))


@dataclass(frozen=True)
class Place:
    """Where a problem's nodes stand in the group's: for each node the index expression of its part."""

    select: tuple[tuple[int | slice, ...], ...]

    def take(self, nodes: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The problem's nodes, with one axis an index."""
        return [n[s].reshape(shape) for n, s, shape in zip(nodes, self.select, shapes, strict=True)]

    def put(self, nodes: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write the problem's nodes into the group's."""
        for node, select, value in zip(nodes, self.select, values, strict=True):
            node[select] = value.reshape(node[select].shape)


class Frame(ABC):
    """One group of a fold as least-squares problems: between its weights and its networks' tensors.

    Attributes:
        group, spec, graph: the group, the declaration and the group's graph.
        places: where each problem's nodes stand.
    """

    group: Group
    equation: Equation
    places: tuple[Place, ...]
    fixed: bool

    def __init__(self, spec: AdapterSpec, graph: Graph) -> None:
        self.spec, self.graph = spec, graph
        modes = [mode.size for mode, _ in graph.modes if mode.role == "flat" or not self.fixed]
        self.shape = tuple(modes)  # of a sum's tensor
        self.terms = tuple(_term(graph, term, self.fixed) for term in graph.terms)
        if not graph.terms:
            self.equation = equation_of(graph, self.fixed)
            self.shape = tuple(graph.size[i] for i in open_indices(self.equation))

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Length of the rows of the members (the longest, where they differ)."""

    @property
    @abstractmethod
    def members(self) -> tuple[str, ...]:
        """Names of the weights."""

    @abstractmethod
    def problem(self, number: int, load: Load) -> AnyProblem:
        """The problem of one place; `load` gives a weight's dW by name, float64, (out, in)."""

    @abstractmethod
    def deltas(self, nodes: Sequence[Tensor]) -> dict[str, Tensor]:
        """dW of each weight from the group's nodes, scale included."""

    def _posed(self, number: int, unfolding: Unfolding, wanted: Tensor) -> AnyProblem:
        """The problem of one place."""
        if not self.terms:
            return Problem(self.equation, unfolding, wanted)
        select = zip(self.graph.nodes, self.places[number].select, strict=True)
        shapes = tuple(tuple(torch.empty(node.shape, device="meta")[own].shape) for node, own in select)
        trained = tuple(node.trainable for node in self.graph.nodes)
        return SumProblem(self.terms, shapes, trained, self.shape, unfolding, wanted)

    def _tensors(self, nodes: Sequence[Tensor]) -> Iterator[Tensor]:
        """The networks' tensors of all places."""
        if self.terms:
            for place in self.places:
                yield total(self.terms, self.shape, [n[s] for n, s in zip(nodes, place.select, strict=True)])
            return
        size = self.graph.size
        shapes = [tuple(size[i] for i in term) for term in self.equation.inputs]
        run = contraction(self.equation.inputs, open_indices(self.equation), size)
        for place in self.places:
            yield run(*place.take(nodes, shapes))


class PhysicalFrame(Frame):
    """A physical fold: one problem, whose tensor is the weights stacked."""

    group: PhysicalGroup
    fixed = False

    def __init__(self, group: PhysicalGroup, spec: AdapterSpec, graph: Graph) -> None:
        super().__init__(spec, graph)
        self.group = group
        self.places = (Place(tuple((slice(None),) * len(n.shape) for n in graph.nodes)),)
        names = [m.name for m in group.modes if m.role != "member"]
        parts: list[str] = [name for name in ("head", "out", "in", *KERNEL) if name in names]
        size = {m.name: m.size for m in group.modes}
        self._parted = [size[name] for name in parts]  # the shape of a weight with its heads apart
        self._order = [parts.index(name) for name in names]
        self._back = [names.index(name) for name in parts]

    @property
    def fan_in(self) -> int:
        """See `Frame`."""
        return self.group.shape[1]

    @property
    def members(self) -> tuple[str, ...]:
        """See `Frame`."""
        return tuple(self.group.members)

    def problem(self, number: int, load: Load) -> AnyProblem:
        """See `Frame`."""
        wanted = torch.empty([m.size for m in self.group.modes], dtype=torch.float64)
        for name in self.members:
            wanted[self._at(name)] = load(name).reshape(self._parted).permute(self._order) / self.spec.scale
        return self._posed(number, Whole(), wanted.reshape(self.shape))

    def _at(self, name: str) -> tuple[int | slice, ...]:
        """The index expression of one weight in the tensor over the fold's modes."""
        positions = iter(self.group.members[name])
        return tuple(next(positions) if m.role == "member" else slice(None) for m in self.group.modes)

    def deltas(self, nodes: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `Frame`."""
        (tensor,) = self._tensors(nodes)
        whole = tensor.reshape([m.size for m in self.group.modes]) * self.spec.scale
        return {name: whole[self._at(name)].permute(self._back).reshape(self.group.shape) for name in self.members}


class FlatFrame(Frame):
    """A flat fold: one problem for each of its runs of the weights' vector."""

    group: FlatGroup
    fixed = True

    def __init__(self, group: FlatGroup, spec: AdapterSpec, graph: Graph) -> None:
        super().__init__(spec, graph)
        self.group = group
        whole = Place(tuple((slice(None),) * len(n.shape) for n in graph.nodes))
        self.places = tuple(Place(graph.select((g,))) if group.groups > 1 else whole for g in range(group.groups))
        self._map = fixed_map(spec.projection, group.inner, group.length)
        self._matrix: Tensor | None = None

    @property
    def fan_in(self) -> int:
        """See `Frame`."""
        return max(d_in for _, _, d_in in self.group.members.values())

    @property
    def members(self) -> tuple[str, ...]:
        """See `Frame`."""
        return tuple(self.group.members)

    def problem(self, number: int, load: Load) -> AnyProblem:
        """See `Frame`."""
        first, last = self.group.start(number), self.group.start(number + 1)
        pieces = []
        for name, (start, d_out, d_in) in self.group.members.items():
            low, high = max(first - start, 0), min(last - start, d_out * d_in)
            if low < high:
                pieces.append(load(name).reshape(-1)[low:high])
        return self._posed(number, self._unfolding(last - first), torch.cat(pieces) / self.spec.scale)

    def _unfolding(self, count: int) -> Unfolding:
        """Of a run of `count` elements, one less than the longest or as many."""
        shape = self.shape
        if self._map is None:
            return Picked(torch.arange(count), shape)
        if _shuffles(self.spec.projection):
            places = self._map(torch.arange(self.group.inner, dtype=torch.float64))[:count]
            return Picked(places.long(), shape)
        linear = self.spec.projection is None or self.spec.projection.linear
        if linear and self.group.inner * count <= MAX_MATRIX:
            if self._matrix is None:
                self._matrix = self._map(torch.eye(self.group.inner, dtype=torch.float64)).mT
            return Matrix(self._matrix[:count], shape)
        return Mapped(self._map, count, shape, linear)

    def deltas(self, nodes: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `Frame`."""
        starts = [self.group.start(g) for g in range(self.group.groups + 1)]
        counts = [b - a for a, b in pairwise(starts)]
        runs = [self._unfolding(count)(t) for count, t in zip(counts, self._tensors(nodes), strict=True)]
        vector = torch.cat(runs) * self.spec.scale
        return {n: vector[at : at + d_out * d_in].reshape(d_out, d_in) for n, (at, d_out, d_in) in self.group.members.items()}


def _shuffles(projection: Projection | None) -> bool:
    """Whether a map only changes the order."""
    return all(map(_shuffles, projection.maps)) if isinstance(projection, Compose) else isinstance(projection, Shuffle)


@singledispatch
def frame(group: Group, spec: AdapterSpec, graph: Graph) -> Frame:
    """The frame of one group, as `AdapterSpec.lay_out` gives it. A new kind of fold registers itself here."""
    raise TypeError(f"{group!r} is no group of a fold; register it with frames.frame.")


@frame.register
def _physical(group: PhysicalGroup, spec: AdapterSpec, graph: Graph) -> Frame:
    spec.check_added("fits and conversions are")
    return PhysicalFrame(group, spec, graph)


@frame.register
def _flat(group: FlatGroup, spec: AdapterSpec, graph: Graph) -> Frame:
    spec.check_added("fits and conversions are")
    return FlatFrame(group, spec, graph)
