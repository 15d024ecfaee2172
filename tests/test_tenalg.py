"""The TensorLy plug-in: TensorLy's functions agree with its core, its own tests pass, and nothing outlives the block."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given
from hypothesis import strategies as st
from opt_einsum.paths import PathOptimizer
from strategies import EPS
from superlora_tn_backends import tenalg
from superlora_tn_backends.tenalg import einsum, planned
from tensorly import decomposition
from tensorly.backend.pytorch_backend import PyTorchBackend
from tensorly.tenalg.einsum_tenalg import EinsumTenalgBackend
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import superlora_tn

ROOT = Path(superlora_tn.__file__).parents[1]
DOCS = (ROOT / "docs" / "tensorly.md").read_text()
TL_HOME = Path(tl.__file__).parent
MANAGERS = (tl.backend, tl.tenalg)
TINY = np.finfo(np.float64).tiny

# --- settings --------------------------------------------------------------------------------------------------------


def current() -> tuple[object, ...]:
    return tuple(m.current_backend() for m in MANAGERS)


def own_settings() -> list[dict[str, object]]:
    """What this thread has set for itself."""
    return [dict(vars(m._THREAD_LOCAL_DATA)) for m in MANAGERS]


@contextmanager
def core(algebra: object = "core") -> Iterator[None]:
    """TensorLy as it comes, on PyTorch."""
    before = current()
    tl.set_backend("pytorch", local_threadsafe=True)
    tl.tenalg.set_backend(algebra, local_threadsafe=True)
    try:
        yield
    finally:
        for manager, backend in zip(MANAGERS, before, strict=True):
            manager.set_backend(backend, local_threadsafe=True)


@contextmanager
def without_torch_einsum() -> Iterator[None]:
    """Whatever falls back, fails."""
    with mock.patch.object(PyTorchBackend, "einsum", staticmethod(lambda *_: pytest.fail("fell back to torch.einsum"))):
        yield


def calls() -> int:
    """How many equations have come to the planner since the cache was cleared."""
    info = tenalg.cache_info()
    return int(info.hits + info.misses)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def gradients(result: Tensor, weight: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Those of the weighted sum of a result; 0 for a tensor that it does not use."""
    return list(torch.autograd.grad((result * weight).sum(), tensors, allow_unused=True, materialize_grads=True))


# --- TensorLy's functions --------------------------------------------------------------------------------------------

Case = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]
X, RANK = (3, 4, 5), 2
FACTORS = tuple((n, RANK) for n in X)
CP, TUCKER = ((RANK,), *FACTORS), ((2, 2, 2), *FACTORS)
TT, TR = ((1, 3, 2), (2, 4, 2), (2, 5, 1)), ((2, 3, 2), (2, 4, 2), (2, 5, 2))
TT_MATRIX = ((1, 3, 2, 2), (2, 4, 3, 2), (2, 2, 5, 1))
MATRICES = ((6, 3), (2, 4), (7, 5))
tlg = tl.tenalg
ROUTED: dict[str, Case] = {
    "mode_dot": (lambda x, m: tlg.mode_dot(x, m, 1), (X, (6, 4))),
    "mode_dot of a vector": (lambda x, v: tlg.mode_dot(x, v, 2), (X, (5,))),
    "mode_dot transposed": (lambda x, m: tlg.mode_dot(x, m, 0, transpose=True), (X, (3, 6))),
    "multi_mode_dot": (lambda x, *m: tlg.multi_mode_dot(x, list(m)), (X, *MATRICES)),
    "multi_mode_dot of two modes": (lambda x, a, b: tlg.multi_mode_dot(x, [a, b], modes=[2, 0]), (X, (7, 5), (6, 3))),
    "multi_mode_dot with a skip": (lambda x, *m: tlg.multi_mode_dot(x, list(m), skip=1), (X, *MATRICES)),
    "multi_mode_dot of vectors": (lambda x, *v: tlg.multi_mode_dot(x, list(v)), (X, (3,), (4,), (5,))),
    "multi_mode_dot transposed": (lambda x, *m: tlg.multi_mode_dot(x, list(m), transpose=True), (X, *FACTORS)),
    "kronecker": (lambda *m: tlg.kronecker(list(m)), ((2, 3), (3, 2), (4, 2))),
    "kronecker reversed": (lambda *m: tlg.kronecker(list(m), reverse=True), ((2, 3), (3, 2), (4, 2))),
    "khatri_rao": (lambda *m: tlg.khatri_rao(list(m)), FACTORS),
    "khatri_rao with weights": (lambda w, *m: tlg.khatri_rao(list(m), weights=w, skip_matrix=1), CP),
    "tucker_mode_dot of a vector": (
        lambda g, a, b, c, v: tl.tucker_mode_dot((g, [a, b, c]), v, 1, copy=True)[0],
        (*TUCKER, (4,)),
    ),
    "inner with n_modes": (lambda x, y: tlg.inner(x, y, n_modes=2), (X, (4, 5, 6))),
    "outer": (lambda *t: tlg.outer(list(t)), ((3,), (4, 2), (5,))),
    "batched_outer": (lambda *t: tlg.batched_outer(list(t)), ((3, 4), (3, 2), (3, 5))),
    "tensordot": (lambda x, y: tlg.tensordot(x, y, ([2], [1]), batched_modes=([0], [0])), (X, (3, 5, 6))),
    "unfolding_dot_khatri_rao": (lambda x, w, *m: tlg.unfolding_dot_khatri_rao(x, (w, list(m)), 1), (X, *CP)),
    "cp_to_tensor": (lambda w, *m: tl.cp_to_tensor((w, list(m))), CP),
    "cp_to_unfolded": (lambda w, *m: tl.cp_to_unfolded((w, list(m)), 1), CP),
    "cp_to_vec": (lambda w, *m: tl.cp_to_vec((w, list(m))), CP),
    "tucker_to_tensor": (lambda g, *m: tl.tucker_to_tensor((g, list(m))), TUCKER),
    "tucker_to_unfolded": (lambda g, *m: tl.tucker_to_unfolded((g, list(m)), 2), TUCKER),
    "tucker_to_vec": (lambda g, *m: tl.tucker_to_vec((g, list(m))), TUCKER),
    "tt_matrix_to_tensor": (lambda *f: tl.tt_matrix.tt_matrix_to_tensor(list(f)), TT_MATRIX),
    "tt_matrix_to_matrix": (lambda *f: tl.tt_matrix.tt_matrix_to_matrix(list(f)), TT_MATRIX),
    "tt_matrix_to_unfolded": (lambda *f: tl.tt_matrix.tt_matrix_to_unfolded(list(f), 1), TT_MATRIX),
    "tt_matrix_to_vec": (lambda *f: tl.tt_matrix.tt_matrix_to_vec(list(f)), TT_MATRIX),
}
UNROUTED: dict[str, Case] = {
    "tt_to_tensor": (lambda *f: tl.tt_to_tensor(list(f)), TT),
    "tt_to_unfolded": (lambda *f: tl.tt_to_unfolded(list(f), 1), TT),
    "tt_to_vec": (lambda *f: tl.tt_to_vec(list(f)), TT),
    "tr_to_tensor": (lambda *f: tl.tr_to_tensor(list(f)), TR),
    "tr_to_unfolded": (lambda *f: tl.tr_to_unfolded(list(f), 1), TR),
    "tr_to_vec": (lambda *f: tl.tr_to_vec(list(f)), TR),
    "cp_norm": (lambda w, *m: tl.cp_tensor.cp_norm((w, list(m))), CP),
    "cp_mode_dot": (lambda w, a, b, c, m: tl.cp_mode_dot((w, [a, b, c]), m, 1, copy=True)[1][1], (*CP, (6, 4))),
    "tucker_mode_dot": (lambda g, a, b, c, m: tl.tucker_mode_dot((g, [a, b, c]), m, 1, copy=True)[1][1], (*TUCKER, (6, 4))),
    "inner without n_modes": (lambda x, y: tlg.inner(x, y), (X, X)),
    "khatri_rao of one matrix": (lambda m: tlg.khatri_rao([m]), ((3, 2),)),
    "mode_dot at a negative mode": (lambda x, m: tlg.mode_dot(x, m, -1), (X, (6, 5))),
    "multi_mode_dot at a negative mode": (lambda x, m: tlg.multi_mode_dot(x, [m], modes=[-1]), (X, (6, 5))),
    "multi_mode_dot at a mode twice": (lambda x, a, b: tlg.multi_mode_dot(x, [a, b], modes=[0, 0]), (X, (3, 3), (3, 3))),
    "multi_mode_dot of no matrix": (lambda x: tlg.multi_mode_dot(x, []), (X,)),
    "kronecker of vectors": (lambda *v: tlg.kronecker(list(v), skip_matrix=1), ((2,), (3,), (4,))),
    "kronecker of tensors": (lambda *t: tlg.kronecker(list(t), reverse=True), ((2, 1, 3), (2, 2, 2))),
    "khatri_rao with a mask": (lambda m, w, *f: tlg.khatri_rao(list(f), weights=w, mask=m), ((60, 1), *CP)),
    "tl.dot": (lambda a, b: tl.dot(a, b), ((3, 4), (4, 5))),
    "tl.matmul": (lambda a, b: tl.matmul(a, b), ((3, 4), (4, 5))),
    "tl.tensordot": (lambda a, b: tl.tensordot(a, b, 1), ((3, 4), (4, 5))),
    "tl.kron": (lambda a, b: tl.kron(a, b), ((3, 4), (4, 5))),
}
# Each result is a sum of at most SUMMED products of at most 6 numbers, so any order of work errs by at most
# (SUMMED + 6) EPS times the same function of the magnitudes; two results differ by twice that.
SUMMED = 3 * 4 * 5 * RANK**3
ALLOWED = 2 * (SUMMED + 6) * EPS


@pytest.mark.parametrize("name", [*ROUTED, *UNROUTED])
def test_a_function_and_its_gradient_equal_those_of_the_core(name: str) -> None:
    run, shapes = {**ROUTED, **UNROUTED}[name]
    tensors = [t.requires_grad_() for t in draw(*shapes)]
    tenalg.cache_clear()
    with planned(), without_torch_einsum():
        got = run(*tensors)
        assert (calls() > 0) == (name in ROUTED), f"docs/tensorly.md says otherwise of {name}"
    with core():
        expected, size = run(*tensors), run(*[t.detach().abs() for t in tensors])
        weight = torch.randn_like(expected)
        magnitudes = [t.detach().abs().requires_grad_() for t in tensors]
        sizes = gradients(run(*magnitudes), weight.abs(), magnitudes)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= ALLOWED * size + TINY).all()
    if name == "cp_norm":  # a root of the sum of squares: its gradient is no sum of products
        return
    wanted = gradients(expected, weight, tensors)
    for one, other, big in zip(gradients(got, weight, tensors), wanted, sizes, strict=True):
        # One more factor (the weight), and a sum over the result.
        assert ((one - other).abs() <= (ALLOWED + 2 * (expected.numel() + 1) * EPS) * big + TINY).all()


def sections() -> tuple[str, str]:
    """The part of the docs on what is routed, and the part on what is not."""
    _, routed, unrouted, _ = re.split(r"^## (?:Routed|Not routed|Limits)$", DOCS, flags=re.MULTILINE)
    return routed, unrouted


@pytest.mark.parametrize("name", [*ROUTED, *UNROUTED])
def test_the_docs_say_where_a_function_runs(name: str) -> None:
    assert f"`{name.split()[0]}`" in sections()[name in UNROUTED]


@pytest.mark.parametrize("shape", [(6,), (6, 3), (5, 2, 3)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_moment_is_the_mean_over_the_samples(shape: tuple[int, ...], order: int) -> None:
    """TensorLy's einsum form gives the sum at order 1, and both of its forms raise above."""
    (tensor,) = draw(shape)
    products = []
    for sample in tensor:
        product = sample
        for _ in range(order - 1):
            product = torch.tensordot(product, sample, dims=0)
        products.append(product)
    with planned():
        found = tlg.higher_order_moment(tensor, order)
    torch.testing.assert_close(found, sum(products) / len(tensor), rtol=1e-12, atol=1e-12)


def test_a_mask_stays_out_of_the_callers_list() -> None:
    first, second, mask = draw((2, 3), (4, 3), (8,))
    given = [first, second]
    with planned():
        found = tlg.khatri_rao(given, mask=mask)
    assert len(given) == 2
    torch.testing.assert_close(found, torch.einsum("ar,br->abr", first, second).reshape(8, 3) * mask[:, None])


def test_complex_weights_and_transposed_vectors_are_conjugated_as_in_the_core() -> None:
    """TensorLy's einsum form conjugates the factors and the matrices alone."""
    x, w, a, b, c = draw(X, *CP, dtype=torch.complex128)
    v, m = draw((4,), (5, 2), dtype=torch.complex128)
    with planned():
        unfolded = tlg.unfolding_dot_khatri_rao(x, (w, [a, b, c]), 1)
        product = tlg.multi_mode_dot(x, [v, m], modes=[1, 2], transpose=True)
    torch.testing.assert_close(unfolded, torch.einsum("abc,r,ar,cr->br", x, w.conj(), a.conj(), c.conj()))
    torch.testing.assert_close(product, torch.einsum("abc,b,cd->ad", x, v.conj(), m.conj()))
    with core():
        torch.testing.assert_close(unfolded, tlg.unfolding_dot_khatri_rao(x, (w, [a, b, c]), 1))
        torch.testing.assert_close(product, tlg.multi_mode_dot(x, [v, m], modes=[1, 2], transpose=True))


def test_an_inner_product_over_more_modes_than_there_are_is_the_cores() -> None:
    """TensorLy's einsum form has an index before "a" there, which was planned as one: the product of two sums."""
    x, y = draw((4,), (4,))
    with planned():
        found = tlg.inner(x, y, n_modes=2)
    torch.testing.assert_close(found, x @ y)


# --- decompositions --------------------------------------------------------------------------------------------------

DECOMPOSITIONS: dict[str, tuple[bool, Callable[[Tensor], object]]] = {
    "tucker": (True, lambda x: decomposition.tucker(x, (2, 2, 2), n_iter_max=4)),
    "partial_tucker": (True, lambda x: decomposition.partial_tucker(x, (2, 2), modes=[0, 1], n_iter_max=4)[0]),
    "non_negative_tucker": (True, lambda x: decomposition.non_negative_tucker(x, (2, 2, 2), n_iter_max=4, random_state=0)),
    "non_negative_tucker_hals": (True, lambda x: decomposition.non_negative_tucker_hals(x, (2, 2, 2), n_iter_max=2)),
    "parafac": (True, lambda x: decomposition.parafac(x, 2, init="svd", n_iter_max=4)),
    "non_negative_parafac": (True, lambda x: decomposition.non_negative_parafac(x, 2, n_iter_max=4)),
    "non_negative_parafac_hals": (True, lambda x: decomposition.non_negative_parafac_hals(x, 2, n_iter_max=2)),
    "constrained_parafac": (True, lambda x: decomposition.constrained_parafac(x, 2, non_negative=True, n_iter_max=2)),
    "parafac2": (True, lambda x: decomposition.parafac2(x, 2, init="svd", n_iter_max=2)[1]),
    "parafac_power_iteration": (True, lambda x: decomposition.parafac_power_iteration(x, 1, n_repeat=1, n_iteration=40)),
    "symmetric_parafac_power_iteration": (
        True,
        lambda x: decomposition.symmetric_parafac_power_iteration(symmetric(x), 1, n_repeat=1, n_iteration=40),
    ),
    "coupled_matrix_tensor_3d_factorization": (
        True,
        lambda x: decomposition.coupled_matrix_tensor_3d_factorization(x, x[:, :, 0], 2, init="svd", n_iter_max=3)[0],
    ),
    "randomised_parafac": (True, lambda x: decomposition.randomised_parafac(x, 2, 30, n_iter_max=2, random_state=0)),
    "tensor_train": (False, lambda x: decomposition.tensor_train(x, (1, 2, 2, 1))),
    "tensor_train_matrix": (False, lambda x: decomposition.tensor_train_matrix(x[:2, :2].reshape(2, 5, 2, 1), 2)),
    "tensor_ring": (False, lambda x: decomposition.tensor_ring(x, [1, 2, 2, 1])),
    "tensor_ring_als": (False, lambda x: decomposition.tensor_ring_als(x, [2, 2, 2, 2], n_iter_max=3, random_state=0)),
    "robust_pca": (False, lambda x: decomposition.robust_pca(x, n_iter_max=3)[0]),
}


def symmetric(x: Tensor) -> Tensor:
    v = x[0, :3, 0]
    return torch.einsum("a,b,c->abc", v, v, v)


def flat(found: object) -> list[Tensor]:
    """All tensors of a decomposition, in their order."""
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found for t in flat(part)] if found is not None else []  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_decomposition_agrees_with_the_core(name: str) -> None:
    planned_for, run = DECOMPOSITIONS[name]
    x = torch.rand(3, 4, 5, dtype=torch.float64)

    def drawn() -> list[Tensor]:
        np.random.seed(0)  # TensorLy draws its inits from NumPy's global state where it is given none
        torch.manual_seed(0)
        return flat(run(x))

    state = np.random.get_state()
    tenalg.cache_clear()
    with planned(), without_torch_einsum():
        got = drawn()
    assert (calls() > 0) == planned_for
    with core():
        expected = drawn()
    np.random.set_state(state)
    assert f"`{name}`" in sections()[not planned_for]
    for one, other in zip(got, expected, strict=True):
        # A few iterations of least squares on 60 numbers of order 1: conditions of some 1e3 a step.
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


# --- einsum ----------------------------------------------------------------------------------------------------------


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[tuple[int, ...]]]:
    """An equation that torch.einsum takes: repeated, lonely, broadcast and covered indices, written out or implied."""
    size = {i: draw(st.integers(1, 3)) for i in "abcAZ"}
    covered = draw(st.lists(st.integers(1, 3), max_size=2))
    texts, shapes = list[str](), list[tuple[int, ...]]()
    for _ in range(draw(st.integers(1, 4))):
        term = draw(st.lists(st.sampled_from(sorted(size)), max_size=4))
        broadcast = {i for i in term if draw(st.booleans()) and draw(st.booleans())}
        dims = [1 if i in broadcast else size[i] for i in term]
        if covered and draw(st.booleans()):
            at, few = draw(st.integers(0, len(term))), draw(st.integers(0, len(covered)))
            term = [*term[:at], "...", *term[at:]]
            dims = [*dims[:at], *covered[len(covered) - few :], *dims[at:]]
        texts.append("".join(term))
        shapes.append(tuple(dims))
    if draw(st.booleans()):
        return ",".join(texts), shapes
    names = sorted({i for text in texts for i in text} - {"."})
    result = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    if any("..." in text for text in texts) and draw(st.booleans()):
        result.insert(draw(st.integers(0, len(result))), "...")
    return f"{', '.join(texts)} -> {''.join(result)}", shapes


def allowed(equation: str, operands: list[Tensor]) -> Tensor:
    """How far two orders of work may be apart: terms of a sum and factors of a product, twice, by the magnitude."""
    size = torch.einsum(equation, *[t.abs() for t in operands])
    summed = 3 ** len(set(equation) - set(" .,->")) * 3**2
    return 2 * (summed + len(operands)) * EPS * size + TINY


@given(case=equations())
def test_a_random_equation_is_planned_and_equals_torch(case: tuple[str, list[tuple[int, ...]]]) -> None:
    equation, shapes = case
    operands = draw(*shapes)
    with without_torch_einsum():
        got = einsum(equation, *operands)
    expected = torch.einsum(equation, *operands)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= allowed(equation, operands)).all()


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...a,...ab->...b", ((3, 2), (5, 3, 2, 4))),  # ellipses are matched from the right
        ("a...,b...", ((2, 5, 3), (4, 3))),
        ("...,...->...", ((4, 1, 3), (5, 1))),
        ("...a,a->a", ((2, 3, 4), (4,))),  # not in the result: summed
        ("aab,bcc,c->", ((3, 3, 2), (2, 4, 4), (4,))),
        ("aaa,a->a", ((3, 3, 3), (3,))),
        ("ab,ab,ab->ab", ((1, 3), (2, 1), (1, 1))),
        ("ab,cd->", ((2, 3), (4, 5))),
        (",a,->a", ((), (3,), ())),
        ("Ba,aC", ((2, 3), (3, 4))),
        ("abc->cab", ((2, 3, 4),)),
        ("iij->j", ((3, 3, 2),)),
        ("...", ((2, 3),)),
    ],
)
def test_each_form_is_planned_and_equals_torch(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    operands = draw(*shapes)
    with without_torch_einsum():
        got = einsum(equation, *operands)
    expected, size = torch.einsum(equation, *operands), torch.einsum(equation, *[t.abs() for t in operands])
    summed = sum(t.numel() for t in operands) ** 2
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= 2 * (summed + len(operands)) * EPS * size).all()


@given(case=equations())
def test_a_random_equation_has_the_gradients_of_torch(case: tuple[str, list[tuple[int, ...]]]) -> None:
    equation, shapes = case
    operands = [t.requires_grad_() for t in draw(*shapes)]
    got, expected = einsum(equation, *operands), torch.einsum(equation, *operands)
    weight = torch.randn_like(expected)
    wanted = gradients(expected, weight, operands)
    magnitudes = [t.detach().abs().requires_grad_() for t in operands]
    sizes = gradients(torch.einsum(equation, *magnitudes), weight.abs(), magnitudes)
    terms = 3 ** len(set(equation) - set(" .,->")) * 3**2 + expected.numel() + len(operands) + 1
    for one, other, size in zip(gradients(got, weight, operands), wanted, sizes, strict=True):
        assert ((one - other).abs() <= 2 * terms * EPS * size + TINY).all()


FALLBACKS: dict[str, tuple[str, list[Tensor]]] = {
    "integers": ("ab,bc->ac", [torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2)]),
    "integers with odd characters": ("{|,|}->{}", [torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2)]),
    "mixed dtypes": ("a,b->ab", [torch.arange(2), torch.ones(3)]),
    "a size of 0": ("ab,bc->ac", [torch.ones(2, 0), torch.ones(0, 3)]),
    "a sparse operand": ("ab,bc->ac", [torch.eye(3).to_sparse(), torch.ones(3, 3)]),
}


def outcome(run: Callable[[], Tensor]) -> str:
    """The value or the error, as text."""
    try:
        return repr(run())
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return repr(error)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_has_no_plan_is_left_to_torch(name: str) -> None:
    equation, operands = FALLBACKS[name]
    fallback = mock.Mock(side_effect=torch.einsum)
    with mock.patch.object(PyTorchBackend, "einsum", staticmethod(fallback)):
        got = outcome(lambda: einsum(equation, *operands))
    fallback.assert_called_once()
    assert got == outcome(lambda: torch.einsum(equation.translate(str.maketrans("{|}", "abc")), *operands))


MALFORMED: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "sizes that do not fit": ("ab,bc->ac", ((2, 3), (2, 3))),
    "a result index that no operand has": ("ab,bc->ad", ((2, 3), (3, 2))),
    "a result index twice": ("ab->aa", ((2, 3),)),
    "too few operands": ("ab,bc->ac", ((2, 3),)),
    "too few axes": ("abc->a", ((2, 3),)),
    "too many axes": ("ab->a", ((2, 3, 4),)),
    "a diagonal of no square": ("ii->i", ((1, 3),)),
    "a stray dot": ("a.b->a", ((2, 3),)),
    "two arrows": ("a->b->a", ((2,),)),
    "two ellipses": ("...a...->a", ((2,),)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_errors_are_those_of_torch(name: str) -> None:
    equation, shapes = MALFORMED[name]
    operands = draw(*shapes)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        torch.einsum(equation, *operands)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        einsum(equation, *operands)


def test_above_52_indices_the_error_is_ours() -> None:
    equation = ",".join(chr(ord("a") + k) for k in range(53))
    with pytest.raises(ValueError, match="53 different indices"):
        einsum(equation, *[torch.ones(1, dtype=torch.int64)] * 53)


def test_torch_takes_other_ways_to_call_einsum() -> None:
    a, b = draw((2, 3), (3, 4))
    assert torch.equal(einsum(a, [0, 1], b, [1, 2], [0, 2]), torch.einsum(a, [0, 1], b, [1, 2], [0, 2]))  # type: ignore[arg-type]
    assert torch.equal(einsum("ab,bc", [a, b]), torch.einsum("ab,bc", [a, b]))


def test_gradients_are_right_twice_over_and_for_complex_numbers() -> None:
    real = [t.requires_grad_() for t in draw((3, 3), (3, 3), (3, 3))]
    complex_ = [t.requires_grad_() for t in draw((2, 3), (3, 3), (3, 2), dtype=torch.complex128)]
    for equation in ("ab,bc,bd->cad", "ab,bb,be->", "ab,cd,be->a"):
        assert torch.autograd.gradcheck(lambda *t, e=equation: einsum(e, *t), real)
        assert torch.autograd.gradgradcheck(lambda *t, e=equation: einsum(e, *t), real)
    assert torch.autograd.gradcheck(lambda *t: einsum("ab,bc,cd->da", *t), complex_)


def test_autocast_casts_as_under_torch() -> None:
    a, b = (t.requires_grad_() for t in draw((4, 5), (5, 6), dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = einsum("ab,bc->ac", a, b), torch.einsum("ab,bc->ac", a, b)
    assert torch.equal(got, expected)
    got.float().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32


def test_transforms_and_compile_run() -> None:
    a, b = draw((7, 2, 3), (7, 3, 4))
    got = torch.vmap(lambda s, t: einsum("ab,bc->ac", s, t))(a, b)
    assert ((got - a @ b).abs() <= allowed("kab,kbc->kac", [a, b])).all()
    whole = torch.compile(lambda s, t: einsum("kab,kbc->kac", s, t), backend="eager", fullgraph=True)
    assert ((whole(a, b) - a @ b).abs() <= allowed("kab,kbc->kac", [a, b])).all()
    torch.compiler.reset()


def test_sizes_may_be_symbols() -> None:
    """A trace with symbols for sizes ended in a TypeError, as symbols have no hash."""
    shapes = ((2, 3), (3, 4), (4, 5))
    traced = make_fx(lambda *t: einsum("ab,bc,cd->ad", *t), tracing_mode="symbolic")(*draw(*shapes))
    others = draw(*shapes)
    torch.testing.assert_close(traced(*others), torch.linalg.multi_dot(others), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    operands = draw((2, 3), (3, 4), (4, 2), dtype=dtype)
    with without_torch_einsum():
        assert einsum("ab,bc,cd->ad", *operands).dtype == dtype


def test_meta_tensors_have_shapes() -> None:
    assert einsum("ab,bc->ca", torch.ones(2, 3, device="meta"), torch.ones(3, 4, device="meta")).shape == (4, 2)


def test_a_tucker_tensor_of_order_14_works() -> None:
    """42 indices in characters that torch.einsum does not know."""
    tensors = draw((2,) * 14, *[(2, 2)] * 14)
    with core(EinsumTenalgBackend()), pytest.raises(RuntimeError, match="invalid subscript"):
        tl.tucker_to_tensor((tensors[0], tensors[1:]))
    with planned(), without_torch_einsum():
        got = tl.tucker_to_tensor((tensors[0], tensors[1:]))
    with core():
        expected = tl.tucker_to_tensor((tensors[0], tensors[1:]))
        size = tl.tucker_to_tensor((tensors[0].abs(), [t.abs() for t in tensors[1:]]))
    assert ((got - expected).abs() <= 2 * (14 * 2 + 15) * EPS * size).all()  # 14 sums of two terms, one after the other


def test_more_than_52_indices_work() -> None:
    vectors = draw(*[(2, 2)] * 60)
    equation = ",".join(chr(ord("a") + k) + chr(ord("b") + k) for k in range(60)) + f"->a{chr(ord('a') + 60)}"
    expected, size = vectors[0], vectors[0].abs()
    for v in vectors[1:]:
        expected, size = expected @ v, size @ v.abs()
    assert ((einsum(equation, *vectors) - expected).abs() <= 2 * 60 * 3 * EPS * size).all()


# --- cache and optimizer ---------------------------------------------------------------------------------------------


def test_the_cache_is_hit_and_bounded() -> None:
    tenalg.cache_clear()
    a, b = draw((2, 3), (3, 4))
    for _ in range(3):
        einsum("ab,bc->ac", a, b)
    assert tenalg.cache_info()[:2] == (2, 1)
    einsum("ab,bc->ac", a.requires_grad_(), b)  # wants gradients: another plan
    einsum("ab,bc->ac", a, b, optimize="greedy")
    with torch.no_grad():
        einsum("ab,bc->ac", a, b)
    assert tenalg.cache_info()[:2] == (3, 3)
    for k in range(tenalg.CACHE + 5):
        einsum("a,b->ab", b[0], torch.ones(k + 1, dtype=torch.float64))
    assert tenalg.cache_info().currsize == tenalg.CACHE == tenalg.cache_info().maxsize
    tenalg.cache_clear()
    assert tenalg.cache_info()[:2] == (0, 0)


def test_the_optimizer_is_the_one_asked_for() -> None:
    asked = list[str]()

    class LeftToRight(PathOptimizer):  # type: ignore[misc]
        def __call__(self, inputs: list[frozenset[str]], *_: object) -> list[tuple[int, int]]:
            asked.append("here")
            return [(0, 1)] * (len(inputs) - 1)

    with planned(LeftToRight()):
        tl.tucker_to_tensor((torch.ones(2, 2), [torch.ones(3, 2), torch.ones(4, 2)]))
    assert asked == ["here"]


# --- the block -------------------------------------------------------------------------------------------------------


def test_the_block_sets_both_backends_and_restores_what_was_there() -> None:
    before, own = current(), own_settings()
    with planned():
        assert tl.get_backend() == tl.tenalg.get_backend() == tenalg.BACKEND_NAME
        outer = current()
        with planned("greedy"):
            assert tl.backend.current_backend().optimize == "greedy"
        assert current() == outer
        with core():
            assert tl.get_backend() == "pytorch"
        assert current() == outer
    assert (current(), own_settings()) == (before, own)


def test_an_exception_restores_too() -> None:
    before, own = current(), own_settings()
    with pytest.raises(ZeroDivisionError), planned(), planned():
        raise ZeroDivisionError
    assert (current(), own_settings()) == (before, own)


def test_a_backend_set_inside_does_not_outlive_the_block() -> None:
    before = current()
    with planned():
        tl.set_backend("pytorch", local_threadsafe=True)
    assert current() == before


def test_the_idiom_of_getting_and_setting_a_name_works_inside() -> None:
    before = current()
    with planned():
        for manager in MANAGERS:
            manager.set_backend(manager.get_backend(), local_threadsafe=True)
        assert isinstance(tl.backend.current_backend(), tenalg.PlannedBackend)
        assert isinstance(tl.tenalg.current_backend(), tenalg.PlannedTenalgBackend)
    assert current() == before
    assert tl.backend.available_backend_names.count(tenalg.BACKEND_NAME) == 1


def in_thread(run: Callable[[], object]) -> object:
    found = list[object]()
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_is_not_affected() -> None:
    default = in_thread(current)
    with planned():
        assert in_thread(current) == default


def test_a_thread_without_a_setting_of_its_own_has_none_afterwards() -> None:
    def run() -> object:
        assert own_settings() == [{}, {}]
        with planned():
            inside = current()
        return own_settings(), inside[0].__class__

    assert in_thread(run) == ([{}, {}], tenalg.PlannedBackend)


def test_threads_share_the_cache_and_agree() -> None:
    tensors = draw(*TUCKER)
    results = list[Tensor]()

    def run() -> None:
        with planned():
            results.extend(tl.tucker_to_tensor((tensors[0], tensors[1:])) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(r, results[0]) for r in results)


def test_importing_switches_nothing() -> None:
    code = (
        "import sys, tensorly as tl\n"
        "def state():\n"
        "    return [(m.current_backend(), m.get_backend(), list(m.available_backend_names),\n"
        "             dict(vars(m._THREAD_LOCAL_DATA)), m.__dict__.get('einsum')) for m in (tl.backend, tl.tenalg)]\n"
        "before = state()\n"
        "import superlora_tn\n"
        "assert 'superlora_tn_backends.tenalg' not in sys.modules\n"
        "assert not any('superlora' in name for name in tl.backend._backend_base_class._available_backends)\n"
        "assert state() == before\n"
        "import superlora_tn_backends.tenalg\n"
        "assert state() == before\n"
        "print(tl.get_backend(), tl.tenalg.get_backend())\n"
    )
    assert fresh(["-W", "error", "-c", code]).strip() == "numpy core"


def test_the_signatures_are_those_of_tensorly() -> None:
    for name in ("mode_dot", "multi_mode_dot"):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(b, name)).parameters.values()]
            for b in (tenalg.PlannedTenalgBackend, EinsumTenalgBackend)
        )
        assert ours == theirs


# --- TensorLy's own tests --------------------------------------------------------------------------------------------


def fresh(arguments: list[str], **environment: str) -> str:
    """What a new Python prints."""
    places = os.pathsep.join(map(str, (ROOT, ROOT / "backends", ROOT / "tests")))
    variables = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=variables, cwd=TL_HOME.parent
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def own_tests(*places: str) -> tuple[int, int, int]:
    """Run TensorLy's tests inside `planned()`: tests passed, equations planned, calls that found theirs planned."""
    paths = [str(TL_HOME / place) for place in places]
    assert all(Path(p).exists() for p in paths), "this TensorLy ships no tests"
    options = ["-q", "-p", "no:cacheprovider", "-p", "tensorly_plugin", "-c", os.devnull, "--rootdir", str(TL_HOME)]
    printed = fresh(["-B", "-m", "pytest", *options, *paths], TENSORLY_BACKEND="pytorch")
    counts = re.search(r"planned equations=(\d+) reused=(\d+)", printed)
    passed = re.search(r"(\d+) passed", printed)
    assert counts
    assert passed
    assert not re.search(r"failed|error|deselected|skipped|xfailed", printed.splitlines()[-1])
    return int(passed[1]), int(counts[1]), int(counts[2])


def test_tensorlys_tests_of_its_algebra_and_factorised_tensors_pass() -> None:
    """All of them; those of test_tenalg_backend.py switch to a backend of their own, but start and end on this one."""
    kinds = ("cp", "tucker", "tt", "tr")
    factorised = [f"tests/test_{kind}_tensor.py" for kind in kinds]
    passed, equations_planned, reused = own_tests("tenalg/tests", *factorised, "tests/test_tt_matrix.py")
    assert passed >= 300  # 318 in tensorly 0.10.0
    assert equations_planned >= 50  # 89
    assert reused >= 50  # 138


def test_tensorlys_tests_of_the_decompositions_pass() -> None:
    names = ("tucker", "cp", "tt_decomposition", "tr_svd", "symmetric_cp", "cp_power", "cmtf_als")
    passed, equations_planned, _ = own_tests(*[f"decomposition/tests/test_{name}.py" for name in names])
    assert passed >= 180  # 201
    assert equations_planned >= 100  # 116


def test_blocks_of_coroutines_that_interleave_restore_what_was_there() -> None:
    async def task(pauses: int, seen: list[str]) -> None:
        with planned():
            for _ in range(pauses):
                await asyncio.sleep(0)
            seen.append(tl.get_backend())
            with planned():
                await asyncio.sleep(0)

    async def main() -> list[str]:
        seen: list[str] = []
        await asyncio.gather(*(task(pauses, seen) for pauses in (3, 1, 4, 2)))
        return seen

    before = tl.get_backend()
    assert asyncio.run(main()) == [tenalg.BACKEND_NAME] * 4
    assert tl.get_backend() == before


Order = list[tuple[int, bool]]


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Blocks entered (True) and left (False) in any order: each is left once, after it was entered."""
    left = dict.fromkeys(range(draw(st.integers(1, 5))), 2)
    order = Order()
    while left:
        block = draw(st.sampled_from(sorted(left)))
        order.append((block, left[block] == 2))
        left[block] -= 1
        if not left[block]:
            del left[block]
    return order


@given(orders(), st.sampled_from([None, "numpy", "pytorch"]))
def test_blocks_left_in_any_order_restore_what_was_there(order: Order, before: str | None) -> None:
    def run() -> None:
        if before is not None:
            tl.set_backend(before, local_threadsafe=True)
        was, blocks, still_open = (current(), own_settings()), dict[int, Any](), list[int]()
        for block, enters in order:
            if enters:
                blocks[block] = planned(f"greedy {block}")
                blocks[block].__enter__()
                still_open.append(block)
            else:
                blocks[block].__exit__(None, None, None)
                still_open.remove(block)
            if still_open:  # the one that was entered last, of those that are open
                assert tl.backend.current_backend().optimize == f"greedy {still_open[-1]}"
            else:
                assert (current(), own_settings()) == was
        assert not tenalg._open.blocks

    assert in_thread(run) is None


def test_a_block_that_another_thread_leaves_is_of_the_thread_that_entered_it() -> None:
    before = (current(), own_settings())
    block = planned()
    block.__enter__()
    elsewhere = in_thread(own_settings)
    assert in_thread(lambda: (block.__exit__(None, None, None), own_settings())[1]) == elsewhere == [{}, {}]
    assert (current(), own_settings()) == before


@pytest.mark.parametrize("kind", ["chain", "star", "ring"])
def test_a_thousand_operands_are_planned_and_differentiated_in_bounded_time(kind: str) -> None:
    count = 1000
    names = [chr(0x4E00 + k) for k in range(count + 1)]
    terms, output = {
        "chain": ([names[k] + names[k + 1] for k in range(count)], names[0] + names[count]),
        "star": ([names[0] + names[1 + k // 2] for k in range(count)], names[0]),
        "ring": ([names[k] + names[(k + 1) % count] for k in range(count)], ""),
    }[kind]
    operands = [torch.eye(2, dtype=torch.float64).requires_grad_() for _ in range(count)]
    start = time.process_time()
    result = einsum(f"{','.join(terms)}->{output}", *operands)
    result.sum().backward()
    # 0.3 s of the processor; before, the search of orders ended in RecursionError.
    assert time.process_time() - start < 10
    expected = {"chain": torch.eye(2), "star": torch.ones(2), "ring": torch.tensor(2.0)}[kind].double()
    assert torch.equal(result.detach(), expected)
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in operands)
