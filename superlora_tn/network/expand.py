"""From a declared part and sized modes to a graph: parts expand to nodes, and the finest digits of the modes get names.

An *axis* is a run of digits of a mode's index in mixed radix: ``(root, stride, size)``. Kronecker splits an axis
into finer ones; where several parts split the same mode, the graph's indices are the common refinement, and a node
that does not split a mode just carries several indices in a row. Sizes of 1 carry no index at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import singledispatch

from superlora_tn.declare.bounds import KEPT_NODES, MAX_GRAPH_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.declare.fold import KERNEL, FlatGroup, Group, Mode, factorise
from superlora_tn.declare.node_maps import Same, Spread
from superlora_tn.declare.parts import (
    BASED,
    CP,
    GROUP,
    TOKEN,
    Base,
    Dense,
    Frozen,
    Hadamard,
    Kronecker,
    Network,
    Part,
    SpecError,
    Sum,
    TensorTrain,
    Tucker,
)
from superlora_tn.network.axes import Axis as Axis
from superlora_tn.network.axes import refine, sides_above
from superlora_tn.network.based import check_based
from superlora_tn.network.graph import Graph, GraphNode, Term
from superlora_tn.network.terms import Draft, place_zeros, start_at_zero, terms_of


@kept(4096, KEPT_NODES, lambda graph, *_, **__: len(graph.nodes))
def lower(part: Part, modes: tuple[Mode, ...], batch: int = 1) -> Graph:
    """Give a part sizes: the graph whose contraction, modes in order, is the tensor of dW.

    Args:
        part: the declared network.
        modes: the sized modes, in order.
        batch: groups of a flat fold; every node gets one slice a group.

    Raises:
        SpecError: ranks above their bound, modes that do not split as declared, names used twice, nothing trainable.
    """
    axes = tuple(Axis(m.name, 1, m.size, m.whole) for m in modes)
    drafts = expand(part, axes)
    named = list(modes)
    summed, flat = any(d.branch for d in drafts), any(mode.role == "flat" for mode in modes)
    drafts = drafts if summed else start_at_zero(drafts)
    if flat and any(a.padded for d in drafts for a in d.axes):
        raise SpecError("crop=True belongs to a physical fold; a flat fold pads and crops its whole vector already.")
    if any(d.map is not None for d in drafts):
        if flat:
            raise SpecError("a node with a map belongs to a physical fold; a flat fold cuts through its axes.")
        _check_maps(drafts)
    if batch > 1:
        drafts = [replace(d, axes=(Axis(GROUP, 1, batch), *d.axes)) for d in drafts]
        named.insert(0, Mode(GROUP, batch, "member"))
    if len(drafts) > MAX_GRAPH_NODES:
        raise SpecError(
            f"the network has {len(drafts):,} nodes over {len(modes)} modes; at most {MAX_GRAPH_NODES:,} are taken. "
            "Declare fewer parts, or a fold of a lower order."
        )
    if summed:
        return _lower_terms(drafts, named)
    graph = _graph(drafts, named)
    return (
        graph
        if [mode for mode, _ in graph.modes] == named
        else _whole(graph.nodes, named, [_term(1.0, range(len(drafts)), graph, named)])
    )


def _term(weight: float, numbers: Sequence[int], graph: Graph, named: Sequence[Mode]) -> Term:
    """One network of a sum over these modes, some of which may be cropped from the network's."""
    pairs = zip(named, (mode for mode, _ in graph.modes), strict=True)
    return Term(weight, tuple(numbers), graph, tuple((own.name, own.size) for own, larger in pairs if own != larger))


def _whole(nodes: tuple[GraphNode, ...], named: Sequence[Mode], terms: Sequence[Term]) -> Graph:
    """A sum, or one network that is cropped."""
    return Graph(nodes, (), tuple((mode, ()) for mode in named), tuple(terms))


def _lower_terms(drafts: list[Draft], named: list[Mode]) -> Graph:
    """A sum: each term is a graph of its own, and a node may stand in several."""
    nodes, terms = dict[int, GraphNode](), list[Term]()
    found = terms_of([d.branch for d in drafts])
    placed = place_zeros(drafts, [numbers for _, numbers in found])
    for weight, numbers in found:
        graph = _graph([placed[k] for k in numbers], named)
        nodes |= dict(zip(numbers, graph.nodes, strict=True))
        terms.append(_term(weight, numbers, graph, named))
    if len(terms) == 1 and terms[0].weight == 1 and [mode for mode, _ in terms[0].graph.modes] == named:
        return terms[0].graph
    whole = tuple(replace(nodes[k], trainable=d.trainable) for k, d in enumerate(drafts))
    _check_names([n.name for n in whole])
    return _whole(whole, named, terms)


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise SpecError(f"two nodes are named '{twice}'; give each node a name of its own.")


def _grown(drafts: Sequence[Draft], modes: Sequence[Mode]) -> list[Mode]:
    """The modes, as large as those that a network's nodes have before they are cropped."""
    padded: dict[str, set[int]] = {}
    for axis in (a for d in drafts for a in d.axes):
        padded.setdefault(axis.root, set()).add(axis.padded)
    for mode in modes:
        if len(several := padded.get(mode.name, set())) > 1:
            raise SpecError(
                f"parts of one product crop the mode '{mode.name}' of size {mode.size} from sizes that differ "
                f"({', '.join(str(s or mode.size) for s in sorted(several))}); give them the same split, or none crop=True."
            )
    return [replace(m, size=max(padded.get(m.name, {0})) or m.size) for m in modes]


def _graph(drafts: list[Draft], named: list[Mode]) -> Graph:
    """One network."""
    _check_names([d.name for d in drafts])
    named = _grown(drafts, named)
    fine = refine([a for d in drafts for a in d.axes] + [Axis(m.name, 1, m.size) for m in named])
    nodes = tuple(
        # A copy is planned like what it copies, so that the two cancel to the last bit.
        GraphNode(
            d.name,
            tuple(a.size for a in d.axes),
            tuple(fine[a] for a in d.axes),
            d.init,
            d.trainable or d.copies is not None,
            d.map,
            d.copies,
        )
        for d in drafts
    )
    sizes = {name: a.size for a, names_ in fine.items() if len(names_) == 1 for name in names_}
    indices = dict.fromkeys(i for names_ in fine.values() for i in names_)
    graph = Graph(
        nodes,
        tuple((i, sizes[i]) for i in indices),
        tuple((m, fine[Axis(m.name, 1, m.size)]) for m in named),
    )
    for node in nodes:
        if node.init in BASED:
            if any(a.padded for d in drafts for a in d.axes):
                raise SpecError(f"the node '{node.name}' holds a weight's '{node.init}', of which nothing can be cropped.")
            check_based(graph, node)
    return graph


def _check_maps(drafts: list[Draft]) -> None:
    """Raise unless the maps fit their nodes, and the nodes that they share."""
    named = {d.name: d for d in drafts}
    for d in drafts:
        if d.map is None:
            continue
        sizes = tuple(a.size for a in d.axes)
        d.map.stored(sizes)
        if d.map.of is None:
            continue
        other = named.get(d.map.of)
        if isinstance(d.map, Spread):
            fits = (
                other is not None and isinstance(other.map, Spread) and (other.map.of, other.map.count) == (None, d.map.count)
            )
        else:
            fits = other is not None and other.map is None and tuple(a.size for a in other.axes) == sizes
        if not fits or (other is not None and other.branch != d.branch):
            raise SpecError(
                f"the node '{d.name}' of shape {sizes} is made of '{d.map.of}', which is no such node; name one "
                + ("with a Spread of as many numbers." if isinstance(d.map, Spread) else "of its shape that has no map.")
            )


def lower_group(part: Part, group: Group) -> Graph:
    """The graph of one group of a fold."""
    return lower(part, group.modes, group.groups if isinstance(group, FlatGroup) else 1)


@singledispatch
def expand(part: Part, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    """The nodes of a part over the given axes. A new kind of part registers itself here."""
    raise SpecError(f"{part!r} is not a part of a network; register it with graph.expand.")


@expand.register
def _(part: Dense, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    return [Draft(f"{prefix}weight", axes, zero=True)]


@expand.register
def _(part: Base, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    return [Draft(f"{prefix}base", axes, "base", trainable=False)]


def _within(
    part: CP | Tucker | TensorTrain,
    rank: int | tuple[int, ...],
    bounds: Sequence[int],
    useful: Sequence[int],
    sizes: Sequence[int],
) -> tuple[int, ...]:
    """The rank of each bond; where one is above its bound, as the part says in `over`.

    Args:
        part: whose ranks these are.
        rank: one for all bonds, or one each.
        bounds: above which a bond's rank is refused; one rank for all is where it is above the largest of them.
        useful: from which on a higher rank adds nothing.
        sizes: of the modes, for the message.
    """
    ranks = rank if isinstance(rank, tuple) else (rank,) * len(bounds)
    if part.over == "cap":
        return tuple(map(min, ranks, useful))
    limits = bounds if isinstance(rank, tuple) else [max(bounds, default=rank)] * len(bounds)
    for one, limit in zip(ranks, limits, strict=True):
        if one > limit and part.over == "refuse":
            raise SpecError(
                f"{type(part).__name__} was given rank={one} over modes of sizes {tuple(sizes)}; there a rank above {limit} "
                f"adds nothing. Choose rank <= {limit}; where the part itself is declared, "
                f"{type(part).__name__}({one}, over='cap') takes it."
            )
    return ranks


def _zero_axis(axes: tuple[Axis, ...]) -> Axis:
    """The mode whose factor starts at zero: `out` as in LoRA, else the first."""
    return next((a for a in axes if a.root == "out"), axes[0])


@expand.register
def _(part: CP, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    sizes = [a.size for a in axes]
    if part.dense_if_large and part.rank >= max(a.size // a.whole for a in axes) / 2:
        return expand(Dense(), axes, prefix)
    bound = [math.prod(sizes) // max(sizes)]
    (rank,) = _within(part, part.rank, bound, bound, sizes)
    if len(axes) == 1:
        return [Draft(f"{prefix}factor_{axes[0].root}", axes, zero=True)]
    bond = Axis(f"{prefix}r", 1, rank)
    return [Draft(f"{prefix}factor_{a.root}", (a, bond), zero=a == _zero_axis(axes)) for a in axes]


@expand.register
def _(part: Tucker, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    names = [a.root for a in axes]
    wanted = names if part.factors is None else part.factors.split()
    for name in wanted:
        if name not in names:
            raise SpecError(f"Tucker was given factors='{part.factors}', but there is no mode '{name}'; modes are {names}.")
    rank = part.rank
    if isinstance(rank, tuple) and len(rank) != len(wanted):
        raise SpecError(f"Tucker was given {len(rank)} ranks for the {len(wanted)} modes {wanted}; give one each.")
    factored = [a for a in axes if a.root in wanted]
    if isinstance(rank, tuple):
        rank = tuple(rank[wanted.index(a.root)] for a in factored)  # ranks are in the order the factors were named
    sizes, whole = [a.size for a in factored], math.prod(a.size for a in axes)
    # A factor's columns span no more than the tensor's unfolding has, of which the other side are all other modes.
    ranks = _within(part, rank, sizes, [min(s, whole // s) for s in sizes], sizes)
    bonds = {a: Axis(f"{prefix}r_{a.root}", 1, r) for a, r in zip(factored, ranks, strict=True)}
    core = Draft(f"{prefix}core", tuple(bonds.get(a, a) for a in axes), zero=True)
    return [core, *(Draft(f"{prefix}factor_{a.root}", (a, bonds[a])) for a in factored)]


@expand.register
def _(part: TensorTrain, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    count = len(axes) - 1
    if isinstance(part.rank, tuple) and len(part.rank) != count:
        raise SpecError(f"TensorTrain was given {len(part.rank)} ranks for {len(axes)} modes; give {count}, or one number.")
    sizes = [a.size for a in axes]
    bounds = [min(math.prod(sizes[: k + 1]), math.prod(sizes[k + 1 :])) for k in range(count)]
    ranks = _within(part, part.rank, bounds, bounds, sizes)
    bonds = [Axis(f"{prefix}b{k + 1}", 1, r) for k, r in enumerate(ranks)]
    zero = _zero_axis(axes)
    return [
        Draft(f"{prefix}core_{a.root}", (*bonds[max(k - 1, 0) : k], a, *bonds[k : k + 1]), zero=a == zero)
        for k, a in enumerate(axes)
    ]


@expand.register
def _(part: Kronecker, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    # A kernel stays whole, with the last part, which holds the fastest channels.
    count, factor = len(part.parts), part.factor
    splits = {a: a.cropped(count, factor) if part.crop else a.factors(count, factor) for a in axes if a.root not in KERNEL}
    drafts = []
    for k, inner in enumerate(part.parts):
        last = k == len(part.parts) - 1
        own = tuple(splits[a][k] if a in splits else a for a in axes if a in splits or last)
        drafts += [replace(d, zero=d.zero and k == 0) for d in expand(inner, own, f"{prefix}k{k + 1}_")]
    return drafts


@expand.register
def _(part: Hadamard, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    drafts = []
    for k, inner in enumerate(part.parts):
        last = k == len(part.parts) - 1  # LoHa starts its second product at zero
        drafts += [replace(d, zero=d.zero and last) for d in expand(inner, axes, f"{prefix}h{k + 1}_")]
    return drafts


@expand.register
def _(part: Sum, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    drafts = []
    for k, (inner, weight) in enumerate(zip(part.parts, part.weights or (1.0,) * len(part.parts), strict=True)):
        own = expand(inner.part if isinstance(inner, Frozen) else inner, axes, f"{prefix}t{k + 1}_")
        if isinstance(inner, Frozen):
            source, length = f"{prefix}t{part.parts.index(inner.part) + 1}_", len(f"{prefix}t{k + 1}_")
            own = [replace(d, trainable=False, zero=False, copies=f"{source}{d.name[length:]}") for d in own]
        departs = (prefix,) if isinstance(inner, Frozen) or Frozen(inner) in part.parts else ()
        drafts += [replace(d, branch=((prefix, k, weight), *d.branch), departs=departs + d.departs) for d in own]
    return drafts


@expand.register
def _(part: Network, axes: tuple[Axis, ...], prefix: str = "") -> list[Draft]:
    groups = part.mode_groups
    if len(groups) != len(axes):
        raise SpecError(
            f"Network '{part.modes}' has {len(groups)} modes, but the fold has {len(axes)} "
            f"({', '.join(f'{a.root}={a.size}' for a in axes)}); write one group of indices a mode."
        )
    known, places = part.known, dict[str, Axis]()
    for group, axis in zip(groups, axes, strict=True):
        sizes = _split_sizes(part, group, axis, known)
        places |= dict(zip(group, axis.grown(math.prod(sizes)).split(sizes), strict=True))
    sized = known | {index: axis.size for index, axis in places.items()}
    sized |= {index: sized[other] for index, other in part.alike.items()}
    bonds = {i: Axis(_own_name(f"{prefix}{i}", sized), 1, sized[i]) for i, _ in part.sizes if i not in places}
    _check_collisions(bonds, axes)
    first = next((name for name, node in part.nodes if node.trainable and (node.map is None or node.map.from_zero)), None)
    at = {**bonds, **places}
    drafts = []
    for name, node in part.nodes:
        own = node.map
        if isinstance(own, Same | Spread) and own.of is not None:
            own = replace(own, of=f"{prefix}{own.of}")
        axes_ = tuple(at[i] for i in node.index_names)
        drafts.append(Draft(f"{prefix}{name}", axes_, node.init, node.trainable, name == first, own))
    return drafts


def _own_name(bond: str, known: Mapping[str, int]) -> str:
    """The bond's name, with underscores where it is one of the library's own indices."""
    while bond in (TOKEN, GROUP):
        bond += "_"
        while bond in known:
            bond += "_"
    return bond


def _check_collisions(bonds: Mapping[str, Axis], axes: tuple[Axis, ...]) -> None:
    """A bond may not carry the name of a mode, or the two would become one index."""
    roots = {a.root for a in axes}
    for bond in bonds.values():
        if bond.root in roots:
            raise SpecError(f"Network names a bond '{bond.root}', which is a mode of the fold; call the bond otherwise.")


def _split_sizes(part: Network, group: tuple[str, ...], axis: Axis, known: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes of a mode's indices: those declared, and the most even split of what is left."""
    given = math.prod(known.get(i, 1) for i in group)
    # The sides of an even split ascend, so that the first is the least.
    free = sorted((i for i in group if i not in known), key=lambda i: (i, -1) not in part.sizes)
    if part.crop and (free or given >= axis.size):
        rest = dict(zip(free, sides_above(-(-axis.size // given), len(free)), strict=True)) if free else {}
        return tuple({**known, **rest}[i] for i in group)
    if axis.size % given or (not free and given != axis.size):
        declared = ", ".join(f"{i}={known[i]}" for i in group if i in known)
        raise SpecError(
            f"Network '{part.modes}' splits the mode '{axis.root}' of size {axis.size} as ({' '.join(group)}) with {declared}, "
            f"which does not multiply to {axis.size}; choose sizes that do, or larger ones and crop=True."
        )
    rest = dict(zip(free, factorise(axis.size // given, len(free)), strict=True)) if free else {}
    found = {**known, **rest}
    return tuple(found[i] for i in group)
