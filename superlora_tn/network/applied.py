"""The graph that x goes through: equal to the declared one, where nodes with maps allow less work than their tensors do.

- A node that a map makes as a product of two thin matrices is two nodes.
- Circulant blocks are the real Fourier transform of x, a 2 x 2 matrix for each block and frequency, and the way back.
- An identity between an index of `out` and one of `in` is no node: the two are one index, of which x and the result have each
  a value of their own, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from superlora_tn.declare.bounds import KEPT_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.declare.node_maps import Circulant, Identity
from superlora_tn.network.graph import Graph, GraphNode

Axes = tuple[tuple[str, ...], ...]
# Smaller circulant blocks are as cheap as they stand.
LEAST_BLOCK = 8


@dataclass(frozen=True)
class Applied:
    """A graph for x alone, and what its nodes are.

    Attributes:
        graph: gives the same as the declared one; an index may be open in `out` and in `in`.
        sources: for each of its nodes the declared node's number, and which part of it this is (None: the node itself).
    """

    graph: Graph
    sources: tuple[tuple[int, int | None], ...]


@kept(4096, KEPT_NODES, lambda found, *_, **__: len(found.sources))
def applied(graph: Graph) -> Applied:
    """The graph that x goes through; the same one where no map tells of another."""
    work = _Work(graph, dict(graph.sizes))
    for k, node in enumerate(() if graph.terms else graph.nodes):
        for part, made in enumerate(found := work.parts(node)):
            work.nodes.append(made)
            work.sources.append((k, None if made is node else part))
        work.is_other |= found != [node]
    if not work.nodes or not work.is_other:
        return Applied(graph, tuple((k, None) for k in range(len(graph.nodes))))
    return Applied(work.graph(), tuple(work.sources))


@dataclass
class _Work:
    """A graph in the making: the declared one, all sizes, the nodes so far, and what indices became."""

    declared: Graph
    sizes: dict[str, int]
    nodes: list[GraphNode] = field(default_factory=list)
    sources: list[tuple[int, int | None]] = field(default_factory=list)
    became: dict[str, tuple[str, ...]] = field(default_factory=dict)
    is_other: bool = False

    def parts(self, node: GraphNode) -> list[GraphNode]:
        """What x meets of a node."""
        bond = None if node.map is None else node.map.bond
        if isinstance(node.map, Identity) and self._joins(node):
            return []
        if bond is not None and bond < node.shape[-1]:
            rank = self._new(f"{node.name}_bond", bond)
            return [_part(node, k, (node.shape[k], bond), (node.axes[k], rank)) for k in (-2, -1)]
        if isinstance(node.map, Circulant) and self._can_split(node, node.map.size):
            return self._waves(node, node.map.size)
        return [node]

    def graph(self) -> Graph:
        """The graph of the nodes, with what the indices became."""
        nodes = tuple(replace(n, axes=tuple(_renamed(a, self.became) for a in n.axes)) for n in self.nodes)
        modes = tuple((mode, _renamed(indices, self.became)) for mode, indices in self.declared.modes)
        return Graph(nodes, tuple((i, size) for i, size in self.sizes.items() if i not in self.became), modes)

    def _joins(self, node: GraphNode) -> bool:
        """Make the two indices of an identity one: one of `out`, one of `in`, none another already, both on no other node."""
        out, inward = self.declared.open("out"), self.declared.open("in")
        pair = sorted(node.indices, key=lambda i: i not in out)
        if len(pair) != 2 or pair[0] not in out or pair[1] not in inward or self._are_taken(pair):
            return False
        if any(other is not node and not {*pair} - {*other.indices} for other in self.declared.nodes):
            return False
        self.became[pair[1]] = (pair[0],)
        return True

    def _are_taken(self, indices: list[str]) -> bool:
        return any(i in self.became or (i,) in self.became.values() for i in indices)

    def _can_split(self, node: GraphNode, size: int) -> bool:
        last = node.axes[-2:]
        return size >= LEAST_BLOCK and all(len(a) == 1 for a in last) and not self._are_taken([a[0] for a in last])

    def _waves(self, node: GraphNode, size: int) -> list[GraphNode]:
        """A transform of `out`, a matrix for each frequency and block, a transform of `in`."""
        count, batch = size // 2 + 1, node.shape[:-2]
        frequency = self._new(f"{node.name}_frequency", count)
        ends, blocks, phases = list[GraphNode](), list[tuple[str, ...]](), list[tuple[str, ...]]()
        for k, (index,) in zip((1, 2), node.axes[-2:], strict=True):
            block, place = self._new(f"{index}_block", self.sizes[index] // size), self._new(f"{index}_place", size)
            self.became[index] = (*block, *place)
            blocks.append(block)
            phases.append(self._new(f"{node.name}_phase{k}", 2))
            ends.append(GraphNode(f"{node.name}_waves{k}", (size, count, 2), (place, frequency, phases[-1]), "auto", False))
        shape = (*batch, *(s // size for s in node.shape[-2:]), count, 2, 2)
        axes = (*node.axes[: len(batch)], *blocks, frequency, *phases)
        return [ends[0], GraphNode(node.name, shape, axes, node.init, node.trainable), ends[1]]

    def _new(self, name: str, size: int) -> tuple[str, ...]:
        """A new index of a size, under a name that no other has; none for a size of 1."""
        if size == 1:
            return ()
        while name in self.sizes:
            name += "_"
        self.sizes[name] = size
        return (name,)


def _part(node: GraphNode, which: int, shape: tuple[int, ...], axes: Axes) -> GraphNode:
    """One of the two thin matrices of a node."""
    name, batch = f"{node.name}_{3 + which}", len(node.shape) - 2
    return GraphNode(name, (*node.shape[:batch], *shape), (*node.axes[:batch], *axes), node.init, node.trainable)


def _renamed(indices: tuple[str, ...], became: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(new for i in indices for new in became.get(i, (i,)))
