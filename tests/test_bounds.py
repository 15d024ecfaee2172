"""Work on a declaration is bounded before it is done: whatever is declared ends soon, in little memory, in a plan or in words.

The declarations run in a process of their own under a limit of memory (`hostile`). Seconds are of the processor, so that
others' load does not count, and the limits are several times what is measured: they tell a bound from none.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import environment

import superlora_tn as sl
from superlora_tn import CP, AdapterSpec, FlatFold, Hadamard, Network, SpecError, TensorTrain, Tucker
from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.exact import Sets, Tree, leaves, runs, sequence
from superlora_tn.contraction.plan import make_plan, plan_equation
from superlora_tn.declare import bounds
from superlora_tn.declare.cache import kept
from superlora_tn.declare.divisors import is_prime, largest_divisor, primes, root

ROOT = Path(sl.__file__).parents[1]
SECONDS, MEGABYTES = 5.0, 200.0
RANDOM = 150


def run(*arguments: str) -> list[dict[str, Any]]:
    """What `hostile` prints."""
    if sys.platform != "linux":
        pytest.skip("limits and measures memory as Linux does")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hostile.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kinds() -> dict[str, dict[str, Any]]:
    return {found["name"]: found for found in run()}


@pytest.mark.parametrize("name", hostile.KINDS)
def test_each_kind_ends_soon_in_a_plan_or_in_words(name: str, kinds: dict[str, dict[str, Any]]) -> None:
    found, expected = kinds[name], hostile.KINDS[name][1]
    assert found["seconds"] < SECONDS
    assert found["megabytes"] < MEGABYTES
    if expected == "ok":
        assert found["end"] == "ok"
    else:
        assert found["end"].startswith("refused: ")
        assert expected in found["end"]
        assert len(found["end"]) < 1000


def test_random_declarations_end_soon_in_a_plan_or_in_words() -> None:
    found = run(str(RANDOM))
    assert len(found) == RANDOM
    ends = {one["end"].split(":")[0] for one in found}
    assert ends == {"ok", "refused"}
    assert max(one["seconds"] for one in found) < SECONDS
    assert max(one["megabytes"] for one in found) < MEGABYTES


# --- whole numbers --------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**120), st.integers(1, 60))
def test_a_root_is_the_largest_whole_number(size: int, order: int) -> None:
    found = root(size, order)
    assert found**order <= size < (found + 1) ** order


@given(st.integers(1, 20_000), st.integers(1, 200))
def test_the_largest_divisor_is_that_of_trying_all(size: int, most: int) -> None:
    assert largest_divisor(size, most) == max(d for d in range(1, most + 1) if size % d == 0)


# Small and large ones, and some that many tests take for primes: Carmichael numbers, pseudoprimes to the first bases.
PRIMES = [2, 3, 997, 1009, 65_537, 1_000_003, 16_777_213, 2**31 - 1]


@given(st.lists(st.sampled_from(PRIMES), max_size=3))
def test_prime_factors_of_a_product_are_its_factors(factors: list[int]) -> None:
    assert sorted(primes(reduce(lambda a, b: a * b, factors, 1))) == sorted(factors)


def test_primes_are_told_from_what_looks_like_them() -> None:
    assert [n for n in range(2000) if is_prime(n)] == [n for n in range(2, 2000) if all(n % d for d in range(2, n))]
    assert not any(map(is_prime, [561, 41_041, 825_265, 3_215_031_751, 3_825_123_056_546_413_051, 1009**2, 2**47 - 1]))
    assert all(map(is_prime, [2**31 - 1, 2**61 - 1]))


# --- the search -----------------------------------------------------------------------------------------------------


def shape_of(tree: Tree) -> frozenset[object]:
    """A tree without the order of its halves."""
    return frozenset([tree]) if isinstance(tree, int) else frozenset([shape_of(tree[0]), shape_of(tree[1])])


TREES = st.recursive(st.just(0), lambda inner: st.tuples(inner, inner), max_leaves=9)


def numbered(tree: Any) -> Tree:
    """The tree with its tensors numbered from left to right."""
    count = iter(range(100))

    def walk(one: Any) -> Tree:
        return next(count) if isinstance(one, int) else (walk(one[0]), walk(one[1]))

    return walk(tree)


@given(TREES)
def test_a_trees_pairs_make_the_tree_again(drawn: Any) -> None:
    tree = numbered(drawn)
    row = leaves(tree)
    assert row == list(range(len(row)))
    made: list[Tree] = [*row]
    for a, b in sequence(tree, len(row)):
        made.append((made[a], made[b]))
    assert shape_of(made[-1]) == shape_of(tree)
    assert len(made) == 2 * len(row) - 1


@given(st.permutations(range(7)))
def test_runs_are_all_pairs_of_neighbours_in_a_row(row: list[int]) -> None:
    met = runs(row)
    assert len(set(met)) == len(met) == sum((length - 1) * (7 - length + 1) for length in range(2, 8))
    for left, right in met:
        assert not left & right
        places = [k for k, one in enumerate(row) if (left | right) >> one & 1]
        assert places == list(range(places[0], places[-1] + 1))


@given(st.integers(2, 7))
def test_sets_that_all_share_a_bond_meet_as_often_as_counted(count: int) -> None:
    """(3**n - 2**(n + 1) + 1) / 2 pairs of disjoint sets, neither empty."""
    sets = Sets(tuple(1 | 2 << k for k in range(count)), sum(2 << k for k in range(count)), outer=False)
    expected = (3**count - 2 ** (count + 1) + 1) // 2
    [found] = sets.meetings(expected) or [[]]
    assert len(set(found)) == len(found) == expected
    assert sets.meetings(expected - 1) is None


LARGER = {
    "CP": AdapterSpec(CP(2), FlatFold(10)),
    "Tucker": AdapterSpec(Tucker(2), FlatFold(12)),
    "train": AdapterSpec(TensorTrain(2), FlatFold(12)),
    "products": AdapterSpec(Hadamard(*[CP(2)] * 5)),
}


@pytest.mark.parametrize("name", LARGER)
def test_above_eight_operands_a_plan_costs_no_more_than_the_greedy_one(name: str) -> None:
    [(_, graph)] = LARGER[name].lay_out({"w": (64, 64)})
    for route in ("delta",) if graph.is_flat else ("delta", "apply"):
        found, greedy = (make_plan(graph, route, 1024, optimize=o) for o in ("dp", "greedy"))  # type: ignore[arg-type]
        assert found.price <= greedy.price


def test_a_plan_of_many_nodes_computes_what_a_chain_of_products_does() -> None:
    """Beyond the row search: ones times ones, whole numbers that float64 holds exactly."""
    [(_, graph)] = hostile.chain(50).lay_out({"w": (3, 4)})
    plan = make_plan(graph, "delta")
    operands = [torch.ones([plan.size[i] for i in term], dtype=torch.float64) for term in plan.inputs]
    assert torch.equal(compiled(plan)(*operands), torch.full((3, 4), 2.0**49, dtype=torch.float64))


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_cache_is_bounded_by_number_and_by_weight() -> None:
    made: list[int] = []

    @kept(3, 10, lambda _, weight: weight)
    def make(weight: int) -> list[int]:
        made.append(weight)
        return [weight]

    assert make(2) is make(2)
    make(3)
    make(4)
    assert make.cache_info() == (1, 3, 3, 3, 9)
    make(2)  # used again, so 3 is the oldest
    make(1)
    assert make.cache_info().currsize == 3
    make(3)
    assert make.cache_info().weight <= 10
    assert made == [2, 3, 4, 1, 3]
    assert make(11) is not make(11)  # heavier than all together may be: not kept, and nothing else is let go for it
    assert make.cache_info().weight <= 10
    make.cache_clear()
    assert make.cache_info() == (0, 0, 3, 0, 0)


def test_threads_get_one_result_and_an_error_is_not_kept() -> None:
    calls: list[int] = []

    @kept(10, 10, lambda *_: 1)
    def make(number: int) -> object:
        calls.append(number)
        if number < 0:
            raise SpecError("no")
        return object()

    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(make(1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one is make(1) for one in found)
    for _ in range(2):
        with pytest.raises(SpecError):
            make(-1)
    assert calls.count(-1) == 2
    assert make.cache_info().weight == make.cache_info().currsize == 1


def test_what_is_kept_is_a_function_by_name() -> None:
    assert pickle.loads(pickle.dumps(make_plan)) is make_plan
    assert make_plan.__name__ == "make_plan"


def test_plans_that_are_kept_weigh_no_more_than_the_bound() -> None:
    for count in range(200, 250):
        hostile.planned(hostile.chain(count))
    for cached in (make_plan, plan_equation):
        assert cached.cache_info().weight <= bounds.KEPT_STEPS


# --- bounds themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (lambda: hostile.flat(24), lambda: hostile.flat(25)),
        (lambda: AdapterSpec(CP(1 << 16, over="keep")), lambda: AdapterSpec(CP(1 << 18, over="keep"))),
        (lambda: hostile.nested(1, 64), lambda: hostile.nested(1, 65)),
        (lambda: sl.lora(1, alpha=bounds.MAX_SCALE), lambda: sl.lora(1, alpha=2 * bounds.MAX_SCALE)),
    ],
    ids=["padding", "nodes", "parts", "alpha"],
)
def test_a_bound_takes_what_is_below_it(inside: Callable[[], AdapterSpec], outside: Callable[[], AdapterSpec]) -> None:
    assert inside().count(hostile.SMALL) > 0
    with pytest.raises(SpecError, match=r"at most|above|from -1e"):
        outside().count(hostile.SMALL)


def test_a_network_of_many_indices_is_checked_in_linear_work() -> None:
    """Four thousand indices on 64 nodes; before, each was looked for in the list of all."""
    names = [f"x{k}" for k in range(2000)]
    nodes = {f"a{k}": " ".join(names[k * 62 : (k + 1) * 62]) for k in range(33)}
    twins = {f"b{k}": indices for k, indices in nodes.items()}
    ends = {"first": "o i"}
    network = Network("o i", dict.fromkeys(names, 1), **{n: i for n, i in {**ends, **nodes, **twins}.items() if i})
    assert AdapterSpec(network).count(hostile.SMALL) > 0


FORKS = """
import os, threading
from superlora_tn.declare.cache import kept

double = kept(4, 4, lambda result, x: 1)(lambda x: 2 * x)
looking, forked = threading.Event(), threading.Event()

def look_up():
    with double._lock:
        looking.set()
        forked.wait(0.2)  # the fork waits for this look-up, or does not

threading.Thread(target=look_up).start()
looking.wait()
child = os.fork()
forked.set()
if child == 0:
    os._exit(0 if double._lock.acquire(timeout=10) else 1)
assert os.waitpid(child, 0)[1] == 0
assert double(3) == 6
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_waits_for_another_threads_look_up() -> None:
    """Else the look-up's lock would stay locked in the new process."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], check=True, timeout=100, env=environment())
