"""Adapters with fixed maps in narrow dtypes, cast, on the meta device, and in inference mode before and after training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_map_numbers import each_dtype
from torch import nn

import superlora_tn as sl
from superlora_tn.declare.maps import Compose, Fastfood, Shuffle
from superlora_tn.update import fixed_maps, walsh

SPECS = [
    sl.superlora(4, 3, 1, projection=Fastfood(0.5, 1)),
    sl.superlora(4, 3, 1, projection=Fastfood(0.3, 1, tanh=True)),
    sl.superlora(4, 3, 1, projection=Compose(Fastfood(0.5, 1), Shuffle(2), Fastfood(0.5, 3))),
    sl.lorta(2, 3, 3, Shuffle(1)),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@each_dtype
def test_dw_and_its_gradients_are_one_rounding_from_those_in_float64(
    dtype: torch.dtype, unit: float, least: float, spec: sl.AdapterSpec
) -> None:
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(3)))
    tuned = sl.attach(model, spec, ["0", "1", "2"], seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    wide = sl.tuned(copy.deepcopy(model).double())
    deltas = [(t.delta("1"), list(t.parameters())) for t in (tuned, wide)]
    assert deltas[0][0].dtype is dtype
    way = torch.randn(96, 96, generator=generator).to(dtype)
    results = [(d.detach(), *torch.autograd.grad(d, own, way.to(d.dtype))) for d, own in deltas]
    for found, exact in zip(*results, strict=True):
        # In float32 on the way: sums over ranks, two transforms and 9,216 elements, in all below 2**-18 of the largest.
        inner = 2.0**-18 * float(exact.abs().max())
        assert ((found.double() - exact).abs() <= unit * exact.abs() + inner + least).all()


@pytest.mark.parametrize("cast", [lambda m: m.half().float(), lambda m: m.bfloat16().float(), lambda m: m.double().float()])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_model_that_was_cast_and_saved_loads_as_it_is(
    spec: sl.AdapterSpec, cast: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    tuned = sl.attach(model, spec, ["0"], seed=0)
    for p in tuned.parameters():
        nn.init.normal_(p)
    cast(model)
    tuned.save(tmp_path)
    loaded = sl.load(nn.Sequential(nn.Linear(12, 12)), tmp_path)
    assert torch.equal(loaded.delta("0"), tuned.delta("0"))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_an_adapter_on_the_meta_device_has_no_tables_until_it_is_emptied(
    spec: sl.AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 12))
    with monkeypatch.context() as patch:
        patch.setattr(fixed_maps, "_raw", None)  # drawing a table would fail
        tuned = sl.attach(model, spec, ["0"], seed=0)
        assert all(tensor.is_meta for tensor in (*tuned.parameters(), *tuned.buffers()))
    model.to_empty(device="cpu")
    tuned.reset_parameters()
    known = sl.attach(nn.Sequential(nn.Linear(12, 12)), spec, ["0"], seed=0)
    for handle in (tuned, known):
        for k, p in enumerate(handle.parameters()):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(k))
    assert torch.equal(tuned.delta("0"), known.delta("0"))


@pytest.mark.parametrize("first", [True, False], ids=["inference first", "training first"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_inference_and_training_in_any_order(spec: sl.AdapterSpec, copied: bool, first: bool) -> None:
    walsh._known.cache_clear()
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    sl.attach(model, spec, ["0", "1"], seed=0)
    x, grads = torch.randn(3, 12), []
    for inference in (first, not first, first, not first):
        if inference:
            with torch.inference_mode():
                model(x)
                if copied:
                    copy.deepcopy(sl.tuned(model).adapters[0].map)(torch.randn(sl.tuned(model).adapters[0].map.size_in))
        else:
            model.zero_grad()
            model(x).square().sum().backward()
            grads.append([p.grad.clone() for p in sl.tuned(model).parameters()])
    assert all(map(torch.equal, *grads))
