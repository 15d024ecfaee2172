"""Networks without loops from a tensor, by truncated singular value decompositions.

One rule serves every network whose indices are bonds of two nodes or open on one: LoRA is one decomposition of dW, a
Kronecker product one of Van Loan's rearrangement, a Tucker the sequentially truncated HOSVD, a tensor train TT-SVD, LoKr and
LoNKr both kinds one after the other. With two nodes the result is the nearest of all; with more its error is at most
sqrt(number of bonds) times the least, and nothing is lost where the ranks suffice (Vannieuwenhoven et al. 2012; Oseledets
2011; Van Loan & Pitsianis 1993; Grasedyck 2010).

Two things that look like loops are none: a node whose indices all lie on another (the weights of a CP beside a factor) can be
absorbed there, and an open index that every node carries just repeats the network for each of its values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from superlora_tn.contraction.layout import Equation, Indices, volume
from superlora_tn.tools.singular import leading

Edges = Mapping[int, Mapping[int, Indices]]


@dataclass(frozen=True)
class Branch:
    """A node with what hangs on it: its number, the bonds towards its root, and its children."""

    node: int
    bonds: Indices
    children: tuple[Branch, ...]

    @property
    def nodes(self) -> tuple[int, ...]:
        """Its own number and its children's."""
        return (self.node, *(k for child in self.children for k in child.nodes))


def trees(equation: Equation) -> tuple[Branch, ...] | None:
    """The network as separate trees, each from its node with the most bonds; None where it has a loop or a hyperindex."""
    opened = {i for axis in equation.result for i in axis}
    places = {i: [k for k, term in enumerate(equation.inputs) if i in term] for term in equation.inputs for i in term}
    if any(len(found) != (1 if i in opened else 2) for i, found in places.items()):
        return None
    edges: dict[int, dict[int, Indices]] = {k: {} for k in range(len(equation.inputs))}
    for index, found in places.items():
        if index not in opened:
            for a, b in (found, found[::-1]):
                edges[a][b] = (*edges[a].get(b, ()), index)
    grown, left = list[Branch](), set(edges)
    while left:
        root = max(sorted(left), key=lambda k: len(edges[k]))
        together = _reached(root, edges)
        # A connected piece is a tree exactly where it has one edge less than nodes; each edge is seen from both ends.
        if sum(len(edges[k]) for k in together) != 2 * (len(together) - 1):
            return None
        grown.append(_branch(root, None, (), edges))
        left -= together
    return tuple(grown)


def _reached(root: int, edges: Edges) -> set[int]:
    found, ahead = {root}, [root]
    while ahead:
        more = edges[ahead.pop()].keys() - found
        found, ahead = found | more, [*ahead, *more]
    return found


def _branch(node: int, above: int | None, bonds: Indices, edges: Edges) -> Branch:
    return Branch(node, bonds, tuple(_branch(k, node, own, edges) for k, own in edges[node].items() if k != above))


def closed_form(equation: Equation, tensor: Tensor) -> list[Tensor] | None:
    """Nodes of a network near a tensor over its open indices; None where the network has loops of its own.

    Args:
        equation: the network, one axis an index, all nodes free.
        tensor: over its open indices.
    """
    left = unabsorbed(equation)
    inputs = [equation.inputs[k] for k in left]
    opened = tuple(i for axis in equation.result for i in axis)
    repeated = tuple(i for i in opened if len(left) > 1 and all(i in term for term in inputs))
    once = replace(
        equation,
        names=tuple(equation.names[k] for k in left),
        inputs=tuple(tuple(i for i in term if i not in repeated) for term in inputs),
        shapes=(),
        trained=(),
        result=tuple((i,) for i in opened if i not in repeated),
    )
    forest = trees(once)
    if forest is None:
        return None
    size = dict(equation.sizes)
    found = [tensor.new_ones([size[i] for i in term]) for term in equation.inputs]
    for values in product(*(range(size[i]) for i in repeated)):
        at = dict(zip(repeated, values, strict=True))
        nodes = from_tensor(once, forest, tensor[tuple(at.get(i, slice(None)) for i in opened)])
        for k, node in zip(left, nodes, strict=True):
            found[k][tuple(at.get(i, slice(None)) for i in equation.inputs[k])] = node
    return found


def is_nearest(equation: Equation) -> bool:
    """Whether the closed form is the nearest of all: one node, or two without a third."""
    return len(unabsorbed(equation)) <= 2


def unabsorbed(equation: Equation) -> list[int]:
    """The nodes without those whose indices all lie on another one, and whose bonds go on without them."""
    left, opened = list(range(len(equation.inputs))), {i for axis in equation.result for i in axis}
    for k in sorted(left, key=lambda k: len(equation.inputs[k])):
        rest, own = [equation.inputs[other] for other in left if other != k], set(equation.inputs[k])
        inside = any(own <= set(term) for term in rest)
        if inside and all(i in opened or sum(i in term for term in rest) > 1 for i in own):
            left.remove(k)
    return left


def from_tensor(equation: Equation, forest: Sequence[Branch], tensor: Tensor) -> list[Tensor]:
    """The nodes of a network of trees that is near a tensor.

    Args:
        equation: the network, one axis an index.
        forest: its trees.
        tensor: over its open indices.

    Returns:
        The nodes. All of a tree but its root have orthonormal columns towards the root.
    """
    size, nodes = dict(equation.sizes), dict[int, Tensor]()
    opened = tuple(i for axis in equation.result for i in axis)
    own = [tuple(i for i in opened if any(i in equation.inputs[k] for k in tree.nodes)) for tree in forest]
    rest, left = tensor, opened
    for tree, indices in zip(forest[:-1], own[:-1], strict=True):
        other = tuple(i for i in left if i not in indices)
        matrix = rest.permute([left.index(i) for i in (*indices, *other)]).reshape(volume(indices, size), -1)
        u, s, v = leading(matrix, 1)
        root = s.sqrt()
        _tree(equation, tree, (root * u).reshape([size[i] for i in indices]), indices, size, nodes)
        rest, left = (root * v).reshape([size[i] for i in other]), other
    _tree(equation, forest[-1], rest, left, size, nodes)
    return [nodes[k] for k in range(len(nodes))]


def _tree(
    equation: Equation, root: Branch, tensor: Tensor, indices: Indices, size: Mapping[str, int], nodes: dict[int, Tensor]
) -> None:
    """Cut the branches off one after the other; what is left is the root."""
    for child in root.children:
        tensor, indices = _cut(equation, child, tensor, indices, size, nodes)
    nodes[root.node] = tensor.permute([indices.index(i) for i in equation.inputs[root.node]])


def _cut(
    equation: Equation, branch: Branch, tensor: Tensor, indices: Indices, size: Mapping[str, int], nodes: dict[int, Tensor]
) -> tuple[Tensor, Indices]:
    """Cut one branch off a tensor: the tensor with the bonds in place of the branch's open indices, and its indices."""
    for child in branch.children:
        tensor, indices = _cut(equation, child, tensor, indices, size, nodes)
    own = tuple(i for i in equation.inputs[branch.node] if i not in branch.bonds)
    rest = tuple(i for i in indices if i not in own)
    matrix = tensor.permute([indices.index(i) for i in (*own, *rest)]).reshape(volume(own, size), volume(rest, size))
    u, s, v = leading(matrix, volume(branch.bonds, size))
    given = (*own, *branch.bonds)
    node = u.reshape([size[i] for i in given])
    nodes[branch.node] = node.permute([given.index(i) for i in equation.inputs[branch.node]])
    left = (*branch.bonds, *rest)
    return (s[:, None] * v.mT).reshape([size[i] for i in left]), left
