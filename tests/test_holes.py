"""Values that `mutations` found unguarded: a planted fault went through the whole suite, or nearly, without these tests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from models import noise, perturb
from strategies import Case
from test_equals_dense import assert_delta
from test_sharing import adapted
from torch import nn

import superlora_tn as sl
from superlora_tn.contraction.plan import choose, make_plan
from superlora_tn.contraction.profile import Device
from superlora_tn.declare.fold import FlatFold
from superlora_tn.declare.parts import CP, Kronecker, Network, Node, TensorTrain, Tucker
from superlora_tn.network.expand import lower_group
from superlora_tn.update.make import make_adapter
from superlora_tn.update.physical import PhysicalAdapter
from superlora_tn.verification.cases import ratio

# --- declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "rank"), [(Tucker((2, 4)), 4), (TensorTrain((3,)), 3), (TensorTrain((1, 3, 2)), 3), (Kronecker(CP(1), CP(5)), 5)]
)
def test_alpha_is_divided_by_the_largest_rank(part: sl.Part, rank: int) -> None:
    assert sl.AdapterSpec(part, alpha=60).scale == 60 / rank


def test_a_split_at_half_its_longer_side_is_dense() -> None:
    """PEFT's rule at its border, where the split is not square and the counts differ: 6 x 8 at rank 4."""
    assert sl.lokr(4).count([(24, 64)]) == oracle.count_lokr(4, [(24, 64)]) == 4 * 8 + 6 * 8
    assert sl.lokr(3).count([(24, 64)]) == oracle.count_lokr(3, [(24, 64)]) == 4 * 8 + 3 * (6 + 8)


def test_a_ratio_is_of_the_mean_group_not_of_the_longest() -> None:
    [group] = FlatFold(2, groups=4).lay_out({"w": (13, 1)}, 0.9)
    assert (group.length, group.inner) == (4, math.ceil(0.9 * 13 / 4))


def test_a_weight_of_several_whole_groups_begins_with_its_own() -> None:
    """Ten groups of 8 elements: the second weight is made of the last eight."""
    [bound] = Case(sl.lorta(1, groups=10), {"a": (4, 4), "b": (8, 8)}).bound()
    assert_delta(bound)


def test_a_budget_may_be_spent_whole() -> None:
    one = sl.lora(1).count([(96, 64)])
    for budget, rank in ((8 * one - 1, 7), (8 * one, 8)):
        choice = sl.fit(sl.lora, budget, [(96, 64)])
        assert (choice.count, choice.next_count) == (rank * one, (rank + 1) * one)


# --- first values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [sl.lora(8), sl.loha(8), sl.lotr(8), sl.lorta(8)], ids=["lora", "loha", "lotr", "lorta"])
def test_the_first_values_variances_multiply_to_loras(spec: sl.AdapterSpec) -> None:
    [(group, graph)] = spec.lay_out({"w": (64, 400)})
    adapter = make_adapter(spec, group, graph, generator=torch.Generator().manual_seed(0))
    product = math.prod(float(tensor.detach().var()) for tensor in adapter.tensors() if tensor.any())
    # The variance of n uniform numbers is off by a factor of 1 + sqrt(0.8 / n), here 1.06 at most for each of 3 nodes.
    assert product * 3 * 400 == pytest.approx(1, rel=0.3)


# --- scale, everywhere ----------------------------------------------------------------------------------------------


def test_second_derivatives_carry_the_scale() -> None:
    layer = nn.Linear(3, 2).double()
    tuned = sl.attach(nn.ModuleDict({"layer": layer}), sl.lora(1, alpha=3), ["layer"], seed=0, dtype=torch.float64)
    perturb(tuned)
    x = noise(4, 3, dtype=torch.float64).requires_grad_()
    torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0].square().sum().backward()
    factors = [p.detach().clone().requires_grad_() for p in tuned.parameters()]
    z = x.detach().requires_grad_()
    y = nn.functional.linear(z, layer.weight + 3 * factors[0] @ factors[1].T, layer.bias)
    outer = torch.autograd.grad(y.pow(3).sum(), z, create_graph=True)[0].square().sum()
    for ours, theirs in zip((x, *tuned.parameters()), torch.autograd.grad(outer, (z, *factors)), strict=True):
        torch.testing.assert_close(ours.grad, theirs)


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_carries_the_scale_with_and_without_gradients(grad: bool) -> None:
    class Own(nn.Linear):
        """Its output is not written to."""

    for layer in (nn.Linear(4, 3).double(), Own(4, 3).double(), nn.Conv1d(4, 3, 1).double()):
        tuned = sl.attach(nn.ModuleDict({"layer": layer}), sl.lora(2, alpha=6), ["layer"], seed=0, dtype=torch.float64)
        perturb(tuned)
        x = noise(5, 4, dtype=torch.float64) if isinstance(layer, nn.Linear) else noise(5, 4, 1, dtype=torch.float64)
        up, down = tuned.parameters()
        weight = layer.weight.detach().flatten(1) + 3 * (up @ down.T).detach()
        with torch.set_grad_enabled(grad):
            y = layer(x)
        torch.testing.assert_close(y.detach().flatten(1), nn.functional.linear(x.flatten(1), weight, layer.bias))


def test_the_scale_stands_behind_the_nonlinear_map() -> None:
    spec = sl.lorta(2, projection=sl.Fastfood(0.5, tanh=True), alpha=200.0)
    [(group, graph)] = spec.lay_out({"w": (6, 8)})
    adapter = make_adapter(spec, group, graph, dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(1.0)
    largest = float(adapter.delta("w").detach().abs().max())
    assert 1 < largest <= 100  # |tanh| is below 1 and the scale is 200 / 2


# --- layers ---------------------------------------------------------------------------------------------------------


def test_a_weight_that_trains_gets_its_gradient_without_a_bias() -> None:
    layer = nn.Linear(4, 3, bias=False)
    tuned = sl.attach(nn.ModuleDict({"layer": layer}), sl.lora(2), ["layer"], seed=0)
    perturb(tuned)
    layer.weight.requires_grad_(True)
    x = noise(5, 4)
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * y.detach().T @ x)


@pytest.mark.parametrize("spec", [sl.lora(2, dropout=0.5), replace(sl.lorta(2), dropout=0.5)], ids=["lora", "lorta"])
def test_dropout_drops_nothing_of_the_bases_gradient(spec: sl.AdapterSpec) -> None:
    """dW is zero at the start, so x gets the base's gradient alone."""
    layer = nn.Linear(40, 3).double()
    sl.attach(nn.ModuleDict({"layer": layer}), spec, ["layer"], seed=0, dtype=torch.float64)
    x = noise(2, 40, dtype=torch.float64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, 40))


def test_a_layer_called_alone_never_takes_an_older_dw() -> None:
    """A pass of the model whose gradient never comes back leaves a shared dW behind."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    tuned = sl.attach(model, sl.lorta(2, groups=2), ["0", "1"], seed=0)
    perturb(tuned)
    x = noise(5, 4)
    model(x)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(2)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model[0](x), base + x @ tuned.delta("0").T)


@pytest.mark.parametrize("name", ["lotr", "vera"])
def test_an_x_shared_by_two_calls_never_goes_through_older_factors(name: str) -> None:
    """Layers called alone: no pass of the model begins or ends between them."""
    model, tuned = adapted(name)
    block, x = model.layers[0], noise(5, 64, dtype=torch.float64)
    block.q_proj(x)
    with torch.no_grad():
        for adapter in tuned.adapters:
            for tensor in adapter.tensors():  # type: ignore[operator]
                tensor.mul_(2)
    base = nn.functional.linear(x, block.k_proj.weight, block.k_proj.bias)
    torch.testing.assert_close(block.k_proj(x), base + x @ tuned.delta("layers.0.k_proj").T)


@pytest.mark.parametrize("shapes", [((6, 4), (4, 6)), ((5, 5), (5, 5))], ids=["24", "25"])
def test_a_pass_of_the_model_cuts_the_surplus_behind_each_group(shapes: tuple[tuple[int, int], ...]) -> None:
    """Two groups of 24 or of 25 elements, in tensors of 27; a pass builds both at once."""
    model = nn.Sequential(*(nn.Linear(d_in, d_out, bias=False) for d_out, d_in in shapes))
    tuned = sl.attach(model, sl.lorta(2, groups=2), ["0", "1"], seed=0)
    perturb(tuned)
    [adapter] = tuned.adapters
    core, *factors = (tensor.detach().double().numpy() for tensor in adapter.parameters())
    vectors = [oracle.lorta_vector(core[g], [f[g] for f in factors], math.prod(shapes[g])) for g in (0, 1)]
    first, second = oracle.flat_weights(vectors, dict(zip("01", shapes, strict=True))).values()
    x = noise(3, shapes[0][1])
    weights = [layer.weight.detach().double().numpy() for layer in list(model)[:2]]
    expected = x.double().numpy() @ (weights[0] + first).T @ (weights[1] + second).T
    # float32 sums of some fifty products of numbers of about 1.
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=0, atol=1e-3)


# --- plans ----------------------------------------------------------------------------------------------------------

# No bytes, no latency: a price is its FLOPs alone.
IDEAL = Device("ideal", 1e9, math.inf, 0.0)


def test_a_call_takes_the_plan_of_the_largest_number_of_tokens_not_above_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the plan for 1 token goes through the network, and the one for 32 builds dW."""
    spec, built, build = sl.lokr(2), [], PhysicalAdapter.delta_of
    [(group, graph)] = spec.lay_out({"w": (16, 16)})
    assert [choose(graph, (16, 16), tokens).route for tokens in (1, 32)] == ["apply", "delta"]
    adapter = make_adapter(spec, group, graph)
    monkeypatch.setattr(PhysicalAdapter, "delta_of", lambda self, target: built.append(target) or build(self, target))
    for tokens, times in ((31, 0), (32, 1)):
        adapter(noise(tokens, 16), "w", torch.zeros(tokens, 16))
        assert len(built) == times, f"{tokens} tokens"


def test_a_plan_is_priced_for_its_own_device() -> None:
    spec = sl.lora(4)
    graph = lower_group(spec.network, spec.fold.lay_out({"w": (96, 64)})[0])
    slow = replace(IDEAL, flops=IDEAL.flops / 10)
    for route in ("apply", "delta"):
        fast_plan, slow_plan = (make_plan(graph, route, 64, device) for device in (IDEAL, slow))  # type: ignore[arg-type]
        assert (fast_plan.device.flops, slow_plan.device.flops) == (IDEAL.flops, slow.flops)
        assert slow_plan.price == pytest.approx(10 * fast_plan.price)
    fast_choice, slow_choice = (choose(graph, (96, 64), 64, device) for device in (IDEAL, slow))
    assert slow_choice.delta_price == pytest.approx(10 * fast_choice.delta_price)


@pytest.mark.parametrize(("trained", "products"), [(True, 3), (False, 2)])
def test_a_price_counts_the_products_of_forward_and_backward(trained: bool, products: int) -> None:
    """One for the result, and one for each operand with a gradient."""
    spec = sl.AdapterSpec(Network("o i", {"r": 4}, b="o r", a=Node("r i", trainable=trained)))
    graph = lower_group(spec.network, spec.fold.lay_out({"w": (96, 64)})[0])
    plan = make_plan(graph, "delta", 1, IDEAL)
    assert plan.price == pytest.approx(products * plan.flops / IDEAL.flops)
    whole = choose(graph, (96, 64), 50, IDEAL)
    assert whole.delta_price == pytest.approx(plan.price + 3 * 2 * 50 * 96 * 64 / IDEAL.flops)


# --- verification ---------------------------------------------------------------------------------------------------


def product(params: dict[str, np.ndarray]) -> np.ndarray:
    return params["factor_out"] @ params["factor_in"].T


def test_verify_notices_an_error_of_a_billionth() -> None:
    """float64 rounds to 1e-16, and few sums are taken: a billionth is some hundred thousand times the bound."""
    assert sl.verify(sl.lora(2), product, examples=8)
    certificate = sl.verify(sl.lora(2), lambda params: product(params) * (1 + 1e-9), examples=8)
    assert [row.claim for row in certificate.failures] == ["dW"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_verify_takes_no_number_that_is_none(wrong: float) -> None:
    assert ratio(np.array([1.0, wrong]), np.array([1.0, 1.0]), np.array([1.0, 1.0])) == math.inf
    assert not sl.verify(sl.lora(2), lambda params: product(params) * wrong, examples=4)
