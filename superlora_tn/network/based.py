"""Whether nodes that hold something of the base's weight fit it."""

from __future__ import annotations

import math

from superlora_tn.declare.parts import SpecError
from superlora_tn.network.graph import Graph, GraphNode


def check_based(graph: Graph, node: GraphNode) -> None:
    """Raise unless a node has the indices that what it holds of the base has."""
    if graph.is_flat:
        raise SpecError(f"the node '{node.name}' holds a weight's '{node.init}', and a flat fold knows no weights apart.")
    own, out, inward, member = (set(i) for i in (node.indices, graph.open("out"), graph.open("in"), graph.open("member")))
    sides = {"base": out | inward, "left": out, "right": inward, "singular": set[str](), "columns": inward}
    wanted, bond = sides[node.init] | member, own - out - inward - member
    if not wanted <= own or own - wanted != bond or (node.init in ("base", "columns") and bond):
        raise SpecError(
            f"the node '{node.name}' holds each weight's '{node.init}', so its indices are {' '.join(sorted(wanted)) or 'none'}"
            f"{'' if node.init in ('base', 'columns') else ' and bonds'}; it was given {' '.join(node.indices)}."
        )
    most = min(math.prod(graph.size[i] for i in side) for side in (out, inward))
    if math.prod(graph.size[i] for i in bond) > most:
        raise SpecError(f"the node '{node.name}' has more bonds than the {most} singular vectors of a weight; choose fewer.")
