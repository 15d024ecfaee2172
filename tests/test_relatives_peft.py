"""Variants that are sums or cropped beside PEFT's own layers: outputs, gradients, counts; and sums inside PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optional import library
from strategies import Case, node_tensors
from torch import Tensor, nn

import superlora_tn as sl

IN, OUT = 18, 12


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pair(config: Any, spec: sl.AdapterSpec) -> tuple[nn.Module, Any, nn.Module, dict[str, Tensor]]:
    """PEFT's model and layer, ours with its nodes by name, on one base in float64."""
    torch.manual_seed(0)
    base = One().double()
    theirs: nn.Module = library("peft").get_peft_model(copy.deepcopy(base), config).double()
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert spec.count([(OUT, IN)]) == trained
    tuned = sl.attach(base, spec, ["layer"], dtype=torch.float64)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return theirs, theirs.base_model.model.layer, base, {n.rpartition("node_")[2]: p for n, p in tuned.named_parameters()}


def check(theirs: nn.Module, ours: nn.Module, nodes: dict[str, tuple[Tensor, Tensor]], moved: dict[str, Any]) -> None:
    """Ours gets PEFT's values through `moved`; sums of some 100 products of numbers of size 1, in float64.

    Args:
        theirs, ours: the models.
        nodes: name of our node -> ours, PEFT's.
        moved: name of our node -> PEFT's tensor to ours.
    """
    with torch.no_grad():
        for name, (own, given) in nodes.items():
            own.copy_(moved[name](given))
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    cotangent = torch.randn(2, 5, OUT, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    (ours(x) * cotangent).sum().backward()
    (theirs(x) * cotangent).sum().backward()
    for name, (own, given) in nodes.items():
        torch.testing.assert_close(own.grad, moved[name](given.grad), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("hybrid", [0, 5])
def test_gralora_with_its_hybrid_part_is_pefts(hybrid: int) -> None:
    blocks, rank, alpha = 3, 6, 4.0
    config = library("peft").GraloraConfig(target_modules=["layer"], r=rank, alpha=alpha, gralora_k=blocks, hybrid_r=hybrid)
    spec = sl.gralora(rank // blocks, blocks, hybrid, alpha=alpha / (rank + hybrid))
    theirs, layer, ours, own = pair(config, spec)
    mark = "t1_" if hybrid else ""
    # PEFT: A (input block, in / k, (output block, r / k)), B (output block, (input block, r / k), out / k).
    moved = {
        f"{mark}A": lambda a: a.unflatten(2, (blocks, -1)).permute(2, 0, 3, 1),
        f"{mark}B": lambda b: b.unflatten(1, (blocks, -1)).permute(0, 1, 3, 2),
        "t2_G": lambda g: g,
        "t2_H": lambda h: h,
    }
    nodes = {f"{mark}A": layer.gralora_A["default"], f"{mark}B": layer.gralora_B["default"]}
    if hybrid:
        nodes |= {"t2_G": layer.gralora_A_general["default"].weight, "t2_H": layer.gralora_B_general["default"].weight}
    check(theirs, ours, {n: (own[n], given) for n, given in nodes.items()}, moved)


@pytest.mark.parametrize("rank", [4, 5, 6, 7, 18])
def test_miss_with_its_padding_is_pefts(rank: int) -> None:
    """18 inputs: 6 and 18 divide them, the others leave a repetition that is cut."""
    theirs, layer, ours, own = pair(library("peft").MissConfig(target_modules=["layer"], r=rank), sl.miss(rank))
    check(theirs, ours, {"D": (own["D"], layer.miss_block["default"])}, {"D": lambda d: d.T})


PARTS = {
    "sum": sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.Dense())),
    "departed": sl.Sum(sl.CP(2), sl.Frozen(sl.CP(2)), weights=(1, -1)),
    "cropped": sl.Kronecker(sl.Dense(), sl.CP(1), crop=True),
}


@pytest.mark.parametrize("name", PARTS)
def test_inside_peft_it_trains_saves_and_merges(name: str, tmp_path: Path) -> None:
    peft = library("peft")
    from superlora_tn.peft import SuperLoraConfig

    torch.manual_seed(0)
    base = One().double()
    config = SuperLoraConfig(spec=sl.AdapterSpec(PARTS[name]), target_modules=["layer"])
    model = peft.get_peft_model(copy.deepcopy(base), config).double()
    x = torch.randn(3, IN, dtype=torch.float64)
    # The copy and what it copies are cast to float64 alike, so they cancel but for the order of a few sums.
    torch.testing.assert_close(model(x), base(x), rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    y = model(x)
    assert not torch.allclose(y, base(x))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    torch.testing.assert_close(again(x), y, rtol=1e-12, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)


def test_quanta_is_its_papers_gates_less_their_first_values() -> None:
    """QuanTA (Chen et al. 2024): gates on two axes of x each, one after the other, less the same at the start."""
    axes, sizes = (2, 3, 4), {"x1": 2, "x2": 3, "x3": 4}
    split = {f"{mode}{k + 1}": size for mode in "oi" for k, size in enumerate(axes)}
    gates = sl.Network(
        "(o1 o2 o3) (i1 i2 i3)", split | sizes, T12="x1 x2 i1 i2", T13="o1 x3 x1 i3", T23="o2 o3 x2 x3"
    )  # fmt: skip
    spec = sl.AdapterSpec(sl.Sum(gates, sl.Frozen(gates), weights=(1, -1)))
    width = 24
    assert spec.count([(width, width)]) == (2 * 3) ** 2 + (2 * 4) ** 2 + (3 * 4) ** 2
    x = np.random.default_rng(0).standard_normal((5, *axes))
    for bound in Case(spec, {"w": (width, width)}).bound():
        values = {n: t.detach().numpy() for n, t in node_tensors(bound.adapter).items()}

        def circuit(term: str) -> np.ndarray:
            """Each gate is a matrix that acts on two axes and leaves the third alone."""
            y = np.einsum("abij,tijk->tabk", values[f"{term}T12"], x)  # noqa: B023
            y = np.einsum("acik,tibk->tabc", values[f"{term}T13"], y)  # noqa: B023
            return np.einsum("bcjk,tajk->tabc", values[f"{term}T23"], y).reshape(5, -1)  # noqa: B023

        found = torch.from_numpy(x.reshape(5, -1)) @ bound.adapter.delta("w").detach().T
        # Sums of 24^2 products of normal numbers, in another order.
        np.testing.assert_allclose(found.numpy(), circuit("t1_") - circuit("t2_"), rtol=1e-9, atol=1e-9)
