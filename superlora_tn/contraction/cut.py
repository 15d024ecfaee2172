"""dW as a product of two matrices: a network cut in two between its out and its in.

Layers that need dW itself, such as convolutions, pass x through the two halves one after the other instead: the thinner the
bond between them, the less they cost. LoRA's halves are its B and A; LoHa's are its joined factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from superlora_tn.contraction.layout import Indices, volume
from superlora_tn.contraction.plan import Plan, grown, plan_equation, sub_network
from superlora_tn.contraction.profile import Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.bounds import KEPT_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.network.graph import Graph


@dataclass(frozen=True)
class Half:
    """One of the two matrices.

    Attributes:
        nodes: numbers of its nodes in the graph.
        plan: contracts them to the matrix.
    """

    nodes: tuple[int, ...]
    plan: Plan


@dataclass(frozen=True)
class Halves:
    """``dW = outer inner``, with outer (out, bond) and inner (bond, in)."""

    outer: Half
    inner: Half
    bond: int

    def pays(self, shape: tuple[int, int], rows: int, blocks: int = 1) -> bool:
        """Whether two products by the halves cost less than building dW (out, in) and one product by it, for rows of x.

        Counted in FLOPs; those of the halves count twice, as products by thin matrices reach about half of the speed. In a
        grouped convolution the inner half is used once for each of `blocks` groups of inputs.
        """
        d_out, d_in = shape
        return 2 * self.cost(shape, rows, blocks) < d_out * d_in * (rows + self.bond)

    def cost(self, shape: tuple[int, int], rows: int, blocks: int = 1) -> int:
        """Multiplications and additions of one call by the halves, half of the FLOPs."""
        return rows * self.bond * (shape[0] + blocks * shape[1])


@kept(4096, KEPT_NODES, lambda _, graph, *__, **___: len(graph.nodes))
def halves(graph: Graph, device: Device, optimize: Optimizer) -> Halves | None:
    """The cut with the thinnest bond, for one member of a physical fold; None where a node is on out and on in."""
    cuts = [(volume(_bond(graph, inner), graph.size), inner) for inner in _inner_sides(graph)]
    if not cuts:
        return None
    bond, inner = min(cuts)
    indices, outer = _bond(graph, inner), tuple(k for k in range(len(graph.nodes)) if k not in inner)
    return Halves(
        _half(graph, outer, (graph.open("out"), indices), device, optimize),
        _half(graph, inner, (indices, graph.open("in")), device, optimize),
        bond,
    )


def _indices(graph: Graph, nodes: tuple[int, ...]) -> dict[str, None]:
    return dict.fromkeys(i for k in nodes for i in graph.indices_of(graph.nodes[k], fixed=True))


def _bond(graph: Graph, inner: tuple[int, ...]) -> Indices:
    """The indices that the inner nodes share with the others."""
    outer = _indices(graph, tuple(k for k in range(len(graph.nodes)) if k not in inner))
    return tuple(i for i in _indices(graph, inner) if i in outer)


def _inner_sides(graph: Graph) -> Iterator[tuple[int, ...]]:
    """Sets of nodes for the side of in: those with its indices, and ever more that hang on them, short of out's."""
    out, inward = set(graph.open("out")), set(graph.open("in"))
    free = [k for k in range(len(graph.nodes)) if not out & set(_indices(graph, (k,)))]
    found = [k for k in range(len(graph.nodes)) if inward & set(_indices(graph, (k,)))]
    if not out or not inward or not set(found) <= set(free):
        return
    yield from grown(graph, found, free)


def _half(graph: Graph, nodes: tuple[int, ...], result: tuple[Indices, ...], device: Device, optimize: Optimizer) -> Half:
    equation = sub_network(graph, [graph.nodes[k] for k in nodes], result)
    return Half(nodes, plan_equation(equation, "delta", device, optimize))
