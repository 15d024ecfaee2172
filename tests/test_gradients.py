"""Gradients equal those of the oracle.

dW is linear in each node (before a nonlinear map), so the oracle's central difference is exact at any step: its
derivative along E is dW with the node replaced by E. No truncation error enters any tolerance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import EPS, SHAPES, Bound, Case, flat_cases, node_tensors, physical_cases, targets
from test_equals_dense import VARIANTS

from superlora_tn.declare.fold import FlatFold
from superlora_tn.declare.maps import Fastfood
from superlora_tn.declare.parts import CP, Network, Node
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import lora, lorta, vera

TANH = AdapterSpec(CP(2), FlatFold(2, groups=2), Fastfood(0.5, seed=1, tanh=True), alpha=2)


def along(bound: Bound, name: str, direction: np.ndarray, cotangents: dict[str, np.ndarray], absolute: bool = False) -> float:
    """The oracle's derivative of ``sum_t <c_t, dW_t>`` along a direction of one node; absolute, a bound of its size."""
    weights = bound.weights({**bound.values, name: direction}, absolute)
    # Terms of a sum without the node stay as they are.
    rest = bound.weights({**bound.values, name: np.zeros_like(direction)}, absolute)
    sign = 1 if absolute else -1
    return float(sum(((weights[t] + sign * rest[t]) * c).sum() for t, c in cotangents.items()))


def assert_gradients(bound: Bound) -> None:
    generator = np.random.default_rng(2)
    cotangents = {t: generator.standard_normal(bound.shapes[t]) for t in bound.targets}
    loss = sum((bound.adapter.delta(t) * torch.from_numpy(c)).sum() for t, c in cotangents.items())
    names = [n for n, t in node_tensors(bound.adapter).items() if t.requires_grad]
    tensors = [node_tensors(bound.adapter)[n] for n in names]
    grads = torch.autograd.grad(loss, tensors)  # type: ignore[arg-type]
    elements = sum(c.size for c in cotangents.values())
    for name, grad in zip(names, grads, strict=True):
        for direction in directions(generator, tuple(grad.shape)):
            expected = along(bound, name, direction, cotangents)
            got = float((grad.numpy() * direction).sum())
            positive = bound.at({n: np.abs(v) for n, v in bound.values.items()})
            size = along(positive, name, np.abs(direction), {t: np.abs(c) for t, c in cotangents.items()}, absolute=True)
            # dW's own roundings, one sum over all elements of dW, one over the node's.
            assert abs(got - expected) <= (bound.roundings + 2 * (elements + grad.numel())) * EPS * size + 1e-300


def directions(generator: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    """A random direction, and one element alone."""
    single = np.zeros(shape)
    single[tuple(generator.integers(0, s) for s in shape)] = 1.0
    return [generator.standard_normal(shape), single]


LINEAR = [spec for spec in VARIANTS if not (spec.projection and getattr(spec.projection, "tanh", False))]


@pytest.mark.parametrize("spec", LINEAR, ids=repr)
def test_gradients_of_every_variant_equal_the_oracles(spec: AdapterSpec) -> None:
    for bound in Case(spec, SHAPES).bound():
        assert_gradients(bound)


@given(physical_cases() | flat_cases().filter(lambda c: not getattr(c.spec.projection, "tanh", False)))
def test_gradients_of_random_networks_equal_the_oracles(case: Case) -> None:
    for bound in case.bound():
        assert_gradients(bound)


@pytest.mark.parametrize(
    "spec", [*VARIANTS[:6], vera(2), TANH, lorta(1, 3, 2), lorta(2, 3, 2, Fastfood(0.6, 3, True))], ids=repr
)
def test_torch_gradcheck_passes(spec: AdapterSpec) -> None:
    """Autograd against numerical derivatives of the same code, all inputs at once, small weights."""
    for bound in Case(spec, targets(1, 2, (4, 6))).bound():
        names = [n for n, _ in bound.adapter.named_parameters()]
        target = bound.targets[-1]

        def run(x: torch.Tensor, out: torch.Tensor, *nodes: torch.Tensor) -> torch.Tensor:
            state = dict(zip(names, nodes, strict=True))  # noqa: B023
            return torch.func.functional_call(bound.adapter, state, (x, target, out))  # noqa: B023

        leaves = [torch.randn(2, d, dtype=torch.float64, requires_grad=True) for d in (6, 4)]
        leaves += [p.detach().clone().requires_grad_() for p in bound.adapter.parameters()]
        assert torch.autograd.gradcheck(run, leaves)


def test_gradients_through_tanh_equal_central_differences_of_the_oracle() -> None:
    [bound] = Case(TANH, targets(1, 2, (4, 6))).bound()
    cotangents = {t: np.cos(np.arange(24.0)).reshape(4, 6) for t in bound.targets}
    loss = sum((bound.adapter.delta(t) * torch.from_numpy(c)).sum() for t, c in cotangents.items())
    loss.backward()  # type: ignore[union-attr]
    generator, step = np.random.default_rng(4), 1e-4
    for name, parameter in node_tensors(bound.adapter).items():
        direction = generator.standard_normal(tuple(parameter.shape))
        ends = [along(bound, name, bound.values[name] + s * step * direction, cotangents) for s in (1, -1)]
        got = float((parameter.grad.numpy() * direction).sum())  # type: ignore[union-attr]
        # Truncation is step^2 / 6 times a third derivative; along such a direction that is below 1e4 here, so 2e-5.
        assert abs(got - (ends[0] - ends[1]) / (2 * step)) <= 2e-5 * max(1.0, abs(got))


@given(st.sampled_from(["apply", "delta"]), st.integers(1, 4))
def test_the_gradient_of_x_is_the_cotangent_times_dw(route: str, tokens: int) -> None:
    for bound in Case(lora(3, alpha=6), SHAPES).bound(route=route):
        x = torch.randn(tokens, 18, dtype=torch.float64, requires_grad=True)
        out = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
        cotangent = torch.randn(tokens, 12, dtype=torch.float64)
        bound.adapter(x, bound.targets[0], out).backward(cotangent)
        expected = cotangent.numpy() @ bound.reference[bound.targets[0]]
        size = np.abs(cotangent.numpy()) @ bound.magnitude[bound.targets[0]]
        assert (np.abs(x.grad.numpy() - expected) <= (bound.roundings + 24) * EPS * size).all()  # type: ignore[union-attr]
        assert torch.equal(out.grad, cotangent)  # type: ignore[arg-type]


@pytest.mark.parametrize("route", ["apply", "delta"])
def test_a_frozen_node_gets_no_gradient_and_is_no_parameter(route: str) -> None:
    network = Network("o i", {"r": 2}, B="o r", A=Node("r i", trainable=False))
    [bound] = Case(AdapterSpec(network), {"w": (4, 6)}).bound(route=route)
    assert [n for n, _ in bound.adapter.named_parameters()] == ["node_B"]
    x = torch.randn(2, 6, dtype=torch.float64)
    bound.adapter(x, "w", torch.zeros(2, 4, dtype=torch.float64)).sum().backward()
    assert node_tensors(bound.adapter)["A"].grad is None
    assert node_tensors(bound.adapter)["B"].grad is not None
