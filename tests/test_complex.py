"""Complex adapters: dW, x dW^T and their gradients are the oracle's, in every network and layer, and mixed with real numbers.

Torch's gradient g of a real loss L with respect to z is such that a step E changes L by ``Re <conj(g), E>``. So a gradient is
right where that equals ``Re <conj(c), dy>`` for the cotangent c, dy being linear in E.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import DIM, VARIANTS, ConvNet, noise, seeded
from strategies import EPS, SHAPES, Bound, Case, cases, node_tensors, targets
from test_equals_dense import VARIANTS as SPECS
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
C = torch.complex128
LINEAR = [s for s in SPECS if not (s.projection and getattr(s.projection, "tanh", False))]
# A product of complex numbers is four products and two sums of reals, each rounded.
COMPLEX = 4


def drawn(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return np.asarray(generator.standard_normal(shape) + 1j * generator.standard_normal(shape))  # also of no axis


def complex_bound(case: Case, **options: object) -> Iterator[Bound]:
    """Adapters with complex nodes, before the oracle has looked at them."""
    for bound in case.bound(**options):
        bound.adapter.to(C)
        generator = np.random.default_rng(5)
        with torch.no_grad():
            for tensor in node_tensors(bound.adapter).values():
                tensor.copy_(torch.from_numpy(drawn(generator, *tensor.shape)))
        yield bound


def assert_complex(bound: Bound, conjugated: bool = False) -> None:
    generator = np.random.default_rng(6)
    target = bound.targets[-1]
    d_out, d_in = bound.shapes[target]
    x, out, c = drawn(generator, 3, d_in), drawn(generator, 3, d_out), drawn(generator, 3, d_out)
    leaf = torch.from_numpy(x.conj() if conjugated else x).requires_grad_()
    y = bound.adapter(leaf.conj() if conjugated else leaf, target, torch.from_numpy(out.copy()))
    delta = bound.reference[target]
    size = np.abs(x) @ bound.magnitude[target].T
    roundings = COMPLEX * (bound.roundings + 2) * (d_in + 2)
    assert (np.abs(y.detach().resolve_conj().numpy() - (out + x @ delta.T)) <= roundings * EPS * (np.abs(out) + size)).all()

    nodes = {n: t for n, t in node_tensors(bound.adapter).items() if t.requires_grad}
    gradient, *grads = torch.autograd.grad(y, [leaf, *nodes.values()], torch.from_numpy(c))
    # conj(g_x) = conj(c) dW; of the conjugate of x it is the conjugate.
    expected = c @ delta.conj()
    error = np.abs(gradient.resolve_conj().numpy() - (expected.conj() if conjugated else expected))
    assert (error <= roundings * (d_out + 2) * EPS * (np.abs(c) @ bound.magnitude[target])).all()
    positive = bound.at({n: np.abs(v) for n, v in bound.values.items()})
    for (name, node), grad in zip(nodes.items(), grads, strict=True):
        way = drawn(generator, *node.shape)
        moved = bound.weights({**bound.values, name: way})[target]
        largest = positive.weights({**positive.values, name: np.abs(way)}, absolute=True)[target]
        found = float((grad.resolve_conj().numpy().conj() * way).sum().real)
        total = float((np.abs(c) * (np.abs(x) @ largest.T)).sum())
        allowed = (roundings + 3 * d_out + node.numel()) * EPS * total
        assert abs(found - float((c.conj() * (x @ moved.T)).sum().real)) <= allowed


@pytest.mark.parametrize("route", ["apply", "delta", None])
@pytest.mark.parametrize("spec", LINEAR, ids=repr)
def test_every_variant_is_the_oracles_in_both_directions(spec: sl.AdapterSpec, route: str | None) -> None:
    if isinstance(spec.fold, sl.FlatFold) and route == "apply":
        route = None
    for bound in complex_bound(Case(spec, SHAPES), route=route):
        assert_complex(bound)


@given(cases().filter(lambda c: not getattr(c.spec.projection, "tanh", False)), st.booleans(), st.booleans())
def test_random_networks_are_the_oracles_in_both_directions(case: Case, conjugated: bool, recompute: bool) -> None:
    for bound in complex_bound(case, recompute=recompute and isinstance(case.spec.fold, sl.FlatFold)):
        assert_complex(bound, conjugated)


@pytest.mark.parametrize(
    "spec", [sl.lora(2), sl.loha(1), sl.lokr(1), sl.lotr(2), sl.vera(2), sl.AdapterSpec(sl.Tucker(2)), sl.lorta(1, 3, 2),
             sl.lorta(2, 3, 2, sl.Fastfood(0.6, 3))], ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("recompute", [False, True])
def test_second_derivatives(spec: sl.AdapterSpec, recompute: bool) -> None:
    for bound in complex_bound(Case(spec, targets(1, 2, (4, 6))), recompute=recompute):
        names = [n for n, _ in bound.adapter.named_parameters()]

        def run(x: Tensor, out: Tensor, *nodes: Tensor) -> Tensor:
            state = dict(zip(names, nodes, strict=True))  # noqa: B023
            return torch.func.functional_call(bound.adapter, state, (x, bound.targets[-1], out))  # noqa: B023

        leaves = [torch.randn(2, d, dtype=C, requires_grad=True) for d in (6, 4)]
        leaves += [p.detach().clone().requires_grad_() for p in bound.adapter.parameters()]
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


# --- layers ---------------------------------------------------------------------------------------------------------


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(DIM, 20), nn.Linear(20, DIM), nn.Linear(DIM, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def attached(variant: str, make: type[nn.Module], names: list[str], dtype: torch.dtype = C) -> tuple[nn.Module, sl.Tuned]:
    model = seeded(0, make).to(C)
    tuned = sl.attach(model, VARIANTS[variant], names, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn(p.shape, dtype=dtype, generator=generator) * 0.3)
    return model, tuned


def through_dense_weights(model: nn.Module, tuned: sl.Tuned, x: Tensor) -> Tensor:
    """The model with ``W + dW`` in place of each weight, by torch alone but for dW."""
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in tuned.targets}
    changed = {n: w + tuned.delta(n.removesuffix(".weight")).reshape(w.shape) for n, w in weights.items()}
    with tuned.disabled():
        y: Tensor = torch.func.functional_call(model, changed, (x,))
    return y


def assert_as_through_dense_weights(model: nn.Module, tuned: sl.Tuned, x: Tensor) -> None:
    parameters = list(tuned.parameters())
    results = []
    for y in (model(x), through_dense_weights(model, tuned, x)):
        results.append((y, *torch.autograd.grad(y.abs().square().sum(), [x, *parameters])))
    for found, expected in zip(*results, strict=True):
        # A few layers of sums of up to a hundred terms: some thousand roundings of 1e-16, of the largest.
        assert found.dtype is expected.dtype
        assert float((found - expected).detach().abs().max()) <= 1e-11 * float(expected.detach().abs().max())


@pytest.mark.parametrize("dtype", [C, torch.float64], ids=["complex nodes", "real nodes"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_layers(variant: str, dtype: torch.dtype) -> None:
    model, tuned = attached(variant, Linears, ["first", "second", "third"], dtype)
    assert_as_through_dense_weights(model, tuned, noise(2, 3, DIM, dtype=C).requires_grad_())


@pytest.mark.parametrize("dtype", [C, torch.float64], ids=["complex nodes", "real nodes"])
@pytest.mark.parametrize("variant", ["dense", "lora", "loha", "lokr", "lotr", "vera", "tucker ranks", "lorta fastfood"])
def test_convolutions(variant: str, dtype: torch.dtype) -> None:
    class Same(ConvNet):
        """All kernels of one kind, as networks with a layer mode want equal shapes."""

    model, tuned = attached(variant, Same, ["first"], dtype)
    assert_as_through_dense_weights(model, tuned, noise(2, 4, 8, 8, dtype=C).requires_grad_())


def test_siblings_that_read_one_input_share_it() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.q_proj(x)) * self.v_proj(x)

    for variant in ("lora", "lotr", "vera"):
        model, tuned = attached(variant, Pair, ["q_proj", "v_proj"])
        assert_as_through_dense_weights(model, tuned, noise(2, 3, DIM, dtype=C).requires_grad_())


def test_merging_is_the_same_as_running() -> None:
    model, tuned = attached("lotr", Linears, ["first", "third"])
    x = noise(2, 3, DIM, dtype=C)
    y = model(x)
    tuned.merge()
    # Roundings of 1e-16 through three layers of sums of twenty.
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spec", [sl.lora(2), sl.lotr(2), sl.lorta(2, 3, 2)], ids=["lora", "lotr", "flat"])
def test_an_output_that_may_be_adopted_is_added_to(spec: sl.AdapterSpec, recompute: bool) -> None:
    shapes = targets(1, 2, (4, 6))
    for bound in complex_bound(Case(spec, shapes), recompute=recompute):
        target, layer = bound.targets[-1], nn.Linear(6, 4, dtype=C).requires_grad_(False)
        x, c = torch.randn(3, 6, dtype=C, requires_grad=True), torch.randn(3, 4, dtype=C)
        y = bound.adapter(x, target, layer(x), base=layer.weight)
        [found] = torch.autograd.grad(y, x, c)
        whole = layer.weight.numpy() + bound.reference[target]
        # Sums of at most 6 terms of dW beside W, in float64: a hundred roundings of the largest, at most.
        assert np.abs(found.numpy() - c.numpy() @ whole.conj()).max() <= 1e-13 * np.abs(whole).max() * float(c.abs().max())


def test_a_complex_layer_takes_no_fused_path() -> None:
    """Their generated gradients conjugate nothing."""
    model, _ = attached("lora", Linears, ["first"])
    names, pending = set(), [model(noise(2, 3, DIM, dtype=C)).grad_fn]
    while pending:
        node = pending.pop()
        names.add(type(node).__name__)
        pending += [n for n, _ in node.next_functions if n is not None]
    assert not {n for n in names if n.startswith("_")}


# --- real and complex operands together -----------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, C, C), (C, torch.float64, torch.float64), (torch.float64, torch.complex64, torch.float32)]
)
def test_operands_meet_by_torchs_promotion(dtypes: tuple[torch.dtype, ...], joined: bool, grad: bool) -> None:
    [(_, graph)] = sl.lora(2).lay_out({"w": (4, 6)})
    run = compiled(make_plan(graph, "apply", 3))
    operands = [torch.randn(s, dtype=d).requires_grad_(grad) for s, d in zip(((3, 6), (4, 2), (6, 2)), dtypes, strict=True)]
    out = torch.randn(3, 4, dtype=torch.float32) if joined else None
    wide = [t.detach().to(C).requires_grad_(grad) for t in operands]
    y = run(*operands, out=None if out is None else out.clone(), alpha=0.5)
    expected = 0.5 * wide[0] @ wide[2] @ wide[1].T + (0 if out is None else out)
    common = torch.result_type(operands[0], torch.empty(1, dtype=torch.result_type(*operands[1:])))
    assert y.dtype is common
    eps = torch.finfo(common).eps
    torch.testing.assert_close(y.to(C), expected, rtol=0, atol=30 * eps * float(expected.detach().abs().max()))
    if grad:
        cotangent = torch.randn(3, 4, dtype=common)
        found = torch.autograd.grad(y, operands, cotangent)
        for one, exact in zip(found, torch.autograd.grad(expected, wide, cotangent.to(C)), strict=True):
            exact = exact if one.is_complex() else exact.real
            narrow = max(eps, torch.finfo(one.dtype).eps)
            torch.testing.assert_close(one.to(exact.dtype), exact, rtol=0, atol=60 * narrow * float(exact.detach().abs().max()))
