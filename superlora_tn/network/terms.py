"""Which terms a declaration with sums has: products written out, each term with the nodes that stand in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from superlora_tn.declare.bounds import MAX_TERMS
from superlora_tn.declare.node_maps import NodeMap
from superlora_tn.declare.parts import SpecError
from superlora_tn.network.axes import Axis

# Which sum (by the prefix of its nodes), which of its parts, and that part's weight: from the outermost sum inwards.
Branch = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Draft:
    """A node while lowering: axes instead of indices.

    `zero` marks the part's own choice of the node that starts at 0; `branch` says in which parts of sums it stands, and
    `departs` which of these sums a frozen copy cancels at the start. A node that `copies` another starts at its first values.
    """

    name: str
    axes: tuple[Axis, ...]
    init: str = "auto"
    trainable: bool = True
    zero: bool = False
    map: NodeMap | None = None
    branch: Branch = ()
    copies: str | None = None
    departs: tuple[str, ...] = ()

    @property
    def at_zero(self) -> bool:
        """Whether a stored tensor of zeros makes the node zero."""
        return self.map is None or self.map.from_zero


def terms_of(branches: Sequence[Branch]) -> list[tuple[float, list[int]]]:
    """Weight and numbers of the nodes of each term.

    Args:
        branches: of each node, in order; empty for one that no sum holds.

    Raises:
        SpecError: more terms than are taken.
    """
    found = _terms(list(enumerate(branches)))
    return [(weight, sorted(numbers)) for weight, numbers in found]


def _terms(nodes: list[tuple[int, Branch]]) -> list[tuple[float, list[int]]]:
    fixed = [number for number, branch in nodes if not branch]
    sums: dict[str, dict[tuple[int, float], list[tuple[int, Branch]]]] = {}
    for number, branch in nodes:
        if branch:
            name, part, weight = branch[0]
            sums.setdefault(name, {}).setdefault((part, weight), []).append((number, branch[1:]))
    choices = [
        [(weight * inner, own) for (_, weight), held in parts.items() for inner, own in _terms(held)] for parts in sums.values()
    ]
    count = prod(map(len, choices))
    if count > MAX_TERMS:
        raise SpecError(f"the sums in the declaration multiply out to {count:,} terms or more; at most {MAX_TERMS} are taken.")
    return [
        (prod(weight for weight, _ in chosen), [*fixed, *(number for _, own in chosen for number in own)])
        for chosen in product(*choices)
    ]


def starts(drafts: Sequence[Draft]) -> list[str]:
    """What brings a network to zero at the start, in words: its nodes at zero by name, and sums with a frozen copy."""
    departed = ["a sum with a frozen copy"] * any(d.departs for d in drafts)
    return [d.name for d in drafts if d.init == "zeros" and d.at_zero] + departed


def place_zeros(drafts: Sequence[Draft], terms: Sequence[Sequence[int]]) -> list[Draft]:
    """`start_at_zero` for each term of a sum; those that say where they start come first, and the others choose around them.

    Args:
        drafts: the nodes of all terms.
        terms: the numbers of each term's nodes.

    Raises:
        SpecError: a term would have two nodes at zero.
    """
    placed = list(drafts)
    for numbers in sorted(terms, key=lambda numbers: not starts([drafts[k] for k in numbers])):
        started = {k for other in terms if starts([placed[j] for j in other]) for k in other}
        own = [replace(placed[k], branch=()) for k in numbers]
        for k, draft in zip(numbers, start_at_zero(own, {drafts[j].name for j in started}), strict=True):
            placed[k] = replace(draft, branch=drafts[k].branch)
    for numbers in terms:
        if len(names := starts([placed[k] for k in numbers])) > 1:
            raise SpecError(
                f"{' and '.join(names)} of one term start at zero, or it never trains; declare which one does, by init='zeros'."
            )
    return placed


def start_at_zero(drafts: list[Draft], taken: Collection[str] = ()) -> list[Draft]:
    """Keep exactly one node of a network at zero: the one declared so, else the part's own choice.

    None of a term that a sum cancels at the start.

    Args:
        drafts: the nodes.
        taken: names of nodes that are chosen only where no other can be, as terms that start at zero already hold them.
    """
    if not any(d.trainable or d.copies for d in drafts):
        raise SpecError("the network has no trainable node; let at least one be trainable.")
    able = [d for d in drafts if d.at_zero]
    declared = [d.name for d in able if d.init == "zeros"]
    still = next((d.name for d in able if d.init == "zeros" and not d.trainable), None)
    if still is not None:
        raise SpecError(f"the frozen node '{still}' is zero, so dW would stay zero; give it another init, or train it.")
    if len(declared) > 1:
        raise SpecError(f"{' and '.join(declared)} start at zero; exactly one node may, or none ever trains.")
    vanishing = [d.name for d in drafts if d.map is not None and d.map.vanishes and d.init == "auto"]
    if vanishing and declared:
        raise SpecError(f"{' and '.join(vanishing + declared)} start at zero; exactly one node may, or none ever trains.")
    cancelled = {name for d in drafts for name in d.departs}
    if cancelled:
        if declared or vanishing or len(cancelled) > 1:
            names = " and ".join([*declared, *vanishing, *["a sum with a frozen copy"] * len(cancelled)])
            raise SpecError(f"{names} start at zero; exactly one may, or none ever trains.")
        return drafts
    able = [d for d in able if d.trainable]
    if vanishing or not able:
        return drafts  # or functions that are never zero, as rotations: for a join that starts elsewhere
    able = [d for d in able if d.name not in taken] or able
    chosen = declared[0] if declared else next((d for d in able if d.zero), able[0]).name
    return [replace(d, init="zeros") if d.name == chosen else d for d in drafts]
