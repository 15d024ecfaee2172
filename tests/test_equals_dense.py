"""dW and x dW^T of every variant, and of random networks on random folds, equal the dense oracle.

Tolerances are bounds, not guesses: see `strategies.Bound.roundings`. They scale with the number of terms summed and
with the same sum taken over absolute values, element by element.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import EPS, SHAPES, Bound, Case, cases, flat_cases, physical_cases, targets

from superlora_tn.declare.fold import FlatFold, FlatGroup, PhysicalFold
from superlora_tn.declare.maps import Fastfood
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, Network, Node, TensorTrain, Tucker
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora, vera

VARIANTS = [
    dense(alpha=2),
    lora(3, alpha=8, rslora=True),
    loha(2, alpha=2),
    lokr(2),
    lokr(1, factor=2, decompose_both=True),
    lonkr(1, splits=3),
    lotr(3, alpha=6),
    vera(5, alpha=3),
    lorta(2, order=3, groups=5),
    lorta(2, order=4, groups=2, projection=Fastfood(0.3, seed=4)),
    superlora(2, order=5),
    superlora(2, order=2, groups=7),
    superlora(2, order=2, groups="weight", splits=2),
    superlora(1, order=3, groups="weight", splits=2),
    superlora(1, order=1, groups=3),
    AdapterSpec(CP(4), PhysicalFold("layer type head out in", heads=3), alpha=1),
    AdapterSpec(Tucker(2), PhysicalFold("layer type head out in", heads=3)),
    AdapterSpec(TensorTrain(2), PhysicalFold("layer type head out in", heads=3)),
    AdapterSpec(TensorTrain((2, 3)), PhysicalFold("out layer in")),
    AdapterSpec(CP(3), FlatFold(2, groups=3, stacked=True)),
    AdapterSpec(Hadamard(Kronecker(Dense(), CP(2)), TensorTrain(2)), PhysicalFold("layer out in")),
]


def assert_delta(bound: Bound) -> None:
    for target in bound.targets:
        delta = bound.adapter.delta(target)
        assert tuple(delta.shape) == bound.shapes[target]
        error = np.abs(delta.detach().numpy() - bound.reference[target])
        assert (error <= bound.error(target)).all(), f"{target}: {np.max(error / bound.error(target)):.3g} x the bound"


def assert_forward(bound: Bound, leading: tuple[int, ...]) -> None:
    generator = np.random.default_rng(1)
    for target in bound.targets:
        d_out, d_in = bound.shapes[target]
        x, out = generator.standard_normal((*leading, d_in)), generator.standard_normal((*leading, d_out))
        given_out = torch.from_numpy(out.copy())
        result = bound.adapter(torch.from_numpy(x), target, given_out).detach().numpy()
        error = np.abs(result - (out + x @ bound.reference[target].T))
        size = np.abs(out) + np.abs(x) @ bound.magnitude[target].T
        # x enters one more sum of d_in terms, and the sum over the network's bonds may be split around it.
        allowed = (bound.roundings + 2) * (d_in + 2) * EPS * size
        assert result.shape == (*leading, d_out)
        assert (error <= allowed).all(), f"{target}: {np.max(error / allowed):.3g} x the bound"


@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_every_variants_delta_equals_the_oracle(spec: AdapterSpec) -> None:
    for bound in Case(spec, SHAPES).bound():
        assert_delta(bound)


@pytest.mark.parametrize("route", ["apply", "delta", None])
@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_every_variants_forward_equals_the_oracle(spec: AdapterSpec, route: str | None) -> None:
    if isinstance(spec.fold, FlatFold) and route == "apply":
        route = None
    for bound in Case(spec, SHAPES).bound(route=route):
        assert_forward(bound, (7,))


@given(physical_cases())
def test_a_random_network_on_a_physical_fold_equals_the_oracle(case: Case) -> None:
    for bound in case.bound():
        assert_delta(bound)


@given(flat_cases())
def test_a_random_network_on_a_flat_fold_equals_the_oracle(case: Case) -> None:
    for bound in case.bound():
        assert_delta(bound)


@given(physical_cases(), st.sampled_from(["apply", "delta", None]), st.sampled_from([(), (1,), (0,), (2, 3), (33,), (2, 0)]))
def test_forward_of_a_random_physical_network_equals_the_oracle(
    case: Case, route: str | None, leading: tuple[int, ...]
) -> None:
    for bound in case.bound(route=route):
        assert_forward(bound, leading)


@given(flat_cases(), st.sampled_from(["delta", None]), st.sampled_from([(), (1,), (2, 3)]))
def test_forward_of_a_random_flat_network_equals_the_oracle(case: Case, route: str | None, leading: tuple[int, ...]) -> None:
    for bound in case.bound(route=route):
        assert_forward(bound, leading)


@pytest.mark.parametrize("route", ["apply", "delta", None])
def test_a_strided_activation_equals_a_contiguous_one(route: str | None) -> None:
    [bound] = Case(lotr(3), SHAPES).bound(route=route)
    x = torch.randn(18, 5, 4, dtype=torch.float64).permute(2, 1, 0)
    out = torch.randn(12, 5, 4, dtype=torch.float64).permute(2, 1, 0)
    strided = bound.adapter(x, bound.targets[1], out)
    whole = bound.adapter(x.contiguous(), bound.targets[1], out.contiguous())
    # The same program on the same numbers; only BLAS' order of the 18 sums may differ between layouts.
    torch.testing.assert_close(strided, whole, rtol=0, atol=1e3 * EPS)


# --- each named variant against its paper's formula, node by node ---------------------------------------------------


def formula(name: str, bound: Bound, target: str) -> np.ndarray:
    """dW of the textbook, from nodes by their documented names."""
    v, place = bound.values, bound.targets.index(target)
    return {
        "lora": lambda: oracle.lora(v["factor_out"], v["factor_in"].T),
        "loha": lambda: oracle.loha(v["h1_factor_out"], v["h1_factor_in"].T, v["h2_factor_out"], v["h2_factor_in"].T),
        "lokr": lambda: oracle.lokr(v["k1_weight"], oracle.lora(v["k2_factor_out"], v["k2_factor_in"].T)),
        "lotr": lambda: oracle.lotr(v["factor_out"], v["core"][place], v["factor_in"]),
        "vera": lambda: oracle.vera(v["b"][place], v["B"], v["d"][place], v["A"]),
        "lonkr": lambda: oracle.kronecker([oracle.lora(v[f"k{k}_factor_out"], v[f"k{k}_factor_in"].T) for k in (1, 2, 3)]),
    }[name]()


NAMED = {"lora": lora(3), "loha": loha(2), "lokr": lokr(1), "lotr": lotr(2), "vera": vera(4), "lonkr": lonkr(1, 3)}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_variant_is_its_papers_formula(name: str) -> None:
    shapes = targets(2, 2, (64, 27)) if name == "lonkr" else SHAPES
    for bound in Case(NAMED[name], shapes).bound():
        for target in bound.targets:
            error = np.abs(bound.adapter.delta(target).detach().numpy() - formula(name, bound, target))
            assert (error <= bound.error(target)).all()


def test_lorta_is_a_tucker_sum_flattened_cut_joined_and_sliced() -> None:
    shapes = {"layer.0.q": (4, 5), "layer.1.q": (7, 3), "layer.1.v": (1, 6)}
    [bound] = Case(lorta(2, order=3, groups=4), shapes).bound()
    v = bound.values
    lengths = oracle.run_lengths(47, 4)
    vectors = [oracle.lorta_vector(v["core"][g], [v[f"factor_m{m}"][g] for m in (1, 2, 3)], max(lengths)) for g in range(4)]
    for target, expected in oracle.flat_weights(vectors, shapes).items():
        error = np.abs(bound.adapter.delta(target).detach().numpy() - expected)
        assert (error <= bound.error(target)).all()


# --- notation that a careless reading gets wrong --------------------------------------------------------------------


def test_tucker_gives_each_rank_to_the_factor_named_beside_it() -> None:
    [(_, graph)] = AdapterSpec(Tucker((2, 3), factors="in out")).lay_out({"w": (8, 6)})
    shape = {n.name: n.shape for n in graph.nodes}
    assert (shape["factor_in"], shape["factor_out"]) == ((6, 2), (8, 3))


@pytest.mark.parametrize("bond", ["out1", "in2", "token", "x", "r", "out11"])
def test_a_bond_may_have_any_name_that_no_mode_has(bond: str) -> None:
    network = Network("(o1 o2) (i1 i2)", {bond: 3}, a=f"o1 i1 {bond}", b=f"{bond} o2", c=f"i2 {bond}")
    for route in ("apply", "delta"):
        for bound in Case(AdapterSpec(network), {"w": (6, 10)}).bound(route=route):
            assert_delta(bound)
            assert_forward(bound, (4,))


def test_modes_numbered_past_nine_keep_their_own_indices() -> None:
    names = [f"i{k}" for k in range(1, 13)]
    network = Network(
        "(a b) " + " ".join(names[1:]), {"a": 2, "b": 2}, u="a " + " ".join(names[1:7]), v="b " + " ".join(names[7:])
    )
    spec = AdapterSpec(network, FlatFold(12, groups=1, splits=1))
    shapes = {"w": (3**6, 3**6 + 1)}  # above 3**12, so each of twelve sides is 4
    [(group, graph)] = spec.lay_out(shapes)
    assert [m.size for m in group.modes] == [4] * 12
    assert {n.name: n.shape for n in graph.nodes} == {"u": (2, *[4] * 6), "v": (2, *[4] * 5)}
    assert [np.prod([graph.size[i] for i in indices]) for _, indices in graph.modes] == [4] * 12
    assert len({i for _, indices in graph.modes for i in indices}) == 13


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_flat_fold_of_single_elements_equals_the_oracle(groups: int) -> None:
    shapes = {"layer.0.q": (1, 2), "layer.1.q": (1, 1)}
    for projection in (None, Fastfood(0.3)):
        for bound in Case(AdapterSpec(Dense(), FlatFold(1, groups), projection), shapes).bound():
            assert isinstance(bound.group, FlatGroup)
            assert_delta(bound)


def test_a_frozen_node_enters_dw_like_any_other() -> None:
    network = Network("o i", {"r": 2}, B="o r", s=Node("", trainable=False), A=Node("r i", trainable=False))
    for route in ("apply", "delta"):
        for bound in Case(AdapterSpec(network), {"w": (5, 4)}).bound(route=route):
            assert_delta(bound)
            assert_forward(bound, (3,))


@given(cases())
def test_dw_is_linear_in_alpha(case: Case) -> None:
    one, two = (Case(replace(case.spec, alpha=a), case.shapes) for a in (1.0, 2.0))
    for single, double in zip(one.bound(), two.bound(), strict=True):
        for target in single.targets:
            # Doubling is exact in binary, wherever the scale is multiplied in.
            assert torch.equal(2 * single.adapter.delta(target), double.adapter.delta(target))
