"""What an adapter takes from the base's weights: W, its singular vectors and values, the norms of its rows or columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from superlora_tn.declare.parts import BASED
from superlora_tn.network.graph import Graph, GraphNode

Read = Callable[[str], Tensor]


def row_norms(matrix: Tensor) -> Tensor:
    """The norms of the rows of a matrix (out, in), in float32 or wider."""
    found: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    return found


def base_values(
    graph: Graph, members: Mapping[str, tuple[int, ...]], read: Read
) -> Iterator[tuple[int, tuple[int | slice, ...], Tensor]]:
    """Number of a node, where in it one member is, and what belongs there.

    Args:
        graph: of a physical fold.
        members: the group's weights with their positions.
        read: W of a weight, (out, in), asked for once.
    """
    numbers = [k for k, node in enumerate(graph.nodes) if node.init in BASED]
    for name, positions in members.items() if numbers else ():
        weight = read(name).detach()
        select = graph.select(positions)
        parts = _singular(weight) if any(graph.nodes[k].init in ("left", "singular", "right") for k in numbers) else ()
        for k in numbers:
            yield k, select[k], _value(*graph.homes[k], weight, parts)


def _singular(weight: Tensor) -> tuple[Tensor, ...]:
    """U (out, k), the values (k) and V^T (k, in), in float64."""
    wide = (weight.cpu() if weight.device.type == "mps" else weight).double()
    return tuple(torch.linalg.svd(wide, full_matrices=False))


def _value(graph: Graph, node: GraphNode, weight: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    out, inward = graph.open("out"), graph.open("in")
    own = graph.indices_of(node, fixed=True)
    bond = tuple(i for i in own if i not in {*out, *inward})
    if node.init == "base":
        found, order = weight, out + inward
    elif node.init == "columns":
        found, order = row_norms(weight.mT), inward
    else:
        size = math.prod(graph.size[i] for i in bond)
        found, order = {
            "left": (parts[0][:, :size], out + bond),
            "singular": (parts[1][:size], bond),
            "right": (parts[2][:size], bond + inward),
        }[node.init]
    whole = found.reshape([graph.size[i] for i in order])
    return whole.permute([order.index(i) for i in own]).reshape(graph.shape_of(node, fixed=True))
