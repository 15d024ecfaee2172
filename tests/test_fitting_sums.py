"""Sums and crops from weights: recovered where they made them, stationary where they did not, taken in and taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import SHAPES, Bound, Case, flat_cases, physical_cases, targets
from test_convert import apart, random_adapter
from test_convert import by_oracle as of_nodes
from test_decompose import CONVERGED, ROUNDING, by_oracle, distance, made, noise

import superlora_tn as sl
from superlora_tn.declare.maps import Fastfood
from superlora_tn.files.own import Entry
from superlora_tn.tools.convert import convert
from superlora_tn.tools.decompose import FitError, decompose

PRIME = targets(2, 1, (13, 17))
ONE = targets(1, 1, (12, 12))
LOKR = sl.Kronecker(sl.Dense(), sl.Dense())
GATES = sl.quan_ta(3)
RECOVERED = {
    "two loras": (sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(1), weights=(1, -2)), alpha=2), SHAPES),
    "lora and kronecker": (sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR, weights=(1, -0.5))), SHAPES),
    "a sum in a product": (sl.AdapterSpec(sl.Kronecker(sl.Sum(sl.CP(1), sl.Dense()), sl.CP(2))), SHAPES),
    "a frozen copy": (sl.AdapterSpec(sl.Sum(sl.CP(3), sl.Frozen(sl.CP(3)), weights=(1, -1))), SHAPES),
    "a frozen copy of one of two": (sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR, sl.Frozen(sl.CP(2)), weights=(1, 2, -1))), SHAPES),
    "gralora with its hybrid part": (sl.gralora(2, 3, 1), SHAPES),
    "quanta": (GATES, ONE),
    "of all weights": (sl.AdapterSpec(sl.Sum(sl.Tucker(2, "out in"), sl.CP(1)), sl.PhysicalFold("member out in")), SHAPES),
    "flat": (sl.AdapterSpec(sl.Sum(sl.CP(2), sl.TensorTrain(1)), sl.FlatFold(3, 2)), SHAPES),
    "flat, shuffled": (sl.AdapterSpec(sl.Sum(sl.Tucker(2), sl.CP(1)), sl.FlatFold(3, 2), sl.Shuffle(3)), SHAPES),
    "flat, mapped": (sl.AdapterSpec(sl.Sum(sl.Tucker(2), sl.Dense()), sl.FlatFold(3), Fastfood(0.5)), SHAPES),
    "cropped kronecker": (sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense(), crop=True)), PRIME),
    "cropped lokr": (sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.CP(2), crop=True), alpha=3), PRIME),
    "cropped network": (
        sl.AdapterSpec(sl.Network("(a b) (c d)", {"a": 5, "c": 3, "r": 2}, crop=True, u="a c r", v="b r d")),
        PRIME,
    ),
    "cropped in a sum": (sl.AdapterSpec(sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.CP(1), crop=True))), PRIME),
    "miss": (sl.miss(4), PRIME),
    "kradapter": (sl.kradapter(), PRIME),
}


@pytest.mark.parametrize("name", RECOVERED)
def test_what_a_sum_or_a_crop_made_is_recovered_and_no_step_is_a_step_back(name: str) -> None:
    spec, shapes = RECOVERED[name]
    weights, frozen = made(spec, shapes)
    found = decompose(weights, spec, start=frozen, steps=400, restarts=12)
    assert found.error < CONVERGED
    assert max(distance(weights, by_oracle(found)).values()) < 10 * CONVERGED
    for key, value in frozen.items():
        assert torch.equal(found.tensors[key], value)
    for fit in found.fits:
        errors = np.array(fit.errors)
        # A sweep contracts the tensor again, by which the error is off by a rounding of what is wanted.
        assert (np.diff(errors) <= 1e-14).all()


def test_frozen_copies_stay_where_attach_puts_them() -> None:
    spec = sl.AdapterSpec(sl.Sum(sl.CP(3), sl.Frozen(sl.CP(3)), weights=(1, -1)))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(18, 12)).double()
    tuned = sl.attach(model, spec, ["0"], seed=5, dtype=torch.float64)
    found = decompose(noise({"0": (12, 18)}), spec, seed=5)
    held = {n.rpartition("node_")[2]: b for n, b in tuned.named_buffers() if "node_" in n}
    for side in ("out", "in"):
        name = f"t2_factor_{side}"
        torch.testing.assert_close(found.tensors[f"group0.{name}"], held[name], rtol=1e-6, atol=0)  # drawn in float32


def test_two_loras_are_the_truncated_singular_value_decomposition() -> None:
    """Eckart and Young: no matrix of rank 2 + 3 is nearer; the rest's norm is that of the other singular values."""
    weights = noise({"w": (16, 14)})
    found = decompose(weights, sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(3))))
    values = np.linalg.svd(weights["w"].numpy(), compute_uv=False)
    assert found.error == pytest.approx(np.linalg.norm(values[5:]) / np.linalg.norm(values), rel=1e-9)


def columns(bound: Bound, values: dict[str, np.ndarray], name: str) -> np.ndarray:
    """By the oracle: how dW of all weights moves with each number of a node, others as they are."""

    def all_of(node: np.ndarray) -> np.ndarray:
        return np.concatenate([w.reshape(-1) for w in bound.weights({**values, name: node}).values()])

    rest, found = all_of(np.zeros_like(values[name])), []
    for k in range(values[name].size):
        unit = np.zeros(values[name].size)
        unit[k] = 1
        found.append(all_of(unit.reshape(values[name].shape)) - rest)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("name", ["lora and kronecker", "a sum in a product", "cropped lokr", "cropped in a sum", "kradapter"])
def test_what_is_left_of_noise_is_seen_by_no_node(name: str) -> None:
    """At the nearest nodes the residual is orthogonal to every direction: through kept elements alone, and all terms."""
    spec, shapes = RECOVERED[name]
    shape = next(iter(shapes.values()))
    weights = noise({"w": shape})
    found = decompose(weights, spec, steps=2000, tolerance=1e-13, restarts=1)
    [bound] = Case(spec, {"w": shape}).bound()
    values = {n.name: found.tensors[f"group0.{n.name}"].numpy() for n in bound.graph.nodes}
    left = (weights["w"].numpy() - bound.weights(values)["w"]).reshape(-1)
    for node in bound.graph.nodes:
        moved = columns(bound, values, node.name)
        sine = np.linalg.norm(moved.T @ left) / (np.linalg.norm(moved) * np.linalg.norm(left))
        assert sine < 1e-5  # the error is then within 1e-10 of where this start leads


@given(physical_cases(depth=1, summed=True) | flat_cases(summed=True))
@settings(max_examples=25)
def test_errors_are_those_of_the_oracle_whatever_is_added(case: Case) -> None:
    if not all(n.trainable or n.copies for _, graph in case.spec.lay_out(case.shapes) for n in graph.nodes):
        return
    weights = noise(case.shapes)
    found = decompose(weights, case.spec, steps=3, restarts=1)
    for name, apart_by in distance(weights, by_oracle(found)).items():
        assert found.errors[name] == pytest.approx(apart_by, rel=1e-9, abs=1e-12)
    assert found.error <= 1 + 1e-12
    for fit in found.fits:
        assert (np.diff(fit.errors) <= 1e-13).all()


CONTAINED: dict[str, tuple[Any, Any, Any]] = {
    "two loras in one of their ranks' sum": (sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(1), weights=(1, -2))), sl.lora(3), SHAPES),
    "lora in a sum": (sl.lora(2, alpha=3), sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR)), SHAPES),
    "kronecker in a sum": (sl.AdapterSpec(LOKR), sl.AdapterSpec(sl.Sum(LOKR, sl.CP(2))), SHAPES),
    "a sum in itself": (sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR)), sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR)), SHAPES),
    "a sum in itself, scaled": (
        sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR)),
        sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR), alpha=3),
        SHAPES,
    ),
    "gralora in its hybrid": (sl.gralora(2, 2), sl.gralora(2, 2, 1), SHAPES),
    "a crop in itself": (sl.kradapter(), sl.kradapter(), PRIME),
    "a crop in dense": (sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.CP(1), crop=True)), sl.dense(), PRIME),
    "miss in lora": (sl.miss(4), sl.lora(4), PRIME),
    "a departed one in lora": (GATES, sl.dense(), ONE),
}


@pytest.mark.parametrize("name", CONTAINED)
def test_what_contains_a_sum_takes_it_in_exactly(name: str) -> None:
    source, to, shapes = CONTAINED[name]
    tensors, weights = random_adapter(Entry(source, shapes))
    found = convert(Entry(source, shapes), tensors, to)
    assert found.is_exact
    assert apart(of_nodes(found), weights) < 10 * ROUNDING
    if name in ("a sum in itself", "a crop in itself"):
        assert {fit.start for fit in found.fits} == {"the same network"}


def test_a_sum_in_what_does_not_contain_it_says_how_near() -> None:
    source = sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(2)))
    tensors, weights = random_adapter(Entry(source, SHAPES))
    found = convert(Entry(source, SHAPES), tensors, sl.lora(3))
    assert not found.is_exact
    assert found.error == pytest.approx(apart(of_nodes(found), weights), rel=1e-9)
    assert 0 < found.error < 1


def test_a_term_of_which_nothing_is_needed_stays_at_its_start() -> None:
    """It is zero by one node, so that it still trains."""
    weights, _ = made(sl.lora(2), SHAPES)
    found = decompose(weights, sl.AdapterSpec(sl.Sum(sl.CP(2), LOKR)))
    assert found.is_exact
    for k in range(len(found.fits)):
        zeros = [not bool(found.tensors[f"group{k}.t2_k{j}_weight"].any()) for j in (1, 2)]
        assert sum(zeros) == 1


def test_nodes_of_the_base_are_asked_for_and_maps_refused() -> None:
    hira = sl.Sum(sl.CP(1), sl.Hadamard(sl.Base(), sl.CP(1)))
    with pytest.raises(FitError, match="holds the base's 'base'"):
        decompose(noise({"w": (6, 5)}), sl.AdapterSpec(hira))
    base = noise({"w": (6, 5)}, 1)["w"]
    found = decompose(noise({"w": (6, 5)}), sl.AdapterSpec(hira), start={"group0.t2_h1_base": base})
    assert torch.equal(found.tensors["group0.t2_h1_base"], base)
    mapped = sl.Sum(sl.CP(1), sl.Network("o i", S=sl.Node("o i", map=sl.Fourier(3))))
    with pytest.raises(sl.SpecError, match="a node of this network has a map"):
        decompose(noise({"w": (6, 5)}), sl.AdapterSpec(mapped))
