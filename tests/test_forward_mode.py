"""Forward-mode derivatives: tangents of x, of the layer's output and of every node, and second derivatives through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given
from hypothesis import strategies as st
from models import DIM, TARGETS, VARIANTS, ConvNet, Tiny, noise, perturb, seeded
from strategies import EPS, Bound, Case, flat_cases, node_tensors, physical_cases
from superlora_tn_backends import tensorly_torch
from test_compile import Mlp
from test_gradients import TANH
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import superlora_tn as sl
from superlora_tn.model.saved import At

# torch's own forward-mode rules compile with torch.jit.script when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


# --- against the oracle ---------------------------------------------------------------------------------------------


def assert_tangents(bound: Bound) -> None:
    """``d(out + x dW^T) = d out + dx dW^T + x (sum over nodes of dW with the node's tangent in its place)^T``."""
    generator = np.random.default_rng(3)
    names = list(bound.values)
    ways = {n: generator.standard_normal(v.shape) for n, v in bound.values.items()}
    for target in bound.targets:
        d_out, d_in = bound.shapes[target]
        (x, dx), (out, d_y) = (generator.standard_normal((2, 3, d)) for d in (d_in, d_out))
        tensors = [torch.from_numpy(a) for a in (x, dx, out, d_y)]

        def run(x: Tensor, out: Tensor, *nodes: Tensor) -> Tensor:
            state = {f"node_{n}": t for n, t in zip(names, nodes, strict=True)}
            return torch.func.functional_call(bound.adapter, state, (x, target, out))  # noqa: B023

        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(tensors[0], tensors[1]), forward_ad.make_dual(tensors[2].clone(), tensors[3])]
            duals += [
                forward_ad.make_dual(t.detach(), torch.from_numpy(ways[n])) for n, t in node_tensors(bound.adapter).items()
            ]
            value, tangent = forward_ad.unpack_dual(run(*duals))
        assert tangent is not None
        moved = [bound.weights({**bound.values, n: way})[target] for n, way in ways.items()]
        expected = d_y + dx @ bound.reference[target].T + sum(x @ m.T for m in moved)
        positive = bound.at({n: np.abs(v) for n, v in bound.values.items()})
        sizes = [positive.weights({**positive.values, n: np.abs(w)}, absolute=True)[target] for n, w in ways.items()]
        size = np.abs(d_y) + np.abs(dx) @ bound.magnitude[target].T + sum(np.abs(x) @ s.T for s in sizes)
        # As many roundings as the value itself has (test_equals_dense), for each of the terms that the product rule adds.
        allowed = (bound.roundings + 2) * (d_in + 2) * (len(names) + 2) * EPS * size
        assert (np.abs(tangent.numpy() - expected) <= allowed).all()
        error = np.abs(value.detach().numpy() - (out + x @ bound.reference[target].T))
        assert (error <= (bound.roundings + 2) * (d_in + 2) * EPS * (np.abs(out) + np.abs(x) @ bound.magnitude[target].T)).all()


@given(physical_cases(), st.sampled_from(["apply", "delta"]))
def test_tangents_of_random_physical_networks_are_the_oracles(case: Case, route: str) -> None:
    for bound in case.bound(route=route):
        assert_tangents(bound)


@given(flat_cases().filter(lambda c: not getattr(c.spec.projection, "tanh", False)), st.booleans())
def test_tangents_of_random_flat_networks_are_the_oracles(case: Case, recompute: bool) -> None:
    for bound in case.bound(recompute=recompute):
        assert_tangents(bound)


# --- a whole model --------------------------------------------------------------------------------------------------


def adapted(variant: str, make: type[nn.Module] = Tiny, **options: bool) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The model in float64, the adapter's parameters by their names in it, and an input."""
    model = seeded(0, make).double()
    targets = {Tiny: TARGETS, Mlp: ["up", "down"], ConvNet: ["first", "grouped", "line"]}[make]
    tuned = sl.attach(model, VARIANTS[variant], targets, seed=0, dtype=torch.float64, **options)
    perturb(tuned)
    x = noise(2, 4, 8, 8, dtype=torch.float64) if make is ConvNet else noise(2, 3, DIM, dtype=torch.float64)
    return model, {f"superlora.{n}": p for n, p in tuned.named_parameters()}, x


def function(model: nn.Module, names: list[str]) -> Callable[..., Tensor]:
    def run(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return y

    return run


def by_reverse_mode(run: Callable[..., Tensor], values: list[Tensor], ways: list[Tensor]) -> Tensor:
    """The tangent as the derivative of the (linear) gradient with respect to its cotangent: no forward mode anywhere."""
    leaves = [v.detach().requires_grad_() for v in values]
    y = run(*leaves)
    cotangent = torch.zeros_like(y).requires_grad_()
    grads = torch.autograd.grad(y, leaves, cotangent, create_graph=True)
    total = sum((g * w).sum() for g, w in zip(grads, ways, strict=True))
    [tangent] = torch.autograd.grad(total, cotangent)  # type: ignore[arg-type]
    return tangent


def close(found: Tensor, expected: Tensor) -> None:
    # Float64 through two blocks: some thousand roundings of 1e-16.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@contextmanager
def dual(values: list[Tensor], ways: list[Tensor]) -> Iterator[list[Tensor]]:
    with forward_ad.dual_level():
        yield [forward_ad.make_dual(v, w) for v, w in zip(values, ways, strict=True)]


@each_variant
def test_a_models_tangent_is_that_of_reverse_mode(variant: str) -> None:
    model, parameters, x = adapted(variant)
    run, values = function(model, list(parameters)), [x, *(p.detach() for p in parameters.values())]
    ways = [torch.randn_like(v) for v in values]
    expected = by_reverse_mode(run, values, ways)
    with dual(values, ways) as duals:
        close(forward_ad.unpack_dual(run(*duals)).tangent, expected)
    close(torch.func.jvp(run, tuple(values), tuple(ways))[1], expected)


@each_variant
def test_a_tangent_of_x_alone_passes_while_the_parameters_train(variant: str) -> None:
    """The parameters require grad, as they do in training, so that fused paths would be taken outside of the level."""
    model, parameters, x = adapted(variant)
    way = torch.randn_like(x)
    values = [x, *(p.detach() for p in parameters.values())]
    expected = by_reverse_mode(function(model, list(parameters)), values, [way, *(torch.zeros_like(v) for v in values[1:])])
    with dual([x], [way]) as [moved]:
        y = model(moved)
        close(forward_ad.unpack_dual(y).tangent, expected)
        grads = torch.autograd.grad(forward_ad.unpack_dual(y).primal.square().sum(), list(parameters.values()))
    for found, exact in zip(grads, torch.autograd.grad(model(x).square().sum(), list(parameters.values())), strict=True):
        close(found, exact)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["lora", "lotr", "loha", "lorta groups", "lorta fastfood"])
def test_hessian_vector_products_agree_in_all_orders(variant: str, recompute: bool) -> None:
    # torch's own reverse over forward mode is wrong through nn.LayerNorm, so without one.
    model, parameters, x = adapted(variant, Mlp, recompute=recompute)
    run, values = function(model, list(parameters)), [p.detach() for p in parameters.values()]
    ways = [torch.randn_like(v) for v in values]

    def loss(*values: Tensor) -> Tensor:
        return run(x, *values).square().sum()

    everything = tuple(range(len(values)))
    [*expected] = torch.autograd.functional.hvp(loss, tuple(values), tuple(ways))[1]
    over_reverse = torch.func.jvp(torch.func.grad(loss, everything), tuple(values), tuple(ways))[1]
    of_forward = torch.func.grad(lambda *v: torch.func.jvp(loss, v, tuple(ways))[1], everything)(*values)
    with dual([v.clone().requires_grad_() for v in values], ways) as duals:
        grads = torch.autograd.grad(loss(*duals), duals, create_graph=True)
        level = [forward_ad.unpack_dual(g).tangent for g in grads]
    for found in (over_reverse, of_forward, level):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)  # squares of sums of a hundred terms


@pytest.mark.parametrize("recompute", [False, True])
@each_variant
def test_a_gradient_has_the_tangent_of_its_cotangent(variant: str, recompute: bool) -> None:
    """The graph is made outside of the level, by the fused paths, and differentiated within it."""
    model, parameters, x = adapted(variant, recompute=recompute)
    x = x.requires_grad_()
    inputs = [x, *parameters.values()]
    y = model(x)
    cotangent, way = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, way, retain_graph=True)
    with dual([cotangent], [way]) as [moved]:
        grads = [forward_ad.unpack_dual(g) for g in torch.autograd.grad(y, inputs, moved)]
    for (_, tangent), exact in zip(grads, expected, strict=True):
        close(tangent, exact)


@pytest.mark.parametrize("variant", ["lora", "lokr", "loha", "lorta fastfood"])
def test_convolutions_have_tangents(variant: str) -> None:
    model, parameters, x = adapted(variant, ConvNet)
    run, values = function(model, list(parameters)), [x, *(p.detach() for p in parameters.values())]
    ways = [torch.randn_like(v) for v in values]
    with dual(values, ways) as duals:
        close(forward_ad.unpack_dual(run(*duals)).tangent, by_reverse_mode(run, values, ways))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.MultiheadAttention(DIM, 3, batch_first=True), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        # torch's fused attention has no second derivatives, which the reference takes.
        with sdpa_kernel(SDPBackend.MATH):
            return self.out(self.mix(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("at", [None, "weight"])
@pytest.mark.parametrize("variant", ["lora", "lotr", "lorta fastfood"])
def test_weights_that_show_their_update_have_tangents(variant: str, at: At | None) -> None:
    model = seeded(0, Attending).double()
    targets = ["mix.q_proj", "mix.v_proj", "mix.out_proj", "out"]
    tuned = sl.attach(model, VARIANTS[variant], targets, seed=0, dtype=torch.float64, at=at)
    perturb(tuned)
    parameters = {f"superlora.{n}": p for n, p in tuned.named_parameters()}
    run, x = function(model, list(parameters)), noise(2, 3, DIM, dtype=torch.float64)
    values = [x, *(p.detach() for p in parameters.values())]
    ways = [torch.randn_like(v) for v in values]
    with dual(values, ways) as duals:
        close(forward_ad.unpack_dual(run(*duals)).tangent, by_reverse_mode(run, values, ways))


def test_the_fused_paths_are_back_after_the_level() -> None:
    model, _, x = adapted("lora")
    with forward_ad.dual_level():
        model(x)
    used, apply = list[type](), tensorly_torch._apply
    with mock.patch.object(
        tensorly_torch, "_apply", lambda function, *rest: (used.append(function), apply(function, *rest))[1]
    ):
        model(x)
    assert tensorly_torch._FusedUpdate in used


def test_tanh_has_tangents() -> None:
    for bound in Case(TANH, {"w": (4, 6)}).bound():
        values = [t.detach() for t in node_tensors(bound.adapter).values()]
        ways = [torch.randn_like(v) for v in values]

        def run(*nodes: Tensor) -> Tensor:
            state = {f"node_{n}": t for n, t in zip(bound.values, nodes, strict=True)}  # noqa: B023
            x, out = torch.eye(6, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
            return torch.func.functional_call(bound.adapter, state, (x, "w", out))  # noqa: B023

        with dual(values, ways) as duals:
            close(forward_ad.unpack_dual(run(*duals)).tangent, by_reverse_mode(run, values, ways))
