"""What the calls of one adapter can share: sub-networks without x, and x through the nodes that sibling weights have in common.

Weights of one layer that read the same x (the q, k and v of a block) and share factors need x through these factors once.
And what a plan contracts before x comes in (a core with a layer's slice) needs contracting once a step, for all members
together. Both are decided here by price, from the graph alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from superlora_tn.contraction.layout import Equation, Indices, volume
from superlora_tn.contraction.plan import Plan, grown, make_plan, plan_equation, sub_network
from superlora_tn.contraction.profile import ITEM, Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.bounds import KEPT_NODES, MAX_GROWN
from superlora_tn.declare.cache import kept
from superlora_tn.declare.parts import TOKEN
from superlora_tn.network.applied import applied
from superlora_tn.network.graph import Graph, GraphNode

# A shared contraction costs this many more operations, in units of the device's latency: a graph node, a hook, a look-up.
CALLS = 3


@dataclass(frozen=True)
class Root:
    """A sub-network without x that is contracted beforehand.

    Attributes:
        leaves: numbers of its nodes in the graph that x goes through (see `network.applied`).
        indices: of the result; the members' come first.
        together: the plan for all members.
        single: the plan for one member, without the members' indices.
    """

    leaves: tuple[int, ...]
    indices: Indices
    together: Plan
    single: Plan


@dataclass(frozen=True)
class Scheme:
    """How an adapter's apply route is divided.

    Attributes:
        roots: sub-networks contracted beforehand.
        graph: what is left: the nodes in none of them, in order, then one node a root.
        common: numbers of the nodes of that graph that x meets once for all siblings; empty where nothing is shared.
        rest: numbers of the others.
    """

    roots: tuple[Root, ...]
    graph: Graph
    common: tuple[int, ...]
    rest: tuple[int, ...]

    def plans(self, tokens: int, device: Device, optimize: Optimizer) -> tuple[Plan | None, Plan]:
        """The plans of x through the common nodes (if any) and of what follows."""
        if not self.common:
            return None, make_plan(self.graph, "apply", tokens, device, optimize)
        first, second = _halves(self.graph, self.common, tokens)
        return plan_equation(first, "apply", device, optimize), plan_equation(second, "apply", device, optimize)


@kept(4096, KEPT_NODES, lambda scheme, *_, **__: len(scheme.graph.nodes))
def scheme(graph: Graph, siblings: int, tokens: int, device: Device, optimize: Optimizer) -> Scheme:
    """The division that costs the least.

    Args:
        graph: a physical fold's network.
        siblings: how many members read the same x.
        tokens: rows of x to price for.
        device, optimize: as in `make_plan`.
    """
    graph = applied(graph).graph
    whole = make_plan(graph, "apply", tokens, device, optimize)
    best, price, parts = whole, siblings * whole.price, tuple[int, ...]()
    for common in _candidates(graph) if siblings > 1 else ():
        first, second = (plan_equation(e, "apply", device, optimize) for e in _halves(graph, common, tokens))
        again = 3 * ITEM * tokens * volume(graph.open("in"), graph.size) / device.bandwidth
        cost = first.price + siblings * second.price + again + CALLS * device.latency
        if cost < price:
            best, price, parts = second, cost, common
    later = tuple(k for k in range(len(graph.nodes)) if k not in parts)
    roots = tuple(_roots(graph, best, later, device, optimize))
    return _condensed(graph, roots, parts)


def _candidates(graph: Graph) -> Iterator[tuple[int, ...]]:
    """Sets of nodes that x could meet once for all members: those with in's indices, and with all that hangs on them alone."""
    member, out = set(graph.open("member")), set(graph.open("out"))
    free = [k for k, n in enumerate(graph.nodes) if not (member | out) & set(n.indices)]
    found = [k for k in free if set(graph.nodes[k].indices) & set(graph.open("in"))]
    yield from islice(grown(graph, found, free), MAX_GROWN)


def _halves(graph: Graph, common: tuple[int, ...], tokens: int) -> tuple[Equation, Equation]:
    """The equations of x through the common nodes, and of the result through the others."""
    inputs = [graph.indices_of(n, fixed=True) for n in graph.nodes]
    later = tuple(k for k in range(len(graph.nodes)) if k not in common)
    needed = {i for k in later for i in inputs[k]} | set(graph.open("out"))
    reached = dict.fromkeys([i for k in common for i in inputs[k]] + list(graph.open("in")))
    bonds = tuple(i for i in reached if i in needed)
    first = sub_network(graph, [graph.nodes[k] for k in common], ((TOKEN,), bonds)).fed(graph.open("in"), tokens)
    return first, sub_network(graph, [graph.nodes[k] for k in later], ((TOKEN,), graph.open("out"))).fed(bonds, tokens)


def _roots(graph: Graph, plan: Plan, nodes: tuple[int, ...], device: Device, optimize: Optimizer) -> Iterator[Root]:
    """The largest sub-networks without x that a plan contracts, where sharing them pays."""
    leaves: list[tuple[int, ...] | None] = [None, *((k,) for k in nodes)]
    for step in plan.steps:
        left, right = leaves[step.large], leaves[step.small]
        for side in (left, right):
            if (left is None or right is None) and side is not None and len(side) > 1 and _pays(graph, side, plan.size):
                yield _root(graph, tuple(sorted(side)), device, optimize)
        leaves.append(None if left is None or right is None else left + right)


def _open(graph: Graph, leaves: tuple[int, ...]) -> tuple[Indices, Indices]:
    """The indices of a sub-network's result: the members', and the others that are needed outside of it."""
    member = graph.open("member")
    outside = {i for k, n in enumerate(graph.nodes) if k not in leaves for i in n.indices}
    outside |= set(graph.open("out")) | set(graph.open("in"))
    held = tuple(dict.fromkeys(i for k in leaves for i in graph.nodes[k].indices))
    return tuple(i for i in member if i in held), tuple(i for i in held if i in outside and i not in member)


def _pays(graph: Graph, leaves: tuple[int, ...], size: Mapping[str, int]) -> bool:
    """Whether a sub-network is worth keeping: it holds no more numbers, for all members, than x."""
    if not graph.open("member"):
        return False
    members, kept = _open(graph, leaves)
    return volume(members + kept, graph.size) <= size[TOKEN] * volume(graph.open("in"), graph.size)


def _root(graph: Graph, leaves: tuple[int, ...], device: Device, optimize: Optimizer) -> Root:
    own, (members, kept) = [graph.nodes[k] for k in leaves], _open(graph, leaves)
    plans = []
    for fixed in (False, True):
        equation = sub_network(graph, own, tuple((i,) for i in (kept if fixed else members + kept)), fixed)
        plans.append(plan_equation(equation, "delta", device, optimize))
    return Root(leaves, members + kept, plans[0], plans[1])


def _condensed(graph: Graph, roots: tuple[Root, ...], common: tuple[int, ...]) -> Scheme:
    """The scheme of a graph with its roots as single nodes."""
    inside = {k for root in roots for k in root.leaves}
    left = [k for k in range(len(graph.nodes)) if k not in inside]
    made = tuple(
        GraphNode(
            " ".join(graph.nodes[k].name for k in root.leaves),
            tuple(graph.size[i] for i in root.indices),
            tuple((i,) for i in root.indices),
            "auto",
            any(graph.nodes[k].trainable for k in root.leaves),
        )
        for root in roots
    )
    condensed = replace(graph, nodes=(*(graph.nodes[k] for k in left), *made)) if roots else graph
    first = tuple(left.index(k) for k in common)
    return Scheme(roots, condensed, first, tuple(k for k in range(len(condensed.nodes)) if k not in first))
