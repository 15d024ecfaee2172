"""The contraction path: an exact search on a price of our own, above its bounds a heuristic of opt_einsum's.

This is the only importer of opt_einsum but `plan`, which prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from heapq import heapify, heappop, heappush
from typing import Any

import opt_einsum as oe

from superlora_tn.contraction.exact import Sets, Tree, cheapest, leaves, runs, sequence
from superlora_tn.contraction.layout import FORMS, Equation, Indices, Step, best_orders, lay_out, volume
from superlora_tn.contraction.profile import ITEM, Device
from superlora_tn.declare.bounds import MAX_MEETINGS, MAX_ROW, OUTER_UP_TO
from superlora_tn.declare.checks import shown
from superlora_tn.declare.parts import TOKEN


class PlanError(ValueError):
    """No plan for what was asked."""


Optimizer = str | Callable[..., Any]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Task:
    """What a path is searched for.

    Attributes:
        terms: the indices of each operand.
        grads: whether each wants a gradient.
        output: the indices of the result.
        size: index -> size.
        device: the balance to price for.
        memory_limit: the largest allowed intermediate, in bytes.
    """

    terms: Sequence[Indices]
    grads: Sequence[bool]
    output: Indices
    size: Mapping[str, int]
    device: Device
    memory_limit: int | None

    @cached_property
    def bit(self) -> Mapping[str, int]:
        """Index -> the bit that it is in sets of indices."""
        return {name: 1 << k for k, name in enumerate(self.size)}

    @cached_property
    def sets(self) -> Sets:
        """The sets of its operands; outer products are looked at where there are few."""
        masks = tuple(sum(self.bit[i] for i in term) for term in self.terms)
        return Sets(masks, sum(self.bit[i] for i in self.output), outer=len(masks) <= OUTER_UP_TO)


def steps_of(
    equation: Equation, size: Mapping[str, int], device: Device, optimize: Optimizer, memory_limit: int | None
) -> tuple[Step, ...]:
    """Search a path, then the cheapest memory order of its intermediates."""
    inputs, output = equation.inputs, tuple(i for axis in equation.result for i in axis)
    pairs, alive, terms, trained = _without_scalars(equation, size)
    if len(alive) > 1:
        task = Task([terms[k] for k in alive], [trained[k] for k in alive], output, size, device, memory_limit)
        found, made = _search(task, optimize), len(inputs) + len(pairs) - len(alive)
        number = [*alive, *(made + k for k in range(len(alive), 2 * len(alive)))]
        pairs += [(number[a], number[b]) for a, b in found]
    return best_orders(tuple(pairs), inputs, equation.trained, output, size, device)


def _without_scalars(equation: Equation, size: Mapping[str, int]) -> tuple[Pairs, list[int], list[Indices], list[bool]]:
    """Tensors of one number join the smallest other one at once; a search would multiply them onto the final result.

    Returns:
        The pairs, the numbers of what is left, and indices and gradients by number.
    """
    terms, trained, pairs, gone = list(equation.inputs), list(equation.trained), Pairs(), set[int]()
    queue = [(not term, volume(term, size), k) for k, term in enumerate(terms)]
    heapify(queue)
    for scalar in [k for k, term in enumerate(terms) if not term]:
        if scalar in gone or len(terms) - len(gone) == 1:
            continue
        gone.add(scalar)
        while queue[0][2] in gone:
            heappop(queue)
        empty, extent, other = heappop(queue)
        gone.add(other)
        pairs.append((other, scalar))
        heappush(queue, (empty, extent, len(terms)))
        terms.append(terms[other])
        trained.append(trained[other] or trained[scalar])
    return pairs, [k for k in range(len(terms)) if k not in gone], terms, trained


def _search(task: Task, optimize: Optimizer) -> Pairs:
    """The pairs to contract; results are numbered behind the operands."""
    if optimize != "dp":
        return _asked(task, optimize)
    count = len(task.terms)
    if count > MAX_ROW:
        return _asked(task, "greedy")
    tree = _exact(task)
    greedy = _asked(task, "greedy")
    # Of each set the search knows one memory order, so greedy may be the cheaper one as it is laid out.
    rows = [] if tree is not None and task.sets.outer else _rows(task, leaves(_tree(greedy, count)))
    found = [cheapest(frozenset(row), runs(row), _Prices(task)) for row in rows]
    paths = [*(sequence(one, count) for one in (tree, *found) if one is not None), greedy]
    return min(paths, key=lambda pairs: _total(task, pairs))


def _asked(task: Task, optimize: Optimizer) -> Pairs:
    """The path of an optimizer of opt_einsum's, or of anything that is called like one."""
    symbol = {name: oe.get_symbol(k) for k, name in enumerate(task.size)}
    sizes = {symbol[name]: extent for name, extent in task.size.items()}
    find = optimize if callable(optimize) else _named(optimize)
    # Called with what all of them take: some of cotengra's have no place for opt_einsum's memory limit.
    path = find([frozenset(symbol[i] for i in t) for t in task.terms], frozenset(symbol[i] for i in task.output), sizes)
    alive, pairs = list(range(len(task.terms))), Pairs()
    for places in path:
        if len(places) != 2:
            raise PlanError(f"the optimizer {optimize!r} contracts {len(places)} tensors in one step; it must go pair by pair.")
        if len(set(places)) < 2 or not all(place in range(len(alive)) for place in places):
            raise PlanError(
                f"the optimizer {optimize!r} contracts the places {shown(tuple(places))} of {len(alive)} tensors; give two "
                f"different ones from 0 to {len(alive) - 1}. A result stands last, and what it was made of leaves the list."
            )
        first, second = (alive[place] for place in places)
        pairs.append((first, second))
        alive = [*(k for k in alive if k not in (first, second)), len(task.terms) + len(pairs) - 1]
    if len(alive) > 1:
        raise PlanError(
            f"the optimizer {optimize!r} leaves {len(alive)} of {len(task.terms)} tensors; its path must end in one."
        )
    return pairs


def _named(name: str) -> Callable[..., Any]:
    """The optimizer that opt_einsum has under a name."""
    try:
        found: Callable[..., Any] = oe.paths.get_path_fn(name)
    except (KeyError, TypeError, AttributeError) as error:  # an AttributeError: no string
        known = "auto, auto-hq, optimal, greedy, branch-all, branch-2, branch-1"
        raise PlanError(
            f"optimize={name!r} is no optimizer; give 'dp', a name of opt_einsum's ({known}), or an object."
        ) from error
    return found


def _exact(task: Task) -> Tree | None:
    """The cheapest tree on our price; None where there are too many to look at."""
    sets = task.sets
    met = sets.meetings(MAX_MEETINGS)
    if met is None:
        return None
    prices, trees = _Prices(task), list[tuple[int, Tree]]()
    for group, own in zip(sets.groups, met, strict=True):
        left = sets.outward(sum(1 << k for k in group))
        trees.append((prices.volume(left), cheapest(group, own, prices)))
    # Groups that share no index to be summed meet last, the smallest first.
    ordered: list[Tree] = [tree for _, tree in sorted(trees, key=lambda one: one[0])]
    return reduce(lambda one, other: (one, other), ordered)


def _rows(task: Task, row: list[int]) -> list[list[int]]:
    """Rows of operands in which good trees stand, beside the given one: as the result has their indices.

    Operands without an index of the result, such as a Tucker's core, come first or last: the others join them one by one.
    """
    place = {name: k for k, name in enumerate(task.output)}
    last, numbers = len(place), range(len(task.terms))
    key = [min((place[i] for i in term if i in place), default=last) for term in task.terms]
    rows = [row, sorted(numbers, key=key.__getitem__), sorted(numbers, key=lambda k: (key[k] < last, key[k]))]
    return [one for k, one in enumerate(rows) if one not in rows[:k]]


def _tree(pairs: Pairs, count: int) -> Tree:
    """The tree of pairs that are numbered behind `count` tensors."""
    trees: list[Tree] = list(range(count))
    for a, b in pairs:
        trees.append((trees[a], trees[b]))
    return trees[-1]


def _total(task: Task, pairs: Pairs) -> float:
    """The price of a path as it will be laid out."""
    steps = best_orders(pairs, task.terms, task.grads, task.output, task.size, task.device)
    too_large = sum(
        task.memory_limit is not None and volume(step.result, task.size) * ITEM > task.memory_limit for step in steps[:-1]
    )
    return sum(step.price(task.device) for step in steps) + 1e30 * too_large


class _Prices:
    """Seconds of a step as it will be laid out, with its gradients; see `exact.Prices`.

    `held` remembers the memory order of each set's best contraction, so that a path that tears a large tensor's axes apart
    pays for the permutation. An intermediate above the memory limit is priced out of reach rather than refused.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.sets, self.bit = task, task.sets, task.bit
        self.held = {1 << k: (term, grad) for k, (term, grad) in enumerate(zip(task.terms, task.grads, strict=True))}
        self.inward = {1 << k: mask for k, mask in enumerate(self.sets.terms)}
        self.whole = (1 << len(task.terms)) - 1
        self._outside, self._volumes, self._orders = dict[int, int](), dict[int, int](), dict[tuple[int, int], Indices]()

    def volume(self, indices: int) -> int:
        """How many numbers a tensor with these indices holds."""
        if indices not in self._volumes:
            names = [name for name, bit in self.bit.items() if bit & indices]
            self._volumes[indices] = volume(names, self.task.size)
        return self._volumes[indices]

    def least(self, one: int, other: int) -> float:
        """The step's price without copies, at full speed: each term at most that of `Step.price`, in the same order."""
        left, right, device = self.inward[one], self.inward[other], self.task.device
        outside = self.outside(one | other)
        result = (left | right) & outside
        flops = (2 if left & right & ~outside else 1) * self.volume(left | right)
        moved = ITEM * (self.volume(left) + self.volume(right) + self.volume(result))
        products = 1 + self.held[one][1] + self.held[other][1]
        seconds = (flops / device.flops + moved / device.bandwidth + device.latency) * products
        return seconds + self._beyond(one | other, result)

    def _beyond(self, both: int, result: int) -> float:
        limit = self.task.memory_limit
        return 1e30 if limit is not None and both != self.whole and self.volume(result) * ITEM > limit else 0.0

    def outside(self, both: int) -> int:
        """The indices needed outside of a set."""
        if both not in self._outside:
            self._outside[both] = self.sets.outside(both)
        return self._outside[both]

    def seconds(self, one: int, other: int) -> float:
        """The price of the step in its best form; the first where several are."""
        (left, left_grad), (right, right_grad) = self.held[one], self.held[other]
        outside, both, task = self.outside(one | other), one | other, self.task
        number = {name: k for k, name in enumerate(dict.fromkeys((*left, *right)))}
        seconds, order = _best_form(
            len(left),
            tuple(number[i] for i in right),
            number.get(TOKEN),
            tuple(task.size[i] for i in number),
            tuple(k for name, k in number.items() if self.bit[name] & outside),
            tuple(number[i] for i in task.output) if both == self.whole else (),
            (left_grad, right_grad),
            task.device,
        )
        names = list(number)
        self._orders[one, other] = tuple(names[k] for k in order)
        return seconds + self._beyond(both, (self.inward[one] | self.inward[other]) & outside)

    def choose(self, one: int, other: int) -> None:
        """Remember the order of the result."""
        both = one | other
        self.held[both] = (self._orders[one, other], self.held[one][1] or self.held[other][1])
        self.inward[both] = (self.inward[one] | self.inward[other]) & self.outside(both)
        self._orders.clear()


@lru_cache(maxsize=1 << 14)
def _best_form(
    left: int,
    right: tuple[int, ...],
    token: int | None,
    sizes: tuple[int, ...],
    rest: tuple[int, ...],
    final: tuple[int, ...],
    grads: tuple[bool, bool],
    device: Device,
) -> tuple[float, tuple[int, ...]]:
    """The price of two tensors' step in its best form, and the order of its result, with numbers in place of names.

    Most networks have many steps that are alike but for the names of their indices.

    Args:
        left: how many indices the first tensor has, which are numbered as they lie there.
        right: those of the second, new ones numbered behind.
        token: which of them is the tokens'.
        sizes: of all.
        rest: those needed later.
        final: the order of the result where this is the last step, else empty.
        grads: whether each tensor wants a gradient.
        device: to price for.
    """
    names = [TOKEN if k == token else str(k) for k in range(len(sizes))]
    orders = (tuple(names[:left]), tuple(names[k] for k in right))
    arguments = (
        (0, 1),
        orders,
        grads,
        {names[k] for k in rest},
        tuple(names[k] for k in final),
        dict(zip(names, sizes, strict=True)),
    )
    steps = [step for form in FORMS if (step := lay_out(*arguments, form)) is not None]
    prices = [step.price(device) for step in steps]
    best = prices.index(min(prices))
    return prices[best], tuple(names.index(i) for i in steps[best].result)
