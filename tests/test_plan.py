"""Contraction plans: they replay elsewhere, print what they cost, keep their limit, and never permute the activation."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import numpy as np
import opt_einsum as oe
import pytest
import torch
from hypothesis import given
from strategies import EPS, SHAPES, Case, cases, physical_cases, targets
from test_equals_dense import VARIANTS
from torch import nn

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.layout import Equation, volume
from superlora_tn.contraction.plan import CPU, Plan, choose, make_plan, plan_equation
from superlora_tn.contraction.profile import DEVICES, ITEM, Device
from superlora_tn.contraction.search import PlanError
from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.parts import CP, TOKEN, Dense, Network, SpecError, TensorTrain, Tucker
from superlora_tn.model.attach import attach
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import loha, lokr, lonkr, lora, lorta, lotr, vera


def graph_of(spec: AdapterSpec, shapes: dict[str, tuple[int, int]] | None = None) -> Graph:
    return spec.lay_out(shapes or {"w": (12, 18)})[0][1]


def routes(graph: Graph) -> list[Plan]:
    plans = [make_plan(graph, "delta"), make_plan(graph, "delta", fixed=False)]
    return plans if graph.is_flat else [*plans, make_plan(graph, "apply", 5)]


def arrays(plan: Plan) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal([plan.size[i] for i in term]) for term in plan.inputs]


def assert_replays(plan: Plan) -> None:
    """opt_einsum, given the plan's equation and path, computes what the reference backend does."""
    operands = arrays(plan)
    path: Any = plan.path
    replayed = oe.contract(plan.symbols, *operands, optimize=path)
    expected = compiled(plan, "numpy_reference")(*operands)
    size = compiled(plan, "numpy_reference")(*[np.abs(o) for o in operands])
    # Each is a sum of at most `terms` products of all operands.
    terms = math.prod(plan.size[i] for i in plan.size if i not in plan.output)
    allowed = 2 * (terms + len(operands)) * EPS * size
    assert (np.abs(replayed.reshape(expected.shape) - expected) <= allowed).all()


@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_a_plan_replays_in_opt_einsum(spec: AdapterSpec) -> None:
    for _, graph in spec.lay_out(SHAPES):
        for plan in routes(graph):
            assert_replays(plan)


@given(cases())
def test_a_random_plan_replays_in_opt_einsum(case: Case) -> None:
    for _, graph in case.spec.lay_out(case.shapes):
        for plan in routes(graph):
            assert_replays(plan)


@given(physical_cases())
def test_a_plan_has_one_step_less_than_operands_and_uses_each_once(case: Case) -> None:
    for _, graph in case.spec.lay_out(case.shapes):
        for plan in routes(graph):
            used = [k for s in plan.steps for k in (s.large, s.small)]
            assert len(plan.steps) == len(plan.inputs) - 1
            assert sorted(used) == list(range(2 * len(plan.steps)))


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 1576])
def test_lora_costs_two_thin_products(tokens: int) -> None:
    plan = make_plan(graph_of(lora(8), {"w": (96, 64)}), "apply", tokens)
    assert plan.flops == 2 * tokens * 8 * (64 + 96)
    assert plan.peak == tokens * 8 * ITEM


def test_the_dense_delta_costs_nothing() -> None:
    plan = make_plan(graph_of(AdapterSpec(Dense())), "delta")
    assert (plan.flops, plan.bytes, plan.peak, plan.path) == (0, 0, 0, [(0,)])


def test_totals_are_the_sums_of_the_steps() -> None:
    for spec in VARIANTS:
        for plan in routes(graph_of(spec, SHAPES)):
            assert plan.flops == sum(s.flops for s in plan.steps)
            assert plan.bytes == sum(s.bytes for s in plan.steps)
            assert plan.price == sum(s.price(plan.device) for s in plan.steps)


def test_flops_of_each_step_are_those_of_its_sizes() -> None:
    for spec in VARIANTS:
        for plan in routes(graph_of(spec, SHAPES)):
            for s in plan.steps:
                both = dict.fromkeys((*s.large_indices, *s.small_indices))
                assert s.flops == (2 if s.contracted else 1) * math.prod(plan.size[i] for i in both)


@pytest.mark.parametrize("spec", [lora(4), lokr(4), loha(4), lotr(4)], ids=repr)
def test_the_cheaper_route_is_chosen_and_the_other_refused_with_its_price(spec: AdapterSpec) -> None:
    for tokens in (1, 64, 4096):
        choice = choose(graph_of(spec, {"a.0.q": (96, 64)}), (96, 64), tokens)
        assert choice.apply is not None
        assert (choice.route == "apply") == (choice.apply.price <= choice.delta_price)
        assert choice.chosen.route == choice.route
        other = "delta" if choice.route == "apply" else "apply"
        assert f"refused    {other} route" in str(choice)


def test_a_flat_fold_has_the_delta_route_only() -> None:
    for shapes in ({"w": (12, 18)}, {"w": (1, 1)}):
        graph = graph_of(lorta(1), shapes)
        with pytest.raises(PlanError, match="flat fold"):
            make_plan(graph, "apply", 4)
        choice = choose(graph, shapes["w"], 4)
        assert (choice.apply, choice.route) == (None, "delta")
        assert "not possible" in str(choice)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_a_price_grows_with_tokens_on_every_device(device: Any) -> None:
    graph = graph_of(lora(4), {"w": (96, 64)})
    prices = [make_plan(graph, "apply", tokens, device).price for tokens in (1, 100, 10_000)]
    assert prices == sorted(set(prices))


# --- printing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_a_printed_plan_has_equation_path_and_costs(spec: AdapterSpec) -> None:
    for plan in routes(graph_of(spec, SHAPES)):
        text = str(plan)
        assert plan.equation in text
        assert str(plan.path) in text
        assert f"{plan.flops:,} FLOPs" in text
        assert f"{plan.bytes:,} bytes" in text
        assert f"peak intermediate {plan.peak:,} bytes" in text
        assert all(name in text for name in plan.names)
        assert all(f"{s.flops:,}" in text for s in plan.steps)


def test_the_equation_is_in_the_users_words() -> None:
    graph = graph_of(lora(4))
    assert make_plan(graph, "delta").equation == graph.equation() == "out r, in r -> out in"
    assert make_plan(graph, "apply", 3).equation == "token in, out r, in r -> token out"


# --- memory limit ---------------------------------------------------------------------------------------------------

LIMITED = [
    lora(4),
    loha(3),
    lokr(2),
    lotr(3),
    AdapterSpec(Tucker(3)),
    AdapterSpec(TensorTrain(2), PhysicalFold("layer out in")),
]


@pytest.mark.parametrize("route", ["apply", "delta"])
@pytest.mark.parametrize("spec", LIMITED, ids=repr)
def test_a_memory_limit_is_kept_or_refused(spec: AdapterSpec, route: Any) -> None:
    graph = graph_of(spec, {"layer.0.q": (12, 18), "layer.1.q": (12, 18)})
    free = make_plan(graph, route, 50)
    assert make_plan(graph, route, 50, memory_limit=free.peak).peak <= free.peak
    refused, kept = 0, 5
    for limit in (1, ITEM * 10, ITEM * 100, ITEM * 500, ITEM * 10_000):
        try:
            assert make_plan(graph, route, 50, memory_limit=limit).peak <= limit
        except PlanError as error:
            refused += f"memory_limit={limit:,}" in str(error)
            kept -= 1
    assert kept > 0
    assert refused == 5 - kept


def test_a_smaller_limit_takes_another_path() -> None:
    """x through LoHa wants a (token, in, r) intermediate; a limit below it builds dW instead."""
    graph = graph_of(loha(3), {"w": (12, 18)})
    apply = make_plan(graph, "apply", 1000, memory_limit=12 * 18 * 3 * ITEM)
    assert apply.peak <= 12 * 18 * 3 * ITEM
    with pytest.raises(PlanError, match="raise the limit"):
        make_plan(graph_of(lora(4)), "apply", 1000, memory_limit=8)


@pytest.mark.parametrize("limit", [-8, 2.5, math.nan, True, "1GB"])
def test_a_memory_limit_is_a_number_of_bytes(limit: Any) -> None:
    """NaN was no limit at all, and words a TypeError."""
    for graph in (graph_of(lora(2)), graph_of(lorta(2))):
        with pytest.raises(PlanError, match=re.escape(f"memory_limit={limit!r}; give bytes")):
            choose(graph, (12, 18), 4, memory_limit=limit)


def test_a_memory_limit_holds_where_delta_is_the_only_route() -> None:
    """It was ignored there without a word."""
    graph = graph_of(lorta(2))
    peak = choose(graph, (12, 18), 4).chosen.peak
    assert choose(graph, (12, 18), 4, memory_limit=peak).chosen.peak <= peak
    with pytest.raises(PlanError, match=re.escape("memory_limit=8; raise the limit, or declare smaller bonds")):
        choose(graph, (12, 18), 4, memory_limit=8)


def test_a_memory_limit_leaves_the_route_that_keeps_to_it() -> None:
    """With a physical fold it held for the apply route alone: delta was chosen above it, and not where it alone is below."""
    hadamard, shared = graph_of(loha(3), {"w": (12, 18)}), graph_of(lotr(3), {"w": (12, 18)})
    found = choose(hadamard, (12, 18), 1, memory_limit=18 * 3 * ITEM)  # LoHa's dW takes another of its size; x takes (in, r)
    assert choose(hadamard, (12, 18), 1).route == "delta"
    assert (found.route, found.delta_fits, found.chosen.peak) == ("apply", False, 18 * 3 * ITEM)
    assert "refused    delta route: needs an intermediate above memory_limit=216" in str(found)
    found = choose(shared, (12, 18), 50, memory_limit=12 * 3 * ITEM)
    assert (found.route, found.apply, found.chosen.peak) == ("delta", None, 12 * 3 * ITEM)
    assert "refused    apply route: needs an intermediate above memory_limit=144" in str(found)
    with pytest.raises(PlanError, match="delta route does not keep to the limit either"):
        choose(shared, (12, 18), 50, memory_limit=12 * 3 * ITEM - 1)
    with pytest.raises(PlanError, match="path"):  # what is wrong with x's path is no matter of memory
        choose(graph_of(lora(2)), (12, 18), 4, optimize=lambda inputs, *_: [(0, 1)], memory_limit=10_000)


# --- the large operand ----------------------------------------------------------------------------------------------

UNPERMUTED = [
    lora(8),
    lokr(8),
    lokr(2, decompose_both=True),
    lonkr(2, 3),
    loha(4),
    lotr(8),
    vera(16),
    AdapterSpec(CP(8), PhysicalFold("layer type head out in", heads=12)),
    AdapterSpec(TensorTrain(8), PhysicalFold("layer type head out in", heads=12)),
    AdapterSpec(TensorTrain(8)),
]


# With a single token the activation is no larger than the nodes, so there is nothing to spare.
@pytest.mark.parametrize("tokens", [32, 197, 1576])
@pytest.mark.parametrize("spec", UNPERMUTED, ids=repr)
def test_the_activation_and_the_output_are_viewed_never_permuted(spec: AdapterSpec, tokens: int) -> None:
    plan = make_plan(graph_of(spec, targets(2, 2, (768, 768))), "apply", tokens)
    held = [s for s in plan.steps if TOKEN in s.large_indices]
    assert held[0].large == 0
    assert not held[0].permuted
    assert held[-1].result == plan.output
    # An intermediate may be copied into another order, where one product then serves for one a token.
    assert all(volume(s.large_indices, plan.size) < tokens * 768 for s in held if s.permuted)
    assert all(TOKEN not in s.small_indices for s in plan.steps if TOKEN not in s.large_indices)


# --- caching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"route": "aply"}, "route='aply'; choose 'apply' or 'delta'"),
        ({"tokens": 0}, "tokens=0; give the rows of x, a whole number of at least 1"),
        ({"tokens": -3}, "tokens=-3;"),
        ({"tokens": 2.5}, "tokens=2.5;"),
        ({"device": "cpu"}, "device='cpu'; give a Device"),
    ],
)
def test_what_cannot_be_priced_is_refused_in_words(asked: dict[str, Any], message: str) -> None:
    """An unknown route was planned as `apply`, and negative rows had a negative price."""
    graph = graph_of(lora(2))
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(graph, **{"route": "apply", **asked})
    if "route" not in asked:
        for one in (graph, graph_of(lorta(2))):
            with pytest.raises(PlanError, match=re.escape(message)):
                choose(one, (12, 18), **{"tokens": 1, **asked})


@pytest.mark.parametrize(
    "wrong",
    [{"flops": 0}, {"bandwidth": -1.0}, {"latency": math.nan}, {"item": -1}, {"width": 0}, {"flops": "1e9"}, {"flops": True}],
)
def test_a_device_has_speeds_above_zero(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"Device was given {next(iter(wrong))}="):
        Device(**{"name": "mine", "flops": 1e9, "bandwidth": 1e9, "latency": 0.0, **wrong})
    assert Device("ideal", 1e9, math.inf, 0.0).width == 1


def test_plans_are_cached_on_equal_arguments() -> None:
    first, second = (make_plan(graph_of(lokr(2)), "apply", 9, CPU) for _ in range(2))
    assert first is second
    assert make_plan(graph_of(lokr(2)), "apply", 10, CPU) is not first
    assert graph_of(lokr(2)) is graph_of(lokr(2))


def test_a_plan_is_a_value() -> None:
    plan = make_plan(graph_of(lotr(2), SHAPES), "apply", 9)
    back = pickle.loads(pickle.dumps(plan))
    assert (back, hash(back), str(back)) == (plan, hash(plan), str(plan))


def test_many_operands_and_indices_plan_and_run() -> None:
    """Above 14 operands the search is opt_einsum's, and above 52 indices letters run out."""
    chain = {f"n{k}": f"b{k} b{k + 1}" for k in range(1, 60)}
    network = Network("o i", {f"b{k}": 2 for k in range(1, 61)}, first="o b1", **chain, last="b60 i")
    graph = graph_of(AdapterSpec(network), {"w": (3, 4)})
    plan = make_plan(graph, "apply", 2)
    operands = [np.ones([plan.size[i] for i in term]) for term in plan.inputs]
    path: Any = plan.path
    result = oe.contract(plan.symbols, *operands, optimize=path)
    assert np.array_equal(result, np.full((2, 3), 4.0 * 2.0**60))


# --- other optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["OptimalOptimizer", "GreedyOptimizer"])
def test_an_optimizer_of_cotengra_plugs_in(name: str) -> None:
    cotengra = pytest.importorskip("cotengra", reason="cotengra is an optional search")
    graph = graph_of(AdapterSpec(TensorTrain(3), PhysicalFold("layer type head out in", heads=4)), targets(2, 2, (16, 16)))
    found = make_plan(graph, "apply", 64, optimize=getattr(cotengra, name)())
    own = make_plan(graph, "apply", 64, optimize="optimal")
    assert len(found.steps) == len(own.steps)
    if name == "OptimalOptimizer":
        assert found.flops <= own.flops


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([(0, 1)], "leaves 2 of 3 tensors"),
        ([], "leaves 3 of 3 tensors"),
        ([(0, 0), (0, 1)], "the places (0, 0) of 3 tensors; give two different ones from 0 to 2"),
        ([(0, 1), (2, 3)], "the places (2, 3) of 2 tensors"),
        ([(0, -1), (0, 1)], "the places (0, -1) of 3 tensors"),
        ([(0, 1), (0, 1), (0, 1)], "the places (0, 1) of 1 tensors"),
        ([(0, 1, 2)], "contracts 3 tensors in one step"),
    ],
)
def test_a_path_that_is_none_is_refused_in_words(path: list[tuple[int, ...]], message: str) -> None:
    """One too short gave a wrong result where the last step had the result's indices; others broke somewhere inside."""

    class Wrong:
        __hash__ = None  # nor has any optimizer to have a hash

        def __call__(self, *_: object) -> list[tuple[int, ...]]:
            return path

    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(graph_of(lora(2)), "apply", 4, optimize=Wrong())


class Unhashable:
    """An optimizer of someone's own, as a dataclass makes it."""

    __hash__ = None

    def __call__(self, inputs: list[frozenset[str]], *_: object) -> list[tuple[int, int]]:
        return [(0, 1)] * (len(inputs) - 1)


def test_an_optimizer_needs_no_hash_in_a_model_either() -> None:
    """The caches of what an adapter runs wanted one."""
    embed, body = nn.Embedding(5, 6).double(), nn.Linear(6, 4).double()
    tuned = attach(nn.Sequential(embed, body), {"0": lora(2), "1": loha(2)}, optimize=Unhashable(), dtype=torch.float64, seed=0)
    for node in tuned.parameters():
        nn.init.normal_(node)
    numbers = torch.tensor([4, 0, 1])
    rows = (embed.weight + tuned.delta("0").t())[numbers]
    expected = rows @ (body.weight + tuned.delta("1")).t() + body.bias
    torch.testing.assert_close(body(embed(numbers)), expected, rtol=1e-12, atol=1e-12)


def test_an_optimizer_needs_no_hash_and_a_list_is_none() -> None:
    graph = graph_of(lora(2))
    assert make_plan(graph, "apply", 4, optimize=Unhashable()).path == [(0, 1), (0, 1)]
    wrong: Any = [(0, 1), (0, 1)]
    with pytest.raises(PlanError, match="is no optimizer; give 'dp'"):
        make_plan(graph, "apply", 4, optimize=wrong)


@pytest.mark.parametrize("optimize", ["greedy", "branch-2"])
def test_the_search_is_no_dearer_than_a_heuristic_where_orders_decide(optimize: str) -> None:
    """The search knows one memory order of each set, and came to 1.6 times the price of greedy here."""
    size = {"a": 16, "b": 64, "c": 16, "d": 4}
    texts, trained = ["cbd", "abc", "cbd", "cda", "bd", "bdc", "ad", "c"], (True, True, True, True, True, False, False, True)
    equation = Equation(
        tuple(f"x{k}" for k in range(8)),
        tuple(tuple(text) for text in texts),
        tuple(tuple(size[i] for i in text) for text in texts),
        trained,
        (),
        tuple(size.items()),
    )
    assert plan_equation(equation).price <= 1.05 * plan_equation(equation, optimize=optimize).price
