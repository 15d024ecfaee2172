"""From a declared part and sized modes to one graph: nodes, indices, sizes. Everything else reads the graph.

An *axis* is a run of digits of a mode's index in mixed radix: ``(root, stride, size)``. Kronecker splits an axis
into finer ones; where several parts split the same mode, the graph's indices are the common refinement, and a node
that does not split a mode just carries several indices in a row. Sizes of 1 carry no index at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from superlora_tn.declare.fold import Mode
from superlora_tn.declare.node_maps import NodeMap


@dataclass(frozen=True)
class GraphNode:
    """One tensor: its shape, and the indices of each axis (none for a size of 1, several for a split mode).

    With a `map` another tensor is stored, of the shape `stored`, of which the node is a function. A node that `copies` another
    one starts at that one's first values.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    init: str
    trainable: bool
    map: NodeMap | None = None
    copies: str | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of what is stored."""
        return self.shape if self.map is None else self.map.stored(self.shape)

    @property
    def starts_at_zero(self) -> bool:
        """Whether the node's first value is zero."""
        if self.map is not None and self.init == "auto":
            return self.map.vanishes
        return self.init == "zeros" and (self.map is None or self.map.from_zero)

    @property
    def indices(self) -> tuple[str, ...]:
        """All indices in the order of memory."""
        return tuple(i for axis in self.axes for i in axis)


@dataclass(frozen=True)
class Term:
    """One network of a sum.

    Attributes:
        weight: what it is multiplied by.
        nodes: numbers of its nodes in the whole.
        graph: the network, its nodes in that order; its modes may be larger than the whole's, which then are cropped from them.
        crops: (mode, how many of its positions are kept) for each mode that is cropped.
    """

    weight: float
    nodes: tuple[int, ...]
    graph: Graph
    crops: tuple[tuple[str, int], ...] = ()

    def equation(self, fixed: bool = False) -> str:
        """The network in words with its sign, weight and crops, e.g. ``- 2 x out1 out2 in -> out1 out2 in (out 50 of 56)``."""
        number = "" if abs(self.weight) == 1 else f"{abs(self.weight):g} x "
        sizes = {mode.name: mode.size for mode, _ in self.graph.modes}
        crops = ", ".join(f"{mode} {kept} of {sizes[mode]}" for mode, kept in self.crops)
        words = f"{'+' if self.weight > 0 else '-'} {number}{self.graph.equation(fixed)}"
        return f"{words} ({crops})" if crops else words


@dataclass(frozen=True)
class Graph:
    """A sized tensor network whose contraction is dW, or a sum of such networks.

    Attributes:
        nodes: the tensors, in the order their parameters are kept.
        sizes: (index, size) of every index.
        modes: (mode, its indices) in the fold's order; `Mode.role` groups them as out, in, member or flat.
        terms: of a sum, whose networks have indices of their own: `sizes` is empty then, and no mode has any.
    """

    nodes: tuple[GraphNode, ...]
    sizes: tuple[tuple[str, int], ...]
    modes: tuple[tuple[Mode, tuple[str, ...]], ...]
    terms: tuple[Term, ...] = ()

    @property
    def networks(self) -> tuple[Term, ...]:
        """The terms; of one network that network alone."""
        return self.terms or (Term(1.0, tuple(range(len(self.nodes))), self),)

    @cached_property
    def homes(self) -> tuple[tuple[Graph, GraphNode], ...]:
        """For each node a network that it stands in, and the node there."""
        found = {k: (t.graph, node) for t in self.networks for k, node in zip(t.nodes, t.graph.nodes, strict=True)}
        return tuple(found[k] for k in range(len(self.nodes)))

    @cached_property
    def size(self) -> Mapping[str, int]:
        """Index -> size."""
        return dict(self.sizes)

    @property
    def is_flat(self) -> bool:
        """Whether the modes are those of a flat fold, which are not a weight's in and out."""
        return any(mode.role == "flat" for mode, _ in self.modes)

    def open(self, role: str) -> tuple[str, ...]:
        """The open indices of a role (`out`, `in`, `member` or `flat`), slowest first."""
        return tuple(i for mode, indices in self.modes if mode.role == role for i in indices)

    @cached_property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(math.prod(n.stored) for n in self.nodes if n.trainable)

    @property
    def is_mapped(self) -> bool:
        """Whether any node is a function of what is stored."""
        return any(n.map is not None for n in self.nodes)

    @cached_property
    def num_numbers(self) -> int:
        """Numbers of all nodes, the frozen ones too."""
        return sum(math.prod(n.shape) for n in self.nodes)

    def indices_of(self, node: GraphNode, fixed: bool = False) -> tuple[str, ...]:
        """A node's indices; with `fixed`, without the member's, which are chosen beforehand."""
        member = self.open("member") if fixed else ()
        return tuple(i for i in node.indices if i not in member)

    def shape_of(self, node: GraphNode, fixed: bool = False) -> tuple[int, ...]:
        """A node's stored shape; with `fixed`, without the member's axes."""
        member = set(self.open("member")) if fixed else set()
        return tuple(s for s, axis in zip(node.shape, node.axes, strict=True) if not (axis and member.issuperset(axis)))

    def member_values(self, positions: Sequence[int]) -> dict[str, int]:
        """The value of each member index, from the positions of the member modes in order."""
        values: dict[str, int] = {}
        member_modes = [(m, i) for m, i in self.modes if m.role == "member"]
        for position, (_, indices) in zip(positions, member_modes, strict=True):
            for index in reversed(indices):
                position, values[index] = divmod(position, self.size[index])
        return values

    def select(self, positions: Sequence[int]) -> tuple[tuple[int | slice, ...], ...]:
        """For each node, the index expression that picks one member."""
        if self.terms:
            found = {k: s for t in self.terms for k, s in zip(t.nodes, t.graph.select(positions), strict=True)}
            return tuple(found[k] for k in range(len(self.nodes)))
        values = self.member_values(positions)
        return tuple(self._select_node(node, values) for node in self.nodes)

    def _select_node(self, node: GraphNode, values: Mapping[str, int]) -> tuple[int | slice, ...]:
        chosen: list[int | slice] = []
        for axis in node.axes:
            if not axis or axis[0] not in values:
                chosen.append(slice(None))
                continue
            position = 0
            for index in axis:
                position = position * self.size[index] + values[index]
            chosen.append(position)
        return tuple(chosen)

    def rows_of(self, node: GraphNode, low: int, high: int) -> tuple[slice, ...]:
        """The index expression that cuts a node to the values `low .. high` of the slowest flat index."""
        slowest = self.open("flat")[:1]
        cut = [slice(None)] * len(node.axes)
        for k, axis in enumerate(node.axes):
            if axis and axis[:1] == slowest:
                unit = node.shape[k] // self.size[axis[0]]
                cut[k] = slice(low * unit, high * unit)
        return tuple(cut)

    def narrowed(self, index: str, size: int) -> Graph:
        """The graph with fewer values of an index that is the slowest wherever it stands."""
        ratio = Fraction(size, self.size[index])
        nodes = tuple(
            replace(n, shape=tuple(int(s * ratio) if index in a else s for s, a in zip(n.shape, n.axes, strict=True)))
            for n in self.nodes
        )
        modes = tuple((replace(m, size=int(m.size * ratio)) if index in i else m, i) for m, i in self.modes)
        return Graph(nodes, tuple((i, size if i == index else s) for i, s in self.sizes), modes)

    def equation(self, fixed: bool = False) -> str:
        """The network in words, e.g. ``out r, r in -> out in``; the terms of a sum one behind the other."""
        if self.terms:
            return " ".join(t.equation(fixed) for t in self.terms).removeprefix("+ ")
        member = () if fixed else self.open("member")
        result = member + self.open("flat") + self.open("out") + self.open("in")
        terms = ", ".join(" ".join(self.indices_of(n, fixed)) or "1" for n in self.nodes)
        return f"{terms} -> {' '.join(result)}"
