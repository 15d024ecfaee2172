"""The words an adapter is declared in: nodes of a tensor network, and the frozen values that expand to nodes.

Everything here is a frozen, hashable value, checked when it is made. A *part* (`Dense`, `Base`, `Tucker`, `CP`,
`TensorTrain`, `Kronecker`, `Hadamard`, `Sum`, `Network`) knows its ranks but no sizes; `graph.lower` gives it sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from superlora_tn.declare.bounds import MAX_DEPTH, MAX_LEAVES, MAX_NODES, MAX_PARTS, MAX_PLACES, MAX_SCALE
from superlora_tn.declare.checks import SpecError as SpecError
from superlora_tn.declare.checks import check_count as check_count
from superlora_tn.declare.checks import check_flag as check_flag
from superlora_tn.declare.checks import check_number as check_number
from superlora_tn.declare.checks import check_rank as check_rank
from superlora_tn.declare.checks import check_ranks as check_ranks
from superlora_tn.declare.checks import shown as shown
from superlora_tn.declare.nodes import BASED as BASED
from superlora_tn.declare.nodes import INITS as INITS
from superlora_tn.declare.nodes import NAME
from superlora_tn.declare.nodes import Node as Node
from superlora_tn.declare.nodes import parse_modes as parse_modes
from superlora_tn.declare.source import Notation, Several

# The library's own indices: the rows of x, and the groups of a flat fold.
TOKEN, GROUP = "token", "group"
Over = Literal["refuse", "cap", "keep"]
OVER = ("refuse", "cap", "keep")


def check_over(owner: str, over: object) -> None:
    """Raise unless `over` says what is done with a rank above its bound."""
    if over not in OVER:
        raise SpecError(f"{owner} was given over={shown(over)}; choose 'refuse', 'cap' or 'keep'.")


@dataclass(frozen=True)
class Dense:
    """One full tensor over all modes: no factorisation at all."""


@dataclass(frozen=True)
class Base:
    """The weight itself, as it is when the adapter is attached: frozen, a copy that is saved with the adapter.

    Over the whole of a weight, so beside other parts in a `Hadamard`: ``Hadamard(Base(), CP(8))`` is HiRA (Huang et al. 2025).
    """


@dataclass(frozen=True)
class CP:
    """A sum of `rank` outer products: ``T[m1..mM] = sum_r prod_m A_m[m r]`` (a Tucker with a superdiagonal core).

    Args:
        rank: the number of terms, one bond shared by all factors.
        dense_if_large: stay one dense node where ``rank >= max(sizes) / 2``, since factors would then cost more
            than they save (PEFT's rule for LoKr's splits).
        over: what is done where a lower rank gives every tensor already: ``"refuse"`` raises, ``"cap"`` takes the
            highest rank that adds something (as the presets do), ``"keep"`` keeps the rank. The scale stays alpha / `rank`.
    """

    rank: int
    dense_if_large: bool = False
    over: Over = "refuse"

    def __post_init__(self) -> None:
        check_rank("CP", self.rank)
        check_flag("CP", "dense_if_large", self.dense_if_large)
        check_over("CP", self.over)


@dataclass(frozen=True)
class Tucker:
    """A core multiplied by a factor on each mode: ``T = C x_1 A_1 ... x_M A_M``.

    Args:
        rank: the core's size on each factored mode, one for all or a tuple with one each.
        factors: the modes that get a factor, separated by spaces; the core carries the others as they are
            (partial Tucker). None factors all modes.
        over: what is done with a rank that adds nothing, see `CP`; one rank for all modes is refused where it is above the
            largest of them.
    """

    rank: int | tuple[int, ...]
    factors: str | None = None
    over: Over = "refuse"

    def __post_init__(self) -> None:
        check_ranks("Tucker", self.rank)
        check_over("Tucker", self.over)
        if self.factors is None:
            return
        names = self.factors.split() if isinstance(self.factors, str) else []
        if not names or len(set(names)) < len(names):
            raise SpecError(
                f"Tucker was given factors={shown(self.factors)}; name each factored mode once, such as 'out in', or None."
            )


@dataclass(frozen=True)
class TensorTrain:
    """A chain of cores, one a mode: ``T = G_1[m1 b1] G_2[b1 m2 b2] ... G_M[b m_M]``.

    Args:
        rank: the size of the bonds, one for all or a tuple of M - 1.
        over: what is done with a rank that adds nothing, see `Tucker`.
    """

    rank: int | tuple[int, ...]
    over: Over = "refuse"

    def __post_init__(self) -> None:
        check_ranks("TensorTrain", self.rank)
        check_over("TensorTrain", self.over)


def _check_parts(owner: str, parts: tuple[object, ...], also: tuple[type, ...] = ()) -> None:
    if len(parts) < 1:
        raise SpecError(f"{owner} was given no part; give it at least one, such as {owner}(CP(4), CP(4)).")
    for part in parts:
        if not isinstance(part, (*PARTS, *also)):
            names = ", ".join(p.__name__ for p in (*PARTS, *also))
            raise SpecError(f"{owner} was given {shown(part)}; a part is one of {names}.")
    if len(parts) > MAX_PARTS:
        raise SpecError(f"{owner} was given {len(parts)} parts; at most {MAX_PARTS} are taken.")
    # Each part was counted when it was made, so this walks over no more than MAX_PARTS times MAX_LEAVES.
    levels, leaves = zip(*map(_extent, parts), strict=True)
    if 1 + max(levels) > MAX_DEPTH:
        raise SpecError(f"{owner} nests deeper than {MAX_DEPTH} levels; write it flatter.")
    if sum(leaves) > MAX_LEAVES:
        raise SpecError(f"{owner} holds {sum(leaves):,} parts in its parts; at most {MAX_LEAVES} are taken. Declare fewer.")


def _extent(part: object) -> tuple[int, int]:
    """Levels of nesting below and with a part, and how many parts in it are not products."""
    if isinstance(part, Frozen):
        return _extent(part.part)
    if not isinstance(part, Kronecker | Hadamard | Sum):
        return 1, 1
    levels, leaves = zip(*map(_extent, part.parts), strict=True)
    return 1 + max(levels), sum(leaves)


@dataclass(frozen=True, init=False, repr=False)
class Kronecker(Several):
    """The Kronecker product of its parts: each mode's size is split into one factor a part.

    Args:
        parts: the K parts, the slowest index first, as in ``numpy.kron(a, b)``.
        factor: for two parts, the wanted first size (PEFT's `decompose_factor`); -1 splits most evenly.
        crop: take sides that do not divide a mode: 50 lies in 7 x 8, and what is above 50 is cut.
    """

    parts: tuple[Part, ...]
    factor: int = -1
    crop: bool = False

    def __init__(self, *parts: Part, factor: int = -1, crop: bool = False) -> None:
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "factor", factor)
        object.__setattr__(self, "crop", crop)
        check_flag("Kronecker", "crop", crop)
        _check_parts("Kronecker", self.parts)
        if not isinstance(factor, int) or isinstance(factor, bool) or (factor != -1 and factor < 1):
            raise SpecError(f"Kronecker was given factor={shown(factor)}; give a whole number of at least 1, or -1.")
        if factor != -1 and len(parts) != 2:
            raise SpecError(f"Kronecker was given factor={factor} for {len(parts)} parts; a factor splits in two.")


@dataclass(frozen=True, init=False, repr=False)
class Hadamard(Several):
    """The elementwise product of its parts, all over the same modes.

    Args:
        parts: two or more parts.
    """

    parts: tuple[Part, ...]

    def __init__(self, *parts: Part) -> None:
        object.__setattr__(self, "parts", tuple(parts))
        _check_parts("Hadamard", self.parts)


@dataclass(frozen=True)
class Frozen:
    """In a `Sum`, a frozen copy of another of its parts at that part's first values; their weights are opposite.

    So the two cancel at the start, and no node is at zero: ``Sum(net, Frozen(net), weights=(1, -1))`` is QuanTA's form.

    Args:
        part: the part of the sum that it copies.
    """

    part: Part

    def __post_init__(self) -> None:
        if not isinstance(self.part, PARTS):
            raise SpecError(f"Frozen was given {shown(self.part)}; give a part of the sum that it stands in, such as CP(4).")


@dataclass(frozen=True, init=False, repr=False)
class Sum(Several):
    """The sum of its parts, all over the same modes; within a product the other factors are those of every term.

    Each part is contracted by itself, at its own best path.

    Args:
        parts: one or more parts, any of them the `Frozen` copy of another.
        weights: a number that each part is multiplied by, -1 for a difference; None for ones.

    Raises:
        SpecError: no parts, not as many finite weights, none of them 0, or a copy of what is not there at the opposite weight.
    """

    parts: tuple[Part | Frozen, ...]
    weights: tuple[float, ...] | None = None

    def __init__(self, *parts: Part | Frozen, weights: Sequence[float] | None = None) -> None:
        object.__setattr__(self, "parts", tuple(parts))
        _check_parts("Sum", self.parts, (Frozen,))
        if weights is not None:
            if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != len(self.parts):
                raise SpecError(f"Sum was given weights={shown(weights)} for {len(self.parts)} parts; give one number each.")
            for weight in weights:
                check_number("Sum", "weights", weight, MAX_SCALE)
                if weight == 0:
                    raise SpecError("Sum was given a weight of 0, by which a part would be nothing; leave the part out.")
            weights = tuple(float(weight) for weight in weights)
        object.__setattr__(self, "weights", weights)
        for k, part in enumerate(self.parts):
            if isinstance(part, Frozen):
                trained = [j for j, other in enumerate(self.parts) if other == part.part]
                if len(trained) != 1 or self.parts.count(part) != 1 or weights is None or weights[trained[0]] != -weights[k]:
                    raise SpecError(
                        f"Sum was given {shown(part)}; it stands once beside the very part that it copies, with the opposite "
                        "weight, as in Sum(net, Frozen(net), weights=(1, -1))."
                    )


@dataclass(frozen=True, init=False, repr=False)
class Network(Notation):
    """Any tensor network, in index notation.

    Args:
        modes: the modes of dW in the fold's order, einops-like; parentheses split a mode: ``"(o1 o2) (i1 i2)"``.
        sizes: sizes of bonds, and of split modes where the even split is not wanted. The name of another index makes a bond
            as large as that, which is known when the adapter is attached: ``{"x": "i1"}``; -1 gives one index of a split mode
            the least side of its even split, which is otherwise the first's.
        nodes: each keyword names a node; its value is its indices, or a `Node` where more is to be said.
        crop: take sizes whose product is above a mode's: dW is cut from the network's tensor. So
            ``Network("(o1 o2) i", {"o1": 7, "o2": 8}, ..., crop=True)`` does for 50 outputs. No node may be called crop.

    An index on two nodes is a bond, on more (or on several nodes and open) a hyperindex.

    Raises:
        SpecError: an unknown, dangling or unsized index, an open index on no node, a name used twice,
            no trainable node, or more than one node at zero.
    """

    modes: str
    nodes: tuple[tuple[str, Node], ...]
    sizes: tuple[tuple[str, int | str], ...]
    crop: bool = False

    def __new__(cls, /, *given: object, **named: object) -> Self:
        """An error in words for what Python would call an argument given twice."""
        taken = [name for name, place in (("self", 0), ("modes", 1), ("sizes", 2)) if name in named and len(given) >= place]
        if taken:
            raise SpecError(f"a Network's node cannot be named '{taken[0]}', which is an argument of it; choose another name.")
        return super().__new__(cls)

    def __init__(
        self, modes: str, sizes: Mapping[str, int | str] | None = None, *, crop: bool | str | Node = False, **nodes: str | Node
    ) -> None:
        # Typed as nodes are too, so that type checkers take Network(modes, sizes, **nodes).
        check_flag("Network", "crop", crop)
        if len(nodes) > MAX_NODES:
            raise SpecError(f"Network was given {len(nodes)} nodes; at most {MAX_NODES} are taken.")
        if not isinstance(sizes or {}, Mapping) or not all(isinstance(k, str) for k in sizes or {}):
            raise SpecError(f"Network was given sizes={shown(sizes)}; give a dict such as {{'r': 8}}.")
        made = tuple((name, n if isinstance(n, Node) else Node(n)) for name, n in nodes.items())
        object.__setattr__(self, "modes", modes)
        object.__setattr__(self, "nodes", made)
        object.__setattr__(self, "sizes", tuple(sorted((sizes or {}).items())))
        object.__setattr__(self, "crop", crop)
        _check_network(self)

    @property
    def mode_groups(self) -> tuple[tuple[str, ...], ...]:
        """The open indices, one tuple a mode."""
        return parse_modes(self.modes)

    @property
    def known(self) -> dict[str, int]:
        """The sizes that are said in numbers."""
        return {index: size for index, size in self.sizes if isinstance(size, int) and size > 0}

    @property
    def alike(self) -> dict[str, str]:
        """Bonds that are as large as another index, which they name."""
        return {index: size for index, size in self.sizes if isinstance(size, str)}


def _check_network(network: Network) -> None:
    places = Counter(i for _, node in network.nodes for i in node.index_names)
    if places.total() > MAX_PLACES:
        raise SpecError(f"Network was given {places.total():,} indices on its nodes; at most {MAX_PLACES:,} are taken.")
    open_indices = Counter(i for group in network.mode_groups for i in group)
    for index, count in open_indices.items():
        if count > 1:
            raise SpecError(f"Network modes '{network.modes:.80}' name the index '{index}' twice; use two names.")
        if index not in places:
            raise SpecError(
                f"Network modes '{network.modes:.80}' name the open index '{index}', which is on no node; "
                "put it on a node or leave it out."
            )
    for name, node in network.nodes:
        if not NAME.fullmatch(name):
            raise SpecError(f"Network was given a node named {shown(name)}; a name is a letter, then letters, digits, '_'.")
        for index in node.index_names:
            if index not in open_indices and places[index] < 2:
                raise SpecError(
                    f"node {name}='{node.indices}' has the index '{index}', which is on no other node and not a mode; "
                    f"modes are '{network.modes}'. Put it on a second node, or leave it out."
                )
    _check_sizes(network, set(open_indices), set(places))
    if not any(node.trainable for _, node in network.nodes):
        raise SpecError(f"Network '{network.modes}' has no trainable node; let at least one be trainable.")
    zeros = [name for name, node in network.nodes if node.init == "zeros" and (node.map is None or node.map.from_zero)]
    if len(zeros) > 1:
        raise SpecError(f"Network starts {' and '.join(zeros)} at zero; exactly one node may, or none ever trains.")


def _check_sizes(network: Network, open_indices: set[str], places: set[str]) -> None:
    for index, size in network.sizes:
        if index not in places:
            known = ", ".join(sorted(places))
            raise SpecError(f"Network sizes name the index '{index}', which is on no node; indices are {known}.")
        if isinstance(size, str):
            if index in open_indices or size not in places or size in network.alike:
                raise SpecError(
                    f"Network sizes say that '{index}' is as large as '{size:.80}'; a bond may be as large as an index of a "
                    "mode, or as a bond whose size is a number."
                )
        elif isinstance(size, int) and size == -1:
            _check_least(network, index)
        else:
            check_rank(f"Network index '{index}'", size)
    unsized = sorted(places - open_indices - {index for index, _ in network.sizes})
    if unsized:
        raise SpecError(f"Network bond '{unsized[0]}' has no size; say sizes={{'{unsized[0]}': 8}}.")


def _check_least(network: Network, index: str) -> None:
    """Raise unless an index of size -1 is the only one of its mode, and not alone in it."""
    group = next((group for group in network.mode_groups if index in group), ())
    if len(group) < 2 or sum(size == -1 for other, size in network.sizes if other in group) > 1:
        raise SpecError(
            f"Network sizes say -1 for '{index}', the least side of a mode's even split; say so of one index of a mode that is "
            "split, such as '(o1 o2)'."
        )


Part = Dense | Base | CP | Tucker | TensorTrain | Kronecker | Hadamard | Sum | Network
PARTS = (Dense, Base, CP, Tucker, TensorTrain, Kronecker, Hadamard, Sum, Network)


def inner_parts(part: Part) -> tuple[Part, ...]:
    """The parts that a product or a sum is made of, also where it has frozen copies of them; none of any other part."""
    own = part.parts if isinstance(part, Kronecker | Hadamard | Sum) else ()
    return tuple(p.part if isinstance(p, Frozen) else p for p in own)


def reference_rank(part: Part) -> int | None:
    """The rank that `alpha` is divided by: the largest rank declared in the part, None where none is."""
    if isinstance(part, Kronecker | Hadamard | Sum):
        return max((r for r in map(reference_rank, inner_parts(part)) if r is not None), default=None)
    if isinstance(part, Dense | Base | Network):
        return None
    return max(part.rank) if isinstance(part.rank, tuple) else part.rank
