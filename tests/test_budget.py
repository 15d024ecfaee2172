"""Budgets: the pick is what trying every setting finds, and a search stays short."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superlora_tn.declare.fold import FlatFold
from superlora_tn.declare.maps import Fastfood, Shuffle
from superlora_tn.declare.parts import CP, Hadamard, SpecError
from superlora_tn.network.budget import MAX_FREE_GROUPS, ORDERS, RATIOS, Budget, Choice, best, fit, within
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora, vera

Maker = Callable[[int], AdapterSpec]
Pairs = list[tuple[int, int]]
VIT = {f"encoder.layer.{k}.{kind}": (768, 768) for k in range(12) for kind in ("query", "value")}
MAKERS: dict[str, Maker] = {
    "dense": lambda r: dense(),
    "lora": lora,
    "loha": loha,
    "lokr": lokr,
    "lokr-factor": lambda r: lokr(r, factor=2),
    "lokr-both": lambda r: lokr(r, decompose_both=True),
    "lotr": lotr,
    "lonkr": lonkr,
    "lorta": lorta,
    "stacked": lambda r: AdapterSpec(CP(r), FlatFold(2, stacked=True)),
    "turns-dense": lambda r: AdapterSpec(CP(r, dense_if_large=True)),
    "half-turns-dense": lambda r: AdapterSpec(Hadamard(CP(r, dense_if_large=True), CP(1))),
    "splits": lambda r: superlora(r, splits=2),
    "projected": lambda r: superlora(r, order=3, groups=2, projection=Fastfood(0.5)),
}
SIDES = st.integers(2, 24)
SHAPES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3)
BUDGETS = st.one_of(st.integers(1, 200), st.integers(1, 3000))
# Above this every maker is at its bound or dense: the longest side is that of 3 * 24 * 24 elements in two modes, 42,
# or the stacked fold's 72.
ALL_RANKS = range(1, 80)


def every_count(maker: Maker, shapes: Any, ranks: Iterable[int] = ALL_RANKS) -> dict[int, int]:
    """Rank -> count, for every rank that is allowed."""
    counts = {}
    for rank in ranks:
        try:
            counts[rank] = maker(rank).count(shapes)
        except SpecError:
            continue
    return counts


def rank_of(choice: Choice, maker: Maker) -> int:
    return next(r for r in ALL_RANKS if maker(r) == choice.spec)


@pytest.mark.parametrize("name", MAKERS)
@given(SHAPES, BUDGETS)
def test_the_pick_is_what_trying_every_rank_finds(name: str, shapes: Pairs, budget: int) -> None:
    maker = MAKERS[name]
    counts = every_count(maker, shapes)
    above = min((c for c in counts.values() if c > budget), default=None)
    fitting = [c for c in counts.values() if c <= budget]
    if not fitting:
        with pytest.raises(SpecError, match=rf"the smallest possible count, {above:,} "):
            fit(maker, budget, shapes)
        return
    choice = fit(maker, budget, shapes)
    assert choice.count == choice.spec.count(shapes) == max(fitting)
    assert choice.next_count == above
    assert choice.next_spec is None if above is None else choice.next_spec and choice.next_spec.count(shapes) == above
    assert rank_of(choice, maker) == min(r for r, c in counts.items() if c == choice.count)


@given(SHAPES, BUDGETS, st.sampled_from(["lora", "loha", "lotr", "lorta", "stacked"]))
def test_no_higher_rank_fits_where_counts_rise(shapes: Pairs, budget: int, name: str) -> None:
    counts = every_count(MAKERS[name], shapes)
    if counts[1] <= budget:
        rank = rank_of(fit(MAKERS[name], budget, shapes), MAKERS[name])
        # Ranks above a cap have the count of the cap.
        assert all(count > budget for other, count in counts.items() if other > rank and count != counts[rank])


@given(SHAPES, BUDGETS)
def test_free_settings_are_never_worse_than_any_fixed_choice_of_them(shapes: Pairs, budget: int) -> None:
    groups = [*range(1, len(shapes) + 1), "weight"]
    fixed = []
    for order, group, ratio in product(ORDERS, groups, RATIOS):
        try:
            fixed.append(within(budget, shapes, superlora, order=order, groups=group, ratio=ratio))
        except SpecError:
            continue
    if not fixed:
        with pytest.raises(SpecError, match="smallest possible count"):
            within(budget, shapes, superlora, order=None, groups=None, ratio=None)
        return
    free = within(budget, shapes, superlora, order=None, groups=None, ratio=None)
    assert free.count == max(c.count for c in fixed) <= budget
    assert free.spec.count(shapes) == free.count


@given(SHAPES, st.integers(1, 4))
def test_an_impossible_budget_names_the_smallest_count_and_that_one_is_possible(shapes: Pairs, rank: int) -> None:
    counts = []
    for order, groups in product(ORDERS, [*range(1, len(shapes) + 1), "weight"]):
        counts += every_count(lambda r, o=order, g=groups: superlora(r, o, g), shapes, [rank]).values()
    if not counts or min(counts) == 1:
        return
    settings = {"rank": rank, "order": None, "groups": None}
    with pytest.raises(SpecError, match=rf"below the smallest possible count, {min(counts):,} .* Raise the budget"):
        within(min(counts) - 1, shapes, superlora, **settings)
    assert within(min(counts), shapes, superlora, **settings).count == min(counts)


@pytest.mark.parametrize("budget", [50, 500, 10_000, 10**6])
@pytest.mark.parametrize("name", MAKERS)
def test_a_search_of_the_ranks_of_a_vit_is_short(name: str, budget: int) -> None:
    asked: list[int] = []

    def maker(rank: int) -> AdapterSpec:
        asked.append(rank)
        return MAKERS[name](rank)

    try:
        choice = fit(maker, budget, VIT)
    except SpecError as error:
        assert "smallest possible count" in str(error)
    else:
        assert choice.count <= budget
    # Doubling and halving twice up to 2**20, and every rank of a part that may turn dense at half of 768.
    assert len(asked) <= 90 + (384 if name in ("turns-dense", "half-turns-dense", "lokr-factor") else 64)


@pytest.mark.parametrize("budget", [150, 10_000, 10**6])
def test_a_free_search_of_a_vit_is_short_and_near_the_budget(budget: int) -> None:
    calls = 0

    def formula(*args: Any, **settings: Any) -> AdapterSpec:
        nonlocal calls
        calls += 1
        return superlora(*args, **settings)

    choice = within(budget, VIT, formula, order=None, groups=None)
    assert 0.9 * budget <= choice.count <= budget < (choice.next_count or 0)
    assert calls <= 60 * len(ORDERS) * (MAX_FREE_GROUPS + 1)


def test_a_rank_without_bound_is_found_too() -> None:
    choice = fit(vera, 10**6, VIT)
    assert choice.spec == vera(40_898)  # 24 (768 + r) <= 10**6
    assert (choice.count, choice.next_count) == (999_984, 1_000_008)


def test_a_choice_says_what_was_picked_and_what_is_next() -> None:
    choice = within(10_000, VIT, superlora, order=3)
    assert choice == within(10_000, list(VIT.values()), superlora, order=3)
    assert str(choice) == (
        "9,317 of 10,000 parameters: Tucker(rank=11), FlatFold(); the next larger costs 10,440: Tucker(rank=12), FlatFold()"
    )
    text = str(fit(lambda r: superlora(r, projection=Fastfood(0.25, seed=3)), 10**9, [(4, 4)]))
    assert text == (
        "8 of 1,000,000,000 parameters: CP(rank=2), FlatFold(order=2), Fastfood(ratio=0.25, seed=3); "
        "nothing that was searched costs more"
    )


def test_a_free_or_given_ratio_keeps_the_maps_other_settings() -> None:
    wanted = Fastfood(0.5, seed=7, tanh=True)
    assert within(9_000, VIT, superlora, projection=wanted).spec.projection == wanted
    assert within(2_000, VIT, superlora, ratio=0.01, projection=wanted).spec.projection == Fastfood(0.01, 7, True)
    assert within(2_000, VIT, superlora, ratio=0.01).spec.projection == Fastfood(0.01)
    assert within(20_000, VIT, superlora, projection=Shuffle(3)).spec.projection == Shuffle(3)
    assert within(2_000, VIT, superlora, order=None, alpha=8.0).spec.alpha == 8.0


def test_the_first_maker_wins_a_tie() -> None:
    twice = [lora, lambda r: loha(r, alpha=1.0), lambda r: lora(2 * r, alpha=2.0)]  # LoHa counts as LoRA of twice the rank
    assert best(twice, 80_000, VIT).spec == lora(2)
    assert best(twice[::-1], 80_000, VIT).spec == lora(2, alpha=2.0)
    assert best([lora, lotr], 80_000, VIT).spec == lotr(34)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit(lora, 0, VIT), "a budget was given as 0; it is the number of trainable parameters, at least 1"),
        (lambda: fit(lora, 1e4, VIT), "a budget was given as 10000.0"),
        (lambda: fit(lora, True, VIT), "a budget was given as True"),
        (lambda: fit(lora, 100, {}), "the adapter was given no target"),
        (lambda: fit(lora, 100, [(0, 4)]), "a weight is"),
        (lambda: best([], 100, VIT), "there is nothing to choose from"),
        (lambda: fit("lora", 100, VIT), r"fit was given maker='lora' \(no function\); give a function that takes a rank"),
        (lambda: fit(lora(8), 100, VIT), r"maker=AdapterSpec.* \(no function\)"),
        (lambda: fit(lambda: lora(8), 100, VIT), "too many positional arguments.*; give a function that takes a rank"),
        (lambda: fit(lambda rank: 3, 100, VIT), "makes 3 of rank 1; make an AdapterSpec"),
        (lambda: fit(lora, 100, {"a": (8, 72)}, {"b": (3, 3)}), "kernels name 'b', which is none of the weights"),
        (lambda: fit(lora, 100, {"a": (8, 72)}, {"a": 3}), r"kernels give 'a' as 3; give its sizes, such as \(3, 3\)"),
        (lambda: within(100, VIT, lora), "formula=.*unexpected keyword argument 'order'.* such|as superlora_tn.superlora"),
        (lambda: superlora(budget=0), "a budget was given as 0"),
        (lambda: within(100, {}, superlora), "no weight to spend it on"),
        (lambda: within(100, [(2, 2)], superlora, groups=9), "groups=9 for 4 elements; choose at most 4"),
        (lambda: within(9_000, VIT, superlora, rank=0), "a rank is a whole number of at least 1"),
        (lambda: within(9_000, VIT, superlora, ratio=2.0), "ratio=2.0"),
        (lambda: within(9_000, VIT, superlora, ratio=0.5, projection=Shuffle()), "a shuffle keeps the length, but ratio=0.5"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(call: Callable[[], Choice], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        call()


def test_a_budget_is_a_value() -> None:
    assert Budget(100, superlora) == Budget(100, superlora)
    assert hash(Budget(100, superlora, order=None)) == hash(Budget(100, superlora, order=None))
    assert Budget(10_000, superlora).choose(VIT) == within(10_000, VIT, superlora)
