"""dW of several weights as two thin matrices each, in one contraction where their networks are alike.

Members of one network are contracted with the member's indices left open. Networks of one declaration for each weight are
stacked: a batch of networks, of which one is the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.cut import Halves, halves
from superlora_tn.contraction.plan import plan_equation, sub_network
from superlora_tn.contraction.profile import Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.bounds import KEPT_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.network.expand import lower
from superlora_tn.network.graph import Graph
from superlora_tn.update.base import Member, Run
from superlora_tn.update.physical import PhysicalAdapter


@dataclass(frozen=True, eq=False)
class Thin:
    """``dW_k = outer_k inner_k`` of several weights, scale included; a half that all of them share has no axis k.

    Attributes:
        outer: ([which,] out, bond).
        inner: ([which,] bond, in).
    """

    outer: Tensor
    inner: Tensor


def thin(members: Sequence[Member], rows: int) -> Thin | None:
    """dW of all these weights as thin matrices.

    None where their networks are not alike or have no cut, and where so many `rows` of x a weight go faster through dW.
    """
    first, graph = members[0].adapter, _joint(members)
    if graph is None:
        return None
    settings = first.settings
    cut = _cut(graph, first.profile, settings.optimize, settings.backend)
    if cut is None or (settings.route is None and not cut.halves.pays(members[0].shape, rows)):
        return None
    if graph is first.graph:
        nodes = first.tensors()
    else:
        nodes = [torch.stack(each) for each in zip(*(member.adapter.tensors() for member in members), strict=True)]
    outer, inner = (run(*(nodes[k] for k in own)) for own, run in cut.runs)
    scales = [member.adapter.scale for member in members]
    if len(set(scales)) == 1:
        return Thin(outer * scales[0] if scales[0] != 1 else outer, inner)
    return Thin(outer * torch.tensor(scales, dtype=outer.dtype, device=outer.device)[:, None, None], inner)


def alike(one: Member, other: Member) -> bool:
    """Whether two weights have a network each, and these differ in their numbers and strengths alone."""
    a, b = one.adapter, other.adapter
    return (
        isinstance(a, PhysicalAdapter)
        and isinstance(b, PhysicalAdapter)
        and len(a.members) == len(b.members) == 1
        and (a.graph, a.settings, a.profile, a.spec.join) == (b.graph, b.settings, b.profile, None)
    )


def _joint(members: Sequence[Member]) -> Graph | None:
    """One graph of all members, in their order."""
    first = members[0].adapter
    if isinstance(first, PhysicalAdapter) and all(member.adapter is first for member in members):
        return first.graph if first.is_all(members) else None
    if not isinstance(first, PhysicalAdapter) or not all(alike(members[0], member) for member in members[1:]):
        return None
    return lower(first.spec.network, first.group.modes, len(members))


@dataclass(frozen=True, eq=False)
class _Cut:
    """The halves of a graph, and what contracts each for all members: its nodes, and a compiled plan."""

    halves: Halves
    runs: tuple[tuple[tuple[int, ...], Run], ...]


@kept(1024, KEPT_NODES, lambda _, graph, *__, **___: len(graph.nodes))
def _cut(graph: Graph, device: Device, optimize: Optimizer, backend: str) -> _Cut | None:
    """None where the graph has no cut, or a half has some of the members' indices and lacks others."""
    found = halves(graph, device, optimize)
    if found is None:
        return None
    outer, inner = set(found.outer.nodes), set(found.inner.nodes)
    bond = tuple(i for i in _indices(graph, inner) if i in _indices(graph, outer) and i not in graph.open("member"))
    runs = []
    for nodes, sides in ((found.outer.nodes, (graph.open("out"), bond)), (found.inner.nodes, (bond, graph.open("in")))):
        own = tuple(i for i in graph.open("member") if i in _indices(graph, set(nodes)))
        if own not in ((), graph.open("member")):
            return None
        equation = sub_network(graph, [graph.nodes[k] for k in nodes], (own, *sides) if own else sides, fixed=False)
        runs.append((nodes, compiled(plan_equation(equation, "delta", device, optimize), backend)))
    return _Cut(found, tuple(runs))


def _indices(graph: Graph, nodes: set[int]) -> dict[str, None]:
    return dict.fromkeys(i for k in sorted(nodes) for i in graph.nodes[k].indices)
