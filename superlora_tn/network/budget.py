"""Given how many parameters may train, which rank (order, groups, ratio)? The count decides, before any tensor exists.

`fit` searches the rank of any preset; `within` searches every setting of the whole formula that is left free. Both
find the largest count not above the budget and the smallest above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import product
from typing import Any, Protocol

from superlora_tn.declare.bounds import MAX_RANK
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.maps import Compose, Fastfood, Projection, Shuffle
from superlora_tn.declare.parts import CP, Part, SpecError, inner_parts, shown
from superlora_tn.declare.source import source
from superlora_tn.network.graph import Graph
from superlora_tn.network.kernels import Kernels, check_kernels, count, lay_out
from superlora_tn.network.spec import AdapterSpec, named_shapes

Shapes = Mapping[str, Shape] | Sequence[Shape]
Priced = tuple[int, AdapterSpec]
ORDERS = (2, 3, 4, 5)
RATIOS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)
USUAL = (("splits", 1), ("over", "cap"))
MAX_FREE_GROUPS = 24  # the paper's runs use up to 12; more only make the search longer


class Formula(Protocol):
    """What `within` fills in: `variants.superlora`, or a function with the same settings."""

    def __call__(
        self, rank: int, order: int, groups: int | str, splits: int, projection: Projection | None, alpha: float | None
    ) -> AdapterSpec:
        """The spec of one setting."""


@dataclass(frozen=True)
class Choice:
    """What a budget buys. Printing it says what was picked, and what the next larger would cost.

    Attributes:
        budget: the most parameters that were allowed.
        spec: the pick: no other setting that was searched has a count between its own and the budget.
        count: trainable parameters of the pick, at most `budget`.
        next_count, next_spec: the smallest count above the budget, and its setting; None where nothing costs more.
    """

    budget: int
    spec: AdapterSpec
    count: int
    next_count: int | None = None
    next_spec: AdapterSpec | None = None

    def __str__(self) -> str:
        picked = f"{self.count:,} of {self.budget:,} parameters: {words(self.spec)}"
        if self.next_count is None or self.next_spec is None:
            return f"{picked}; nothing that was searched costs more"
        return f"{picked}; the next larger costs {self.next_count:,}: {words(self.next_spec)}"


def words(spec: AdapterSpec) -> str:
    """A declaration in short, without the settings that are at their default, or at the one that all presets have."""
    parts = (spec.network, spec.fold, spec.projection)
    return ", ".join(source(part, unsaid=USUAL) for part in parts if part is not None)


@dataclass(frozen=True)
class Budget:
    """The whole formula with a number of parameters in place of settings: a value that `choose` turns into a spec.

    A setting that is None is left free. Counts do not depend on weights' values, so `choose` needs shapes alone.

    Args:
        parameters: the most trainable parameters.
        formula: rank and settings -> spec, `variants.superlora` as a rule.
        rank: r; None searches every rank.
        order: M; None searches `ORDERS`.
        groups: G, or ``"weight"``; None searches ``"weight"``, 1 up to the number of weights (at most
            `MAX_FREE_GROUPS`), and the number of weights.
        splits: K.
        ratio: rho. 1 keeps `projection` as it is; None searches `RATIOS`; any but 1 means fastfood.
        projection: F, with the seed and tanh that a searched or given ratio then has too.
        alpha: passed on; it does not change a count.
    """

    parameters: int
    formula: Formula
    rank: int | None = None
    order: int | None = 2
    groups: int | str | None = 1
    splits: int = 1
    ratio: float | None = 1.0
    projection: Projection | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        _check_budget(self.parameters)
        settings: dict[str, Any] = dict.fromkeys(("order", "groups", "splits", "projection", "alpha"))
        takes = "a rank and order=, groups=, splits=, projection= and alpha=, as superlora_tn.superlora does"
        _check_maker(f"Budget was given formula={shown(self.formula)}", self.formula, takes, **settings)

    def choose(self, shapes: Shapes, kernels: Kernels | None = None) -> Choice:
        """The setting whose count is the largest not above the budget; the first in the order searched where counts tie.

        Searched are lower orders, then fewer groups, then ratios nearer 1 first.

        Args:
            shapes, kernels: of the targets, see `fit`.

        Raises:
            SpecError: the smallest possible count is above the budget (the message says how much it is), or no
                setting fits the shapes.
        """
        if not shapes:
            raise SpecError("a budget was given no weight to spend it on; give at least one shape (out, in).")
        orders = ORDERS if self.order is None else (self.order,)
        groups = _free_groups(len(shapes)) if self.groups is None else (self.groups,)
        ratios = RATIOS if self.ratio is None else (self.ratio,)
        maps = [self._map(ratio) for ratio in ratios]
        return best([self._maker(*setting) for setting in product(orders, groups, maps)], self.parameters, shapes, kernels)

    def _maker(self, order: int, groups: int | str, projection: Projection | None) -> Callable[[int], AdapterSpec]:
        def make(rank: int) -> AdapterSpec:
            chosen = rank if self.rank is None else self.rank
            return self.formula(chosen, order=order, groups=groups, splits=self.splits, projection=projection, alpha=self.alpha)

        return make

    def _map(self, ratio: float) -> Projection | None:
        if ratio == 1.0:
            return self.projection
        if isinstance(self.projection, Shuffle | Compose):
            kind = "a shuffle keeps the length" if isinstance(self.projection, Shuffle) else "a Compose has ratios of its own"
            raise SpecError(f"{kind}, but ratio={ratio} was asked for; give projection=Fastfood() or None.")
        return replace(self.projection or Fastfood(), ratio=ratio)


def _free_groups(weights: int) -> tuple[int | str, ...]:
    numbers = dict.fromkeys([*range(1, min(weights, MAX_FREE_GROUPS) + 1), weights])
    return (*numbers, "weight")


def within(budget: int, shapes: Shapes, formula: Formula, **settings: Any) -> Choice:
    """The whole formula fitted to a budget: ``Budget(budget, formula, **settings).choose(shapes)``."""
    return Budget(budget, formula, **settings).choose(shapes)


def fit(maker: Callable[[int], AdapterSpec], budget: int, shapes: Shapes, kernels: Kernels | None = None) -> Choice:
    """The rank of a preset whose count is the largest not above the budget; the smallest such rank where counts tie.

    Args:
        maker: rank -> spec, such as ``sl.lora`` or ``lambda r: sl.lokr(r, factor=4)``. Its count must not fall as the
            rank rises; the exception the library knows, `CP(dense_if_large=True)`, is searched rank by rank.
        budget: the most trainable parameters, at least 1.
        shapes: (out, in) of each target, by module name, or as a list taken as one weight a layer, in order.
        kernels: the sizes of the kernels of those targets that are convolutions, by name: `attach` takes them from the layers,
            and the count is then what it attaches. None counts all as matrices.

    Raises:
        SpecError: the smallest possible count is above the budget (the message says how much it is), or `maker`
            makes nothing that fits the shapes.
    """
    takes = "a rank, such as superlora_tn.lora or lambda rank: superlora_tn.lokr(rank, factor=4)"
    _check_maker(f"fit was given maker={shown(maker)}", maker, takes)
    return best([maker], budget, shapes, kernels)


def _check_budget(budget: object) -> None:
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise SpecError(f"a budget was given as {shown(budget)}; it is the number of trainable parameters, at least 1.")


def _check_maker(given: str, maker: object, takes: str, **settings: Any) -> None:
    """Raise for what cannot be called with a rank and these settings; what tells no signature is tried."""
    try:
        if not callable(maker):
            raise TypeError("no function")
        signature(maker).bind(1, **settings)
    except TypeError as error:
        raise SpecError(f"{given} ({error}); give a function that takes {takes}.") from error
    except ValueError:
        return


def best(makers: Iterable[Callable[[int], AdapterSpec]], budget: int, shapes: Shapes, kernels: Kernels | None = None) -> Choice:
    """The best `fit` over several makers; the first of them, and its smallest rank, where counts tie.

    Raises:
        SpecError: as `fit`; a maker that fits no rank to the shapes is passed over unless all are.
    """
    _check_budget(budget)
    named = named_shapes(shapes)
    check_kernels(kernels, named)
    refused: SpecError | None = None
    below: Priced | None = None
    above: Priced | None = None
    for maker in makers:
        try:
            found = _Ranks(maker, named, kernels).around(budget)
        except SpecError as error:
            refused = refused or error
            continue
        below = max((p for p in (below, found[0]) if p), key=_count, default=None)
        above = min((p for p in (above, found[1]) if p), key=_count, default=None)
    if below is not None:
        return Choice(budget, below[1], below[0], *(above or (None, None)))
    if above is not None:
        raise SpecError(
            f"a budget of {budget:,} parameters is below the smallest possible count, {above[0]:,} ({words(above[1])}). "
            "Raise the budget, leave more settings free, or adapt fewer weights."
        )
    raise refused or SpecError("there is nothing to choose from; leave at least one setting possible.")


def _count(priced: Priced) -> int:
    return priced[0]


class _Ranks:
    """The counts of one maker over its ranks, each computed once."""

    def __init__(self, maker: Callable[[int], AdapterSpec], shapes: Mapping[str, Shape], kernels: Kernels | None) -> None:
        self.maker, self.shapes, self.kernels = maker, shapes, kernels
        self.known: dict[int, Priced | None] = {}
        self.counts: dict[AdapterSpec, int] = {}  # a maker may give the same spec at every rank

    def price(self, rank: int) -> Priced | None:
        """Count and spec; None where the rank is above a bound. Where it is capped, the count is that of the cap."""
        if rank not in self.known:
            try:
                spec = self.maker(rank)
                if spec not in self.counts:
                    self.counts[spec] = count(spec, self.shapes, self.kernels)
                self.known[rank] = (self.counts[spec], spec)
            except SpecError:
                self.known[rank] = None
        return self.known[rank]

    def around(self, budget: int) -> tuple[Priced | None, Priced | None]:
        """The largest count not above the budget and the smallest above it, each at its smallest rank."""
        first = self.maker(1)
        if not isinstance(first, AdapterSpec):
            raise SpecError(f"what was given to make declarations makes {shown(first)} of rank 1; make an AdapterSpec of it.")
        count(first, self.shapes, self.kernels)  # a setting that is wrong at every rank says why
        scanned = self._irregular(first) if _turns_dense(first.network) else 0
        prices = [p for rank in range(1, scanned + 1) if (p := self.price(rank))]
        prices += self._bisected(scanned + 1, budget)
        below = max((p for p in prices if p[0] <= budget), key=_count, default=None)
        above = min((p for p in prices if p[0] > budget), key=_count, default=None)
        return below, above

    def _irregular(self, first: AdapterSpec) -> int:
        """The last rank before all is dense that may be, until when the count may fall from rank to rank."""
        # A part turns dense at half its longest side, and no side is longer than the mode it splits.
        limit = max(-(-mode.size // 2) for _, group, _ in lay_out(first, self.shapes, self.kernels) for mode in group.modes)
        final = self._graphs(limit)
        low, high = 0, limit
        while final is not None and high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._graphs(middle) == final else (middle, high)
        return high

    def _graphs(self, rank: int) -> list[Graph] | None:
        try:
            return [graph for _, _, graph in lay_out(self.maker(rank), self.shapes, self.kernels)]
        except SpecError:
            return None

    def _bisected(self, low: int, budget: int) -> list[Priced]:
        """The prices on both sides of the budget at ranks from `low` up, where counts only rise."""
        if self.price(low) is None:
            return []
        inside = self._last(low, lambda p: p[0] <= budget)
        found = [self.price(inside + 1)]
        if inside >= low:
            most = _count_of(self.price(inside))
            found.append(self.price(self._last(low, lambda p: p[0] < most) + 1))
        return [p for p in found if p]

    def _last(self, low: int, holds: Callable[[Priced], bool]) -> int:
        """The last rank from `low` up whose price exists and holds; low - 1 if none. Doubles, then halves."""

        def good(rank: int) -> bool:
            priced = self.price(rank) if rank <= MAX_RANK else None
            return priced is not None and holds(priced)

        step = 1
        while good(low - 1 + step):
            step *= 2
        inside, outside = low - 1 + step // 2, low - 1 + step
        while outside - inside > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if good(middle) else (inside, middle)
        return inside


def _count_of(priced: Priced | None) -> int:
    return priced[0] if priced else 0


def _turns_dense(part: Part) -> bool:
    if own := inner_parts(part):
        return any(map(_turns_dense, own))
    return isinstance(part, CP) and part.dense_if_large
