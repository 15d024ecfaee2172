"""Which method of other libraries a network is, read off its nodes and bonds, and its values as their tensors.

Nodes that share a bond are a *piece*. A piece is a dense tensor, two matrices (low), two matrices with a diagonal between
them (diagonal), or two matrices with a kernel (Tucker). One piece is full, LoRA, AdaLoRA or LoRA with ``mid``; two over the
same rows and columns are LoHa; two over a coarse and a fine part of them are LoKr; a vector of rows beside a diagonal piece
is VeRA. Everything else is no method of theirs, and goes to them as a plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from superlora_tn.files.thin import Filled
from superlora_tn.network.expand import Axis, expand

OUT, IN = ("out", "head"), ("in",)


@dataclass(frozen=True, eq=False)
class Method:
    """A network as another library's method.

    Attributes:
        kind: lora, adalora, loha, lokr, vera or full.
        fields: its tensors by the names of `forms`, kernels flattened into in.
        ranks: of its low pieces, in order; none for dense ones.
    """

    kind: str
    fields: Mapping[str, Tensor]
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Node:
    """One node, its axes sorted by what they are."""

    out: tuple[Axis, ...]
    inward: tuple[Axis, ...]
    bonds: tuple[Axis, ...]
    axes: tuple[Axis, ...]
    tensor: Tensor

    def laid(self, *groups: Sequence[Axis]) -> Tensor:
        """The tensor with its axes in this order, one for each group."""
        order = [self.axes.index(axis) for group in groups for axis in group]
        return self.tensor.permute(order).reshape([math.prod(axis.size for axis in group) for group in groups])


@dataclass(frozen=True, eq=False)
class _Piece:
    """What hangs together by bonds."""

    kind: str
    out: tuple[Axis, ...]
    inward: tuple[Axis, ...]
    fields: Mapping[str, Tensor]

    @property
    def rank(self) -> int | None:
        """Of a low piece, a diagonal or a Tucker one: of the matrix beside in."""
        return self.fields["b"].shape[0] if "b" in self.fields else None


def method_of(filled: Filled) -> Method | None:
    """The method that a weight's network is, None where other libraries have none for it."""
    nodes = _nodes(filled)
    pieces = [_piece(own) for own in _by_bonds(nodes)]
    known = [_kernelled(p, filled.kernel) for p in pieces if p is not None]
    if len(known) < len(pieces):
        return None
    if len(known) == 1:
        return _one(known[0])
    return _two(known) if len(known) == 2 else None


def _nodes(filled: Filled) -> list[_Node]:
    roles = {mode.name: mode.role for mode, _ in filled.graph.modes}
    drafts = expand(filled.part, tuple(Axis(mode.name, 1, mode.size, mode.whole) for mode, _ in filled.graph.modes))
    nodes = []
    for draft, tensor in zip(drafts, filled.nodes, strict=True):
        # A member's own axes are taken already, but for those of size 1.
        axes = tuple(a for a in draft.axes if roles.get(a.root) != "member")
        role = {a: roles.get(a.root) for a in axes}
        nodes.append(
            _Node(
                _sorted(axes, "out", role, filled),
                _sorted(axes, "in", role, filled),
                tuple(a for a in axes if role[a] is None),
                axes,
                tensor.reshape([a.size for a in axes]),
            )
        )
    return nodes


def _sorted(axes: Sequence[Axis], wanted: str, role: Mapping[Axis, str | None], filled: Filled) -> tuple[Axis, ...]:
    """Those of a role, the slowest first."""
    modes = [mode.name for mode, _ in filled.graph.modes]
    return tuple(sorted((a for a in axes if role[a] == wanted), key=lambda a: (modes.index(a.root), -a.stride, a.size)))


def _by_bonds(nodes: Sequence[_Node]) -> list[list[_Node]]:
    groups: list[tuple[set[str], list[_Node]]] = []
    for node in nodes:
        roots, mine = {b.root for b in node.bonds}, [node]
        apart = []
        for other, own in groups:
            if other & roots:
                roots, mine = roots | other, own + mine
            else:
                apart.append((other, own))
        groups = [*apart, (roots, mine)]
    return [own for _, own in groups]


def _piece(nodes: Sequence[_Node]) -> _Piece | None:
    """What the nodes are, None where no method has such a piece."""
    if len(nodes) == 1:
        node = nodes[0]
        return None if node.bonds else _Piece("dense", node.out, node.inward, {"w": node.laid(node.out, node.inward)})
    lefts = [n for n in nodes if n.out and not n.inward]
    rights = [n for n in nodes if n.inward and not n.out]
    middles = [n for n in nodes if not n.out and not n.inward]
    if len(nodes) == 2 and len(lefts) == len(rights) == 1:
        return _low(lefts[0], rights[0])
    if len(nodes) == 3 and len(lefts) == len(rights) == len(middles) == 1:
        return _diagonal(lefts[0], middles[0], rights[0])
    if len(nodes) == 3 and len(lefts) == 1 and len(rights) == 2:
        return _tucker(lefts[0], rights)
    return None


def _low(left: _Node, right: _Node) -> _Piece | None:
    if set(left.bonds) != set(right.bonds) or not left.bonds:
        return None
    bonds = left.bonds
    return _Piece("low", left.out, right.inward, {"a": left.laid(left.out, bonds), "b": right.laid(bonds, right.inward)})


def _diagonal(left: _Node, middle: _Node, right: _Node) -> _Piece | None:
    if not set(left.bonds) == set(middle.bonds) == set(right.bonds):
        return None
    bonds = left.bonds
    fields = {"a": left.laid(left.out, bonds), "e": middle.laid(bonds), "b": right.laid(bonds, right.inward)}
    return _Piece("diagonal", left.out, right.inward, fields)


def _tucker(left: _Node, rights: Sequence[_Node]) -> _Piece | None:
    """A core with the kernel's axes between a matrix of rows and one of channels."""
    core = next((n for n in rights if len(n.bonds) == 2 and left.bonds[0] in n.bonds), None)
    if core is None or len(left.bonds) != 1:
        return None
    channels = next(n for n in rights if n is not core)
    first = left.bonds[0]
    second = next(b for b in core.bonds if b != first)
    inner = channels.inward + core.inward
    slower = not channels.inward or all(
        c.root != k.root or c.stride > k.stride or k.size == 1 for c in channels.inward for k in core.inward
    )
    if channels.bonds != (second,) or not slower:
        return None
    if all(k.size == 1 for k in core.inward):  # a pointwise convolution's, whose kernel is no axis anywhere
        matrix = core.laid([first], [second], core.inward)[..., 0] @ channels.laid([second], channels.inward)
        return _Piece("low", left.out, inner, {"a": left.laid(left.out, [first]), "b": matrix})
    fields = {
        "a": left.laid([first], left.out),
        "t": core.laid([first], [second], *[[k] for k in core.inward]),
        "b": channels.laid([second], channels.inward),
    }
    return _Piece("tucker", left.out, inner, fields)


def _kernelled(piece: _Piece, kernel: tuple[int, ...]) -> _Piece:
    """The piece, its core with an axis for each size of the kernel, however many modes hold that."""
    core = piece.fields.get("t")
    if core is None or math.prod(core.shape[2:]) != math.prod(kernel):
        return piece
    return replace(piece, fields={**piece.fields, "t": core.reshape(*core.shape[:2], *kernel)})


def _one(piece: _Piece) -> Method:
    rank = () if piece.rank is None else (piece.rank,)
    if piece.kind == "dense":
        return Method("full", {"diff": piece.fields["w"]}, ())
    fields = {"up": piece.fields["a"], "down": piece.fields["b"]}
    if piece.kind == "diagonal":
        return Method("adalora", {**fields, "E": piece.fields["e"]}, rank)
    if piece.kind == "tucker":
        return Method("lora", {"up": fields["up"].T, "mid": piece.fields["t"], "down": fields["down"]}, rank)
    return Method("lora", fields, rank)


def _two(pieces: list[_Piece]) -> Method | None:
    first, second = pieces
    ranks = tuple(p.rank for p in pieces if p.rank is not None)
    same = first.out == second.out and first.inward == second.inward
    if same and first.kind == second.kind and first.kind in ("low", "tucker"):
        return Method("loha", _named("hada", first, 1) | _named("hada", second, 2), ranks)
    for one, other in ((first, second), (second, first)):
        if one.kind == "dense" and not one.inward and other.kind == "diagonal" and one.out == other.out:
            own = other.fields
            return Method(
                "vera",
                {"vera_b": one.fields["w"][:, 0], "vera_B": own["a"], "vera_d": own["e"], "vera_A": own["b"]},
                ranks,
            )
        if _coarser(one.out, other.out) and _coarser(one.inward, other.inward) and one.kind in ("dense", "low"):
            if other.kind == "diagonal":
                return None
            return Method("lokr", _named("lokr", one, 1) | _named("lokr", other, 2), ranks)
    return None


def _coarser(one: tuple[Axis, ...], other: tuple[Axis, ...]) -> bool:
    """Whether all digits of one side are slower than all of the other."""
    return not set(one) & set(other) and all(
        a.stride >= b.stride * b.size or a.size == 1 or b.size == 1 for a in one for b in other if a.root == b.root
    )


def _named(method: str, piece: _Piece, number: int) -> dict[str, Tensor]:
    if piece.kind == "dense":
        return {f"{method}_w{number}": piece.fields["w"]}
    fields = {f"{method}_w{number}_{side}": piece.fields[side] for side in "ab"}
    return fields | ({f"{method}_t{number}": piece.fields["t"]} if "t" in piece.fields else {})
