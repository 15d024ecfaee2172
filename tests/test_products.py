"""Matrix products by oneDNN, and weighted sums, against numpy in float64; and when oneDNN is taken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from models import noise
from superlora_tn_backends import products
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import superlora_tn as sl

EPS = float(np.finfo(np.float32).eps)
# (m, k, n): each above the sizes from which oneDNN is taken.
SIZES = ((6000, 64, 96), (128, 2048, 64), (300, 500, 64))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN wherever it exists, whatever the processor; the shapes it was called with."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    seen: list[tuple[int, ...]] = []

    def linear(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append((*x.shape, weight.shape[0]))
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, *rest)

    monkeypatch.setattr(products, "_onednn", lambda: linear)
    return seen


def rows(*shape: int) -> Tensor:
    return noise(*shape, seed=1)


def columns(*shape: int) -> Tensor:
    return noise(*reversed(shape), seed=2).t()


@pytest.mark.parametrize("right", [rows, columns])
@pytest.mark.parametrize("left", [rows, columns])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_the_oracles(
    size: tuple[int, int, int], left: Callable[..., Tensor], right: Callable[..., Tensor], calls: list[tuple[int, ...]]
) -> None:
    m, k, n = size
    a, b = left(m, k), right(k, n)
    wide_a, wide_b = (t.numpy().astype(np.float64) for t in (a, b))
    # Each of k products and k - 1 sums rounds at most once.
    allowed = k * EPS * (np.abs(wide_a) @ np.abs(wide_b))
    assert (np.abs(products.matmul(a, b).numpy() - wide_a @ wide_b) <= allowed).all()
    assert calls == [(m, k, n)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(3, 5, 700), (3, 5, 7), (20, 18, 600), (0, 5, 700)])
def test_weighted_sums_are_the_oracles(shape: tuple[int, int, int], axis: int) -> None:
    a, weights = noise(*shape), noise(*(1 if k == 1 - axis else s for k, s in enumerate(shape)), seed=1)
    wide = a.numpy().astype(np.float64) * weights.numpy()
    allowed = (shape[axis] + 1) * EPS * np.abs(wide).sum(axis)
    found = products.weighted_sum(a, weights, axis)
    assert (np.abs(found.numpy() - wide.sum(axis)) <= allowed).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (noise(2048, 512, dtype=torch.float64), noise(512, 64, dtype=torch.float64)),
        (noise(64, 64), noise(64, 64)),
        (noise(1 << 20, 8), noise(8, 4)),
        (noise(1 << 14, 64).t(), noise(1 << 14, 64)),
        (noise(2048, 1024)[:, :512], noise(512, 64)),
        (noise(2048, 512), noise(64, 1024).t()[:512]),
    ],
    ids=["float64", "small", "narrow", "long", "gaps left", "gaps right"],
)
def test_others_stay_with_torch(a: Tensor, b: Tensor, calls: list[tuple[int, ...]]) -> None:
    assert torch.equal(products.matmul(a, b), a @ b)
    assert not calls


def test_torchs_own_switch_is_heeded(calls: list[tuple[int, ...]]) -> None:
    a, b = noise(512, 512), noise(512, 64)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        products.matmul(a, b)
    assert not calls
    products.matmul(a, b)
    assert calls


def test_who_counts_flops_sees_every_product(calls: list[tuple[int, ...]]) -> None:
    with FlopCounterMode(display=False) as counter:
        products.matmul(noise(512, 512), noise(512, 64))
    assert counter.get_total_flops() == 2 * 512 * 512 * 64
    assert not calls


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_tangents_go_through_torchs_products(calls: list[tuple[int, ...]]) -> None:
    """A gradient may have one, and oneDNN's operation would drop it."""
    a, b, way = noise(512, 512), noise(512, 64), noise(512, 512, seed=1)
    with forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(products.matmul(forward_ad.make_dual(a, way), b))
    assert not calls
    assert torch.equal(tangent, way @ b)
    assert torch.equal(torch.func.jvp(lambda a: products.matmul(a, b), (a,), (way,))[1], way @ b)
    assert not calls


def test_whether_onednn_is_there_hangs_on_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once a process, wherever the first large product happens to be."""

    def first() -> object:
        products._onednn.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "another"})
        products.matmul(noise(512, 512), noise(512, 64))
        return products._onednn()

    plain = first()
    if plain is None:
        pytest.skip("this torch has no oneDNN")
    try:
        torch.set_default_dtype(torch.float64)
        assert first() is plain
        torch.set_default_dtype(torch.bfloat16)
        assert first() is plain
        torch.set_default_dtype(torch.float32)
        with torch.inference_mode():
            assert first() is plain
        with FlopCounterMode(display=False) as counter:
            products.matmul(noise(512, 512), noise(512, 64))
        assert counter.get_total_flops() == 2 * 512 * 512 * 64
    finally:
        torch.set_default_dtype(torch.float32)
        products._onednn.cache_clear()


def test_a_layers_output_and_gradients_are_the_oracles(calls: list[tuple[int, ...]]) -> None:
    width, tokens, rank = 512, 520, 7
    model = nn.ModuleDict({"layer": nn.Linear(width, width)})
    tuned = sl.attach(model, sl.loha(rank, alpha=3), ["layer"], route="apply")
    parameters = dict(tuned.named_parameters())
    for k, value in enumerate(parameters.values()):
        value.data.copy_(noise(*value.shape, seed=k + 1))
    x, gradient = noise(tokens, width, seed=7).requires_grad_(), noise(tokens, width, seed=8)
    model["layer"](x).backward(gradient)
    assert len(calls) > 4

    wide = {n.rsplit(".", 1)[1]: p.detach().numpy().astype(np.float64) for n, p in parameters.items()}
    b1, a1, b2, a2 = (wide[f"node_h{k}_factor_{side}"] for k in (1, 2) for side in ("out", "in"))
    weight = model["layer"].weight.detach().numpy().astype(np.float64)
    g, wide_x = gradient.numpy().astype(np.float64), x.detach().numpy().astype(np.float64)
    scale = 3 / rank
    update = scale * oracle.loha(b1, a1.T, b2, a2.T)
    of_update = scale * g.T @ wide_x
    expected = {
        "x": g @ (weight + update),
        "node_h1_factor_out": (of_update * (b2 @ a2.T)) @ a1,
        "node_h2_factor_in": (of_update * (b1 @ a1.T)).T @ b2,
    }
    found = {"x": x.grad, **{n.rsplit(".", 1)[1]: p.grad for n, p in parameters.items()}}
    for name, value in expected.items():
        # Sums of up to tokens * width terms of one size: their errors average out to far less than 1e-5 of the largest.
        assert np.abs(found[name].numpy() - value).max() <= 1e-5 * np.abs(value).max(), name
