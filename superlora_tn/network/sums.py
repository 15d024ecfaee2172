"""The sum of several adapters as one: bonds add, and each adapter's nodes are a block of the sum's.

``sum_k scale_k contract(nodes_k)`` is one network of the same form where every node has a bond and the bonds hang together:
LoRA, LoTR, any CP, Tucker or tensor train, and most networks in index notation. Tucker's core is block diagonal. In products of
parts (Kronecker, Hadamard) a sum has terms that mix, so they have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from superlora_tn.declare.parts import CP, Dense, Network, Part, SpecError, TensorTrain, Tucker, reference_rank
from superlora_tn.network.graph import Graph, GraphNode
from superlora_tn.network.spec import AdapterSpec

Shapes = Sequence[tuple[int, ...]]
Block = tuple[slice, ...]


def summed(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """The declaration of the sum, its scale that of the first.

    Args:
        specs: of one structure: they may differ in ranks, scales and dropout.

    Raises:
        SpecError: they are of different structures, or of one whose sums are no network of it.
    """
    first = specs[0]
    for spec in specs:
        spec.check_added("sums of adapters are")
    if any((spec.fold, spec.projection) != (first.fold, first.projection) for spec in specs):
        raise SpecError("the adapters are laid out by different folds or maps, so their sum is none of them.")
    if first.projection is not None and not first.projection.linear:
        raise SpecError("the adapters' fixed map is not linear, so a sum of networks is not mapped to a sum of updates.")
    network = _sum([spec.network for spec in specs])
    scale = first.scale * ((reference_rank(network) or 1) ** (0.5 if first.rslora else 1.0))
    return replace(first, network=network, alpha=None if first.alpha is None else scale)


def _sum(parts: Sequence[Part]) -> Part:
    first = parts[0]
    if all(isinstance(part, Dense) for part in parts):
        return first
    if all(type(part) is type(first) for part in parts):
        if isinstance(first, Network):
            return _networks([part for part in parts if isinstance(part, Network)])
        plain = not any(isinstance(part, CP) and part.dense_if_large for part in parts)
        same = len({part.factors for part in parts if isinstance(part, Tucker)}) <= 1
        if isinstance(first, CP | Tucker | TensorTrain) and plain and same:
            rank = _ranks([part.rank for part in parts if isinstance(part, CP | Tucker | TensorTrain)])
            if rank is not None:
                # A sum of ranks that were capped, or add nothing, is kept as it is.
                if not isinstance(first, CP):
                    return replace(first, rank=rank, over="keep")
                if isinstance(rank, int):
                    return replace(first, rank=rank, over="keep")
    names = ", ".join(dict.fromkeys(type(part).__name__ for part in parts))
    raise SpecError(f"the sum of such networks ({names}) is no network of their form.")


def _ranks(ranks: Sequence[int | tuple[int, ...]]) -> int | tuple[int, ...] | None:
    numbers = [rank for rank in ranks if isinstance(rank, int)]
    if len(numbers) == len(ranks):
        return sum(numbers)
    several = [rank for rank in ranks if isinstance(rank, tuple)]
    alike = len(several) == len(ranks) and len({len(rank) for rank in several}) == 1
    return tuple(map(sum, zip(*several, strict=True))) if alike else None


def _networks(parts: Sequence[Network]) -> Network:
    first = parts[0]
    opened = {i for group in first.mode_groups for i in group}
    if first.crop or first.alike:
        raise SpecError(
            "the adapters are networks that are cropped or have bonds as large as modes; no such network is their sum."
        )
    sizes = dict[str, int]()
    for part in parts:
        own = part.known
        alike = (part.modes, part.nodes) == (first.modes, first.nodes)
        if not alike or any(own.get(i) != first.known.get(i) for i in opened):
            raise SpecError("the adapters are networks of different nodes, so their sum is none of them.")
        for index, size in own.items():
            sizes[index] = size if index in opened else sizes.get(index, 0) + size
    return Network(first.modes, sizes | {i: -1 for i, size in first.sizes if size == -1}, **dict(first.nodes))


def blocks(graph: Graph, parts: Sequence[Shapes]) -> tuple[tuple[Block, ...], ...]:
    """Where each adapter's nodes lie in the sum's, of which the rest is zero.

    Args:
        graph: of the sum.
        parts: the shapes of each adapter's nodes.

    Returns:
        For each adapter the index expression of each node.

    Raises:
        SpecError: the sum is no network of this form.
    """
    bonds = [_bonds(graph, node) for node in graph.nodes]
    if len(graph.nodes) == 1 and not any(bonds):
        return tuple((tuple(slice(None) for _ in graph.nodes[0].shape),) for _ in parts)
    if not _hang_together(bonds):
        raise SpecError(
            f"the network '{graph.equation()}' has a node without a bond, or falls apart into products, so that a sum of such "
            "is none of them."
        )
    start = dict.fromkeys((index for own in bonds for index in own.values()), 0)
    found: list[tuple[Block, ...]] = []
    for shapes in parts:
        size = {own[k]: shape[k] for own, shape in zip(bonds, shapes, strict=True) for k in own}
        found.append(
            tuple(
                tuple(slice(start[own[k]], start[own[k]] + s) if k in own else slice(0, s) for k, s in enumerate(shape))
                for own, shape in zip(bonds, shapes, strict=True)
            )
        )
        start = {index: start[index] + size[index] for index in start}
    return tuple(found)


def _bonds(graph: Graph, node: GraphNode) -> dict[int, str]:
    """The axes of a node that are bonds, with their indices."""
    opened = {i for _, indices in graph.modes for i in indices}
    return {k: axis[0] for k, axis in enumerate(node.axes) if len(axis) == 1 and axis[0] not in opened}


def _hang_together(bonds: Sequence[Mapping[int, str]]) -> bool:
    """Whether every node is reached from the first through bonds."""
    found, touched = {0}, set(bonds[0].values())
    while True:
        more = {k for k, own in enumerate(bonds) if k not in found and touched & set(own.values())}
        if not more:
            return len(found) == len(bonds) and bool(touched)
        found |= more
        touched |= {index for k in more for index in bonds[k].values()}
