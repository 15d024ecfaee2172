"""Which terms a declaration with sums has: products written out, each term with the nodes that stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from superlora_tn.declare.bounds import MAX_TERMS
from superlora_tn.declare.parts import SpecError

# Which sum (by the prefix of its nodes), which of its parts, and that part's weight: from the outermost sum inwards.
Branch = tuple[tuple[str, int, float], ...]


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
