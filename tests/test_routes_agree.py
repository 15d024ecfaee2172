"""Routes, optimizers and backends are ways, not meanings: values and gradients agree.

Beside one another they are compared with opt_einsum's own run of the same equation in float64, which shares no step.
"""

from __future__ import annotations

import math
from typing import Any

import opt_einsum as oe
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import EPS, SHAPES, Bound, Case, node_tensors, physical_cases
from test_equals_dense import VARIANTS

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.plan import make_plan
from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.parts import CP, TOKEN, Network, SpecError, TensorTrain, Tucker
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import lora, lorta

PHYSICAL = [spec for spec in VARIANTS if isinstance(spec.fold, PhysicalFold)]
SEARCHES = [oe.DynamicProgramming("size"), oe.DynamicProgramming("flops", False, True)]
OPTIMIZERS = ["dp", "greedy", "optimal", "branch-2", "auto", *SEARCHES]
Result = dict[str, torch.Tensor]


def results(bound: Bound, target: str, tokens: int) -> Result:
    """Value and gradients of a forward pass: x, out, and every parameter."""
    generator = torch.Generator().manual_seed(tokens)
    d_out, d_in = bound.shapes[target]
    x, out, seed = (
        torch.randn(tokens, d, generator=generator, dtype=torch.float64, requires_grad=True) for d in (d_in, d_out, d_out)
    )
    bound.adapter.zero_grad()
    value = bound.adapter(x, target, out)
    (value * seed.detach()).sum().backward()
    named = {name: p.grad for name, p in bound.adapter.named_parameters()}
    return {"value": value.detach(), "x": x.grad, "out": out.grad, **named}  # type: ignore[dict-item]


def scale_of(bound: Bound, target: str, tokens: int) -> float:
    """A bound on every sum that occurs: its number of terms times the largest term; x and the cotangent are below 5."""
    open_ = {i for _, indices in bound.graph.modes for i in indices}
    terms = math.prod(s for i, s in bound.graph.sizes if i not in open_)
    largest = max((float(t.detach().abs().max()) for t in node_tensors(bound.adapter).values()), default=1.0)
    d_out, d_in = bound.shapes[target]
    return (
        terms * max(largest, 1.0) ** len(bound.graph.nodes) * max(tokens, 1) * d_out * d_in * 25 * max(abs(bound.spec.scale), 1)
    )


def assert_same(first: Result, second: Result, bound: Bound, target: str, tokens: int) -> None:
    # Two computations, each off by at most (roundings x eps x the largest sum of absolute values).
    d_out, d_in = bound.shapes[target]
    allowed = 2 * (bound.roundings + tokens + d_out + d_in) * EPS * scale_of(bound, target, tokens)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("spec", PHYSICAL, ids=repr)
def test_apply_delta_and_the_chosen_route_agree(spec: AdapterSpec, tokens: int) -> None:
    ways = [list(Case(spec, SHAPES).bound(route=route)) for route in ("apply", "delta", None)]
    for applied, built, chosen in zip(*ways, strict=True):
        target = applied.targets[-1]
        first = results(applied, target, tokens)
        assert_same(first, results(built, target, tokens), built, target, tokens)
        assert_same(first, results(chosen, target, tokens), chosen, target, tokens)


@given(physical_cases(), st.integers(0, 4))
def test_apply_and_delta_of_a_random_network_agree(case: Case, tokens: int) -> None:
    for applied, built in zip(case.bound(route="apply"), case.bound(route="delta"), strict=True):
        target = applied.targets[-1]
        assert_same(results(applied, target, tokens), results(built, target, tokens), built, target, tokens)


@pytest.mark.parametrize("optimize", OPTIMIZERS, ids=lambda o: o if isinstance(o, str) else f"{type(o).__name__}-{o.minimize}")
@pytest.mark.parametrize("route", ["apply", "delta"])
def test_optimizers_agree(route: str, optimize: Any) -> None:
    for spec in PHYSICAL:
        ways = (Case(spec, SHAPES).bound(route=route, optimize=o) for o in ("dp", optimize))
        for ours, other in zip(*ways, strict=True):
            target = ours.targets[0]
            assert_same(results(ours, target, 5), results(other, target, 5), ours, target, 5)


@given(physical_cases(), st.sampled_from(OPTIMIZERS[1:5]))
def test_optimizers_agree_on_random_networks(case: Case, optimize: str) -> None:
    # opt_einsum's exhaustive searches try (operands)! orders: minutes from 9 operands (x among them) on.
    assume(all(len(graph.nodes) < 8 for _, graph in case.spec.lay_out(case.shapes)))
    for ours, other in zip(case.bound(route="apply"), case.bound(route="apply", optimize=optimize), strict=True):
        target = ours.targets[0]
        assert_same(results(ours, target, 2), results(other, target, 2), ours, target, 2)


def einsum(graph: Graph, route: str, fixed: bool, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The plan's equation by opt_einsum on torch, which autograd differentiates, along a path of its own."""
    plan = make_plan(graph, route, 4, fixed=fixed)  # type: ignore[arg-type]
    shapes = [[4 if i == TOKEN else plan.size[i] for i in term] for term in plan.inputs]
    return oe.contract(plan.symbols, *[t.reshape(s) for t, s in zip(tensors, shapes, strict=True)], backend="torch")


@pytest.mark.parametrize(("route", "fixed"), [("apply", True), ("delta", True), ("delta", False)])
@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_gradients_of_a_compiled_plan_are_those_of_einsum(spec: AdapterSpec, route: str, fixed: bool) -> None:
    for group, graph in spec.lay_out(SHAPES):
        if route == "apply" and graph.is_flat:
            continue
        plan = make_plan(graph, route, 4, fixed=fixed)  # type: ignore[arg-type]
        d_in = getattr(group, "shape", (0, 0))[1]
        shapes = [graph.shape_of(n, fixed) for n in graph.nodes]
        operands = [torch.randn(s, dtype=torch.float64) for s in ([(4, d_in)] if route == "apply" else []) + shapes]
        ways = []
        for run in (compiled(plan), lambda *t: einsum(graph, route, fixed, list(t))):  # noqa: B023
            leaves = [t.clone().requires_grad_() for t in operands]
            value = run(*leaves)
            weight = torch.cos(torch.arange(value.numel(), dtype=torch.float64))
            ways.append(torch.autograd.grad((value.reshape(-1) * weight).sum(), leaves))
        absolute = [t.abs().requires_grad_() for t in operands]
        sizes = torch.autograd.grad(einsum(graph, route, fixed, absolute).sum(), absolute)
        for ours, theirs, size in zip(*ways, sizes, strict=True):
            # A gradient sums over every index that is not its own: at most all of them, each once.
            everything = math.prod(plan.size[i] for i in plan.size)
            assert ((ours - theirs).abs() <= 2 * (everything + len(operands)) * EPS * size).all()


def test_two_calls_share_one_graph_of_gradients() -> None:
    """Members of a group add up their gradients in the shared nodes."""
    [bound] = Case(AdapterSpec(Tucker(2), PhysicalFold("layer type out in")), SHAPES).bound(route="apply")
    x, out = torch.randn(3, 18, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64)
    loss = sum(bound.adapter(x, t, out).sum() for t in bound.targets)
    together = torch.autograd.grad(loss, list(bound.adapter.parameters()))
    apart = [torch.autograd.grad(bound.adapter(x, t, out).sum(), list(bound.adapter.parameters())) for t in bound.targets]
    for whole, pieces in zip(together, zip(*apart, strict=True), strict=True):
        # Four sums added in another order; each is of at most 3 x 12 x 18 x 16 terms of about 1.
        torch.testing.assert_close(whole, sum(pieces), rtol=0, atol=3 * 12 * 18 * 16 * 100 * EPS)


def test_a_flat_fold_has_no_apply_route_and_says_so() -> None:
    with pytest.raises(SpecError, match="flat fold"):
        list(Case(lorta(2), SHAPES).bound(route="apply"))


@pytest.mark.parametrize("part", [CP(2), TensorTrain(2), Network("o i", {"r": 2}, b="o r", a="r i")])
def test_low_precision_results_stay_within_that_precision(part: Any) -> None:
    """In float32 both routes are off by float32's rounding of the same sums, not more."""
    [bound] = Case(AdapterSpec(part), {"w": (32, 48)}).bound(route="apply")
    x, out = torch.randn(5, 48, dtype=torch.float64), torch.zeros(5, 32, dtype=torch.float64)
    exact, size = (torch.from_numpy(m["w"]).T for m in (bound.reference, bound.magnitude))
    exact, size = x.float().double() @ exact, x.abs() @ size
    single = bound.adapter.float()(x.float(), "w", out.float()).double().detach()
    # Casting the nodes rounds each once; then 2 terms over the bond and 48 over `in`.
    assert ((single - exact).abs() <= (2 + 2 + 48) * 2.0**-24 * size).all()


def test_lora_at_full_size_agrees_on_both_routes() -> None:
    ways = [next(Case(lora(8), {"w": (256, 192)}).bound(route=route)) for route in ("apply", "delta")]
    assert_same(results(ways[0], "w", 33), results(ways[1], "w", 33), ways[0], "w", 33)
