"""Searches of a contraction tree: the best way to each set of tensors, from the best ways to two halves of it.

Which sets meet does not depend on any price, so their number is known before the first is priced. All sets that hang together
make the search exact; where they are too many, the runs of tensors in a row are few enough.

Sets of tensors and of indices are whole numbers, one bit a member.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from superlora_tn.declare.bounds import TRIED_TIMES

# A tensor's number, or two trees that are contracted with each other.
Tree = int | tuple["Tree", "Tree"]
# Two sets that may be contracted with each other.
Meeting = tuple[int, int]


class Prices(Protocol):
    """What it costs to contract two sets with each other, each made as the search has chosen by then."""

    def least(self, one: int, other: int) -> float:
        """No more than `seconds`, and found quickly."""

    def seconds(self, one: int, other: int) -> float:
        """The cost of two sets' meeting."""

    def choose(self, one: int, other: int) -> None:
        """Their union is made of these two from here on."""


@dataclass(frozen=True)
class Sets:
    """The sets of an equation's tensors.

    Attributes:
        terms: the indices of each tensor.
        output: those of the result.
        outer: whether sets may meet that share no index to be summed.
    """

    terms: tuple[int, ...]
    output: int
    outer: bool

    @cached_property
    def groups(self) -> list[frozenset[int]]:
        """The tensors that are searched together: all, or those between which there are indices to be summed."""
        if self.outer:
            return [frozenset(range(len(self.terms)))]
        groups, left = list[frozenset[int]](), set(range(len(self.terms)))
        while left:
            group, queue = set[int](), [left.pop()]
            while queue:
                one = queue.pop()
                group.add(one)
                near = {k for k in left if self.terms[k] & self.terms[one] & ~self.output}
                queue.extend(near)
                left -= near
            groups.append(frozenset(group))
        return groups

    def outside(self, members: int) -> int:
        """The indices of the tensors that are not in a set, and of the result."""
        found = self.output
        for k, term in enumerate(self.terms):
            if not members >> k & 1:
                found |= term
        return found

    def outward(self, members: int) -> int:
        """The indices of a set that are needed outside of it."""
        inside = 0
        for k, term in enumerate(self.terms):
            if members >> k & 1:
                inside |= term
        return inside & self.outside(members)

    def meetings(self, most: int) -> list[list[Meeting]] | None:
        """For each group all pairs of sets that may meet, small sets first; None where there are more than `most`."""
        found, left = list[list[Meeting]](), most
        for group in self.groups:
            own = self._meetings(group, left)
            if own is None:
                return None
            found.append(own)
            left -= len(own)
        return found

    def _meetings(self, group: frozenset[int], most: int) -> list[Meeting] | None:
        needed = {1 << k: self.outward(1 << k) for k in group}
        levels, found, tries = [list[int](), list(needed)], list[Meeting](), TRIED_TIMES * most
        for count in range(2, len(group) + 1):
            level = list[int]()
            for left, right in _pairs(levels, count):
                tries -= 1
                if tries < 0:
                    return None
                if left & right or not (self.outer or needed[left] & needed[right] & ~self.output):
                    continue
                if len(found) == most:
                    return None
                found.append((left, right))
                if left | right not in needed:
                    needed[left | right] = self.outward(left | right)
                    level.append(left | right)
            levels.append(level)
        return found


def _pairs(levels: Sequence[Sequence[int]], count: int) -> Iterator[Meeting]:
    """Two sets of `count` tensors together, each two once."""
    for few in range(1, count // 2 + 1):
        for left in levels[few]:
            for right in levels[count - few]:
                if 2 * few != count or left < right:
                    yield left, right


def runs(order: Sequence[int]) -> list[Meeting]:
    """All pairs of neighbouring runs of tensors that stand in a row: n**3 / 6 of n, whatever their indices."""
    count = len(order)
    ahead = [sum(1 << k for k in order[:end]) for end in range(count + 1)]
    return [
        (ahead[cut] - ahead[start], ahead[start + length] - ahead[cut])
        for length in range(2, count + 1)
        for start in range(count - length + 1)
        for cut in range(start + 1, start + length)
    ]


def leaves(tree: Tree) -> list[int]:
    """The tensors of a tree from left to right."""
    found, stack = list[int](), [tree]
    while stack:
        one = stack.pop()
        if isinstance(one, int):
            found.append(one)
        else:
            stack += [one[1], one[0]]
    return found


def cheapest(group: frozenset[int], met: Sequence[Meeting], prices: Prices) -> Tree:
    """The tree over all tensors of a group whose meetings cost the least together; the first where several do.

    Args:
        group: the tensors.
        met: which sets may meet, small ones first; together they make all of the group.
        prices: of meetings.
    """
    halves: dict[int, list[Meeting]] = {}
    for meeting in met:
        halves.setdefault(meeting[0] | meeting[1], []).append(meeting)
    cost, tree = dict.fromkeys((1 << k for k in group), 0.0), dict[int, Tree]({1 << k: k for k in group})
    for both, ways in halves.items():
        ranked = sorted((cost[a] + cost[b] + prices.least(a, b), k, a, b) for k, (a, b) in enumerate(ways))
        best = (float("inf"), len(ways), 0, 0)
        for least, k, a, b in ranked:
            if (least, k) > best[:2]:
                break
            best = min(best, (cost[a] + cost[b] + prices.seconds(a, b), k, a, b))
        cost[both], _, one, other = best
        tree[both] = (tree[one], tree[other])
        prices.choose(one, other)
    return tree[sum(1 << k for k in group)]


def sequence(tree: Tree, count: int) -> list[tuple[int, int]]:
    """The pairs to contract, in order; results are numbered from `count`, that of the tensors.

    The halves of a tree come in the order in which they stand, and in a pair tensors before results.
    """
    pairs, stack, done = list[tuple[int, int]](), list[tuple[Tree, bool]]([(tree, False)]), list[int]()
    while stack:
        one, ready = stack.pop()
        if isinstance(one, int):
            done.append(one)
        elif not ready:
            stack += [(one, True), (one[1], False), (one[0], False)]
        else:
            second, first = done.pop(), done.pop()
            done.append(count + len(pairs))
            pairs.append((second, first) if second < min(first, count) else (first, second))
    return pairs
