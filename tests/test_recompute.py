"""Flat folds that keep no dW: each weight's slice is built in forward and again in backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import Largest, Tiny, noise, perturb, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl

TARGETS = ["q_proj", "v_proj"]
SPECS = {
    "lorta": sl.lorta(2),
    "lorta in groups that cut weights": sl.lorta(2, 3, 5),
    "many groups to a weight": sl.lorta(1, 3, 40),
    "2D reshape": sl.AdapterSpec(sl.CP(2), sl.FlatFold(2), alpha=3),
    "2D stacked": sl.AdapterSpec(sl.CP(2), sl.FlatFold(2, stacked=True)),
    "Kronecker": sl.superlora(2, 3, 2, 2),
    "vector": sl.AdapterSpec(sl.Dense(), sl.FlatFold(1, 3)),
    "projected": sl.lorta(2, 3, 3, sl.Fastfood(0.5, tanh=True), alpha=2),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def pair(spec: sl.AdapterSpec, **options: Any) -> tuple[nn.Module, sl.Tuned, nn.Module, sl.Tuned]:
    """The same adapted model twice: dW kept, and dW built again."""
    made = []
    for recompute in (False, True):
        model = seeded(0, Tiny).double()
        tuned = sl.attach(model, spec, TARGETS, dtype=torch.float64, recompute=recompute, **options)
        perturb(tuned)
        made += [model, tuned]
    return tuple(made)


def close(left: Tensor, right: Tensor) -> None:
    # Both add the same products in another order: a few hundred roundings of float64.
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


@each_spec
def test_outputs_and_gradients_are_those_of_a_kept_dw(spec: sl.AdapterSpec) -> None:
    kept, ours, again, theirs = pair(spec)
    x, z = (noise(2, 5, 12, dtype=torch.float64).requires_grad_() for _ in range(2))
    for _ in range(2):  # gradients accumulate
        left, right = kept(x), again(z)
        close(left, right)
        left.pow(2).sum().backward()
        right.pow(2).sum().backward()
    close(x.grad, z.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad.abs().max() > 0
        close(a.grad, b.grad)


@pytest.mark.parametrize("leading", [(), (0,), (3, 2, 2)])
def test_any_leading_axes_of_x(leading: tuple[int, ...]) -> None:
    for frozen in (True, False):  # a layer that trains keeps its own graph
        found = []
        for recompute in (False, True):
            torch.manual_seed(0)
            layer = nn.Linear(6, 4).double()
            tuned = sl.attach(nn.ModuleDict({"0": layer}), sl.lorta(2), ["0"], dtype=torch.float64, recompute=recompute)
            perturb(tuned)
            layer.weight.requires_grad_(not frozen)
            x = noise(*leading, 6, dtype=torch.float64).requires_grad_()
            y = layer(x)
            y.pow(2).sum().backward()
            found.append([y.detach(), x.grad, *(p.grad for p in tuned.parameters())])
        for left, right in zip(*found, strict=True):
            close(left, right)


@each_spec
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(spec: sl.AdapterSpec, reentrant: bool) -> None:
    kept, ours, again, theirs = pair(spec)
    x, z = (noise(2, 5, 12, dtype=torch.float64).requires_grad_() for _ in range(2))
    kept(x).pow(2).sum().backward()
    checkpoint(again, z, use_reentrant=reentrant).pow(2).sum().backward()
    close(x.grad, z.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)


def test_gradients_can_be_differentiated_again() -> None:
    kept, ours, again, theirs = pair(sl.lorta(2, 3, 5))
    second = []
    for model, tuned in ((kept, ours), (again, theirs)):
        x = noise(2, 5, 12, dtype=torch.float64).requires_grad_()
        parameters = list(tuned.parameters())
        first = torch.autograd.grad(model(x).pow(2).sum(), [x, *parameters], create_graph=True)
        second.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, *parameters]))
    for a, b in zip(*second, strict=True):
        # Second derivatives add up more products: a thousand roundings.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@each_spec
def test_gradients_of_many_cotangents_at_once(spec: sl.AdapterSpec) -> None:
    """By torch.func.vmap over a backward pass, in which no leaf may be made."""
    kept, ours, again, theirs = pair(spec)
    found = []
    for model, tuned in ((kept, ours), (again, theirs)):
        x = noise(2, 5, 12, dtype=torch.float64).requires_grad_()
        y, wanted = model(x), [x, *tuned.parameters()]
        ways = noise(3, *y.shape, dtype=torch.float64)
        found.append(torch.func.vmap(lambda way: torch.autograd.grad(y, wanted, way, retain_graph=True))(ways))  # noqa: B023
        for k, way in enumerate(ways):
            for left, right in zip(found[-1], torch.autograd.grad(y, wanted, way, retain_graph=True), strict=True):
                close(left[k], right)
    for left, right in zip(*found, strict=True):
        close(left, right)


def test_without_memory() -> None:
    """No device but those that compute has autocast to be asked for."""
    with torch.device("meta"):
        model = Tiny()
    tuned = sl.attach(model, sl.lorta(2), TARGETS, recompute=True)
    model(torch.empty(2, 5, 12, device="meta")).sum().backward()
    assert all(p.grad.is_meta for p in tuned.parameters())


class Chain(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("recompute", [False, True])
def test_only_one_weights_dw_is_alive_at_a_time(recompute: bool) -> None:
    width, layers = 16, 8
    model = Chain(layers, width)
    perturb(sl.attach(model, sl.lorta(2), r"layers\.\d", recompute=recompute))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), Largest() as largest:
        model(torch.randn(3, width)).sum().backward()
    frozen = {layer.weight.untyped_storage().data_ptr() for layer in model.layers}
    squares = [t for t in saved if t.numel() == width**2 and t.untyped_storage().data_ptr() not in frozen]
    side = math.ceil((layers * width**2) ** (1 / 3) - 1e-9)
    if recompute:
        assert not squares
        # One weight's slab, rounded up to whole rows of the slowest mode (a row is side ** 2).
        assert largest.numel <= width**2 + 2 * side**2
    else:
        assert len(squares) == layers
        assert largest.numel >= layers * width**2


def test_dw_of_one_weight_is_built_without_the_others() -> None:
    width, layers = 16, 8
    tuned = sl.attach(Chain(layers, width), sl.lorta(2), r"layers\.\d")
    side = math.ceil((layers * width**2) ** (1 / 3) - 1e-9)
    for name in tuned.targets:
        with Largest() as largest:
            tuned.delta(name)
        assert width**2 <= largest.numel <= width**2 + 2 * side**2


def test_convolutions_and_attention_keep_dw_but_compute_the_same() -> None:
    outputs = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
        perturb(sl.attach(model, sl.lorta(2), ["0", "1"], recompute=recompute))
        outputs.append(model(torch.ones(1, 3, 6, 6)))
    # The same slab of the same factors, multiplied in another order: single float32 roundings.
    torch.testing.assert_close(*outputs)
