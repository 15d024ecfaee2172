"""dW as a product of two thin matrices: equal to the oracle's, as thin as it should be, and taken where it pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from models import noise, perturb
from strategies import SHAPES, Bound, Case, physical_cases
from test_layers import CONVOLUTIONS, FUNCTION, Convolution, padded
from test_routes_agree import PHYSICAL
from torch import nn

import superlora_tn as sl
from superlora_tn.contraction.cut import halves
from superlora_tn.contraction.profile import CPU

GRID = sl.PhysicalFold("layer type out in")
# What is cut, and the width of the thinnest cut: of a ring of two bonds both are cut.
BONDS = {
    "lora": (sl.lora(3), 3),
    "loha": (sl.loha(3), 9),
    "lotr": (sl.lotr(3), 3),
    "vera": (sl.vera(3), 3),
    "cp": (sl.AdapterSpec(sl.CP(3), GRID), 3),
    "tucker, thinner at in": (sl.AdapterSpec(sl.Tucker((3, 2), factors="out in"), GRID), 2),
    "tucker, thinner at out": (sl.AdapterSpec(sl.Tucker((2, 3), factors="out in"), GRID), 2),
    "ring": (sl.AdapterSpec(sl.Network("o i", {"a": 2, "b": 3}, u="a o b", v="a i b")), 6),
    "kronecker": (sl.lokr(2), None),
    "dense": (sl.dense(), None),
}


@pytest.mark.parametrize(("spec", "bond"), BONDS.values(), ids=BONDS)
def test_the_thinnest_cut_is_found(spec: sl.AdapterSpec, bond: int | None) -> None:
    _, graph = spec.lay_out({f"layers.{k}.{t}": (16, 24) for k in range(2) for t in "qv"})[0]
    found = halves(graph, CPU, "dp")
    assert (found and found.bond) == bond


def assert_halves(bound: Bound) -> None:
    for target in bound.targets:
        found = bound.adapter.members[target].halves(10)
        if found is None:
            continue
        outer, inner = (half.detach().numpy() for half in found)
        d_out, d_in = bound.shapes[target]
        assert (len(outer), inner.shape[1]) == (d_out, d_in)
        # As `Bound.roundings`, which counts any order of contraction; the last product here is numpy's own.
        assert (np.abs(outer @ inner - bound.reference[target]) <= bound.error(target)).all()


@pytest.mark.parametrize("spec", PHYSICAL, ids=repr)
def test_halves_multiply_to_the_oracles_dw(spec: sl.AdapterSpec) -> None:
    for bound in Case(spec, SHAPES).bound(route="apply"):
        assert_halves(bound)


@given(physical_cases())
def test_halves_of_a_random_network_multiply_to_the_oracles_dw(case: Case) -> None:
    for bound in case.bound(route="apply"):
        assert_halves(bound)


@pytest.mark.parametrize("spec", [sl.lora(2, alpha=3), sl.loha(2), sl.lotr(2)], ids=["lora", "loha", "lotr"])
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_through_its_halves_is_one_by_dw(spec: sl.AdapterSpec, case: Convolution) -> None:
    kind, options, shape = case
    layer = kind(4, 6 if options.get("groups", 1) < 4 else 8, **options).double()
    model = nn.ModuleDict({"layer": layer})
    tuned = sl.attach(model, spec, ["layer"], dtype=torch.float64, route="apply")
    perturb(tuned)
    parameters = list(tuned.parameters())
    x = noise(*shape, dtype=torch.float64).requires_grad_()
    gradient = noise(*layer(x).shape, seed=1, dtype=torch.float64)
    [adapter] = {m for m in tuned.modules() if hasattr(m, "halves")}
    assert adapter.members["layer"].halves(1) is not None
    found = [layer(x), *torch.autograd.grad(layer(x), [x, *parameters], gradient)]

    plain = layer.padding_mode == "zeros"
    rest = (layer.stride, layer.padding if plain else 0, layer.dilation, layer.groups)
    weight = layer.weight + tuned.delta("layer").reshape(layer.weight.shape)
    y = FUNCTION[kind](x if plain else padded(layer, x), weight, layer.bias, *rest)
    for ours, expected in zip(found, [y, *torch.autograd.grad(y, [x, *parameters], gradient)], strict=True):
        torch.testing.assert_close(ours, expected)


def multiply_adds(layer: nn.Module, x: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("route", [None, "apply", "delta"])
def test_lora_on_a_convolution_costs_its_thin_products_unless_dw_is_forced(route: str | None) -> None:
    model = nn.ModuleDict({"layer": nn.Conv2d(32, 32, 3, padding=1)}).requires_grad_(False)
    x = noise(1, 32, 20, 20).requires_grad_()
    before = multiply_adds(model["layer"], x)
    perturb(sl.attach(model, sl.lora(2), ["layer"], route=route))
    more = multiply_adds(model["layer"], x) - before
    thin = 3 * 20 * 20 * 2 * (32 * 9 + 32)  # forward, and the gradients of both sides
    assert more == thin if route != "delta" else more > 1.4 * before


@pytest.mark.parametrize(
    ("layer", "rank"),
    [(nn.Conv2d(32, 32, 3), 20), (nn.Conv2d(32, 32, 3, groups=32), 2)],
    ids=["the bond is wide", "depthwise"],
)
def test_dw_is_built_where_halves_do_not_pay(layer: nn.Conv2d, rank: int) -> None:
    model = nn.ModuleDict({"layer": layer})
    [adapter] = {m for m in sl.attach(model, sl.lora(rank), ["layer"]).modules() if hasattr(m, "halves")}
    assert adapter.members["layer"].halves(4096, layer.groups) is None
