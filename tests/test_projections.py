"""The fixed maps: linear, with the right adjoint, the same from a seed for ever, and never trained or saved."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import EPS

import superlora_tn as sl
from superlora_tn.declare.fold import FlatFold
from superlora_tn.declare.maps import Fastfood, Projection, Shuffle
from superlora_tn.declare.parts import CP, SpecError
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update import walsh
from superlora_tn.update.fixed_maps import FixedMap, fixed_map, gaussians, permutation, signs
from superlora_tn.update.make import make_adapter
from superlora_tn.update.walsh import hadamard


def made(projection: Projection, size_in: int, size_out: int) -> FixedMap:
    result = fixed_map(projection, size_in, size_out)
    assert result is not None
    return result


def dense(fixed: FixedMap) -> np.ndarray:
    """The map as an explicit matrix, from its tables, by the oracle."""
    tables = {n: t.double().numpy() for n, t in fixed.named_buffers()}
    order = tables["order"].astype(int)
    if "flips" not in tables:
        return np.eye(fixed.size_in)[order]
    return oracle.fastfood_matrix(tables["flips"], order, tables["weights"], fixed.size_out)


@st.composite
def linear_maps(draw: st.DrawFn) -> FixedMap:
    size_in, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**63 - 1))
    if draw(st.booleans()):
        return made(Shuffle(seed), size_in, size_in)
    return made(Fastfood(0.5, seed), size_in, draw(st.integers(size_in, 70)))


def allowed(fixed: FixedMap, x: torch.Tensor) -> float:
    """Two transforms of p numbers round p times each; every partial sum is below this magnitude (|H| is all ones)."""
    p = 1 << (max(fixed.size_in, fixed.size_out) - 1).bit_length()
    weight = 1.0 if not hasattr(fixed, "weights") else float(fixed.weights.abs().sum()) / math.sqrt(p * fixed.size_in)
    return 4 * (p + 4) * EPS * weight * float(x.abs().sum()) * 2


@given(linear_maps())
def test_a_map_is_its_explicit_matrix(fixed: FixedMap) -> None:
    x = torch.randn(3, fixed.size_in, dtype=torch.float64)
    assert np.abs(fixed(x).numpy() - x.numpy() @ dense(fixed).T).max() <= allowed(fixed, x)


@given(linear_maps(), st.floats(-2, 2), st.floats(-2, 2))
def test_a_map_is_linear(fixed: FixedMap, a: float, b: float) -> None:
    x, y = torch.randn(2, fixed.size_in, dtype=torch.float64)
    error = (fixed(a * x + b * y) - a * fixed(x) - b * fixed(y)).abs().max()
    assert float(error) <= allowed(fixed, 2 * x.abs() + 2 * y.abs())


@given(linear_maps())
def test_backpropagation_is_the_adjoint(fixed: FixedMap) -> None:
    """``<F x, y> = <x, F' y>``."""
    x = torch.randn(fixed.size_in, dtype=torch.float64, requires_grad=True)
    y = torch.randn(fixed.size_out, dtype=torch.float64)
    result = fixed(x)
    [adjoint] = torch.autograd.grad(result, x, y)
    assert np.abs(adjoint.numpy() - dense(fixed).T @ y.numpy()).max() <= allowed(fixed, y)
    assert abs(float(result.detach() @ y - x.detach() @ adjoint)) <= allowed(fixed, x.detach()) * float(y.abs().sum() + 1)


def test_tanh_follows_the_linear_map() -> None:
    x = torch.randn(5, dtype=torch.float64)
    plain, bent = made(Fastfood(0.5, 3), 5, 9), made(Fastfood(0.5, 3, tanh=True), 5, 9)
    assert torch.equal(bent(x), torch.tanh(plain(x)))


# --- seeds: values written down once; a change of them would change every saved adapter -----------------------------

TABLES = {
    0: (
        [4, 6, 8, 10, 0, 3, 11, 7, 2, 1, 9, 5],
        [-1, 1, 1, -1, 1, -1, -1, -1, 1, 1, -1, -1],
        ["0x1.92e8p-2", "-0x1.8d22p+0", "-0x1.ab7p-2", "0x1.6acp-4"],
    ),
    7: (
        [8, 7, 9, 5, 2, 6, 3, 0, 10, 1, 4, 11],
        [-1, -1, 1, 1, -1, 1, -1, 1, 1, 1, 1, -1],
        ["0x1.859p-3", "0x1.aa98p-3", "-0x1.3cf4p-1", "-0x1.2b7p-4"],
    ),
}


@pytest.mark.parametrize("seed", TABLES)
def test_tables_of_a_seed_are_these_for_ever(seed: int) -> None:
    order, flips, weights = TABLES[seed]
    assert permutation(seed, 12).tolist() == order
    assert signs(seed, 12).tolist() == flips
    assert gaussians(seed, 4).tolist() == [float.fromhex(w) for w in weights]


def test_a_mapped_vector_of_a_seed_is_this_for_ever() -> None:
    expected = ["-0x1.c254fb8b13382p+2", "-0x1.9c72deb401d8cp-1", "0x1.872b738da1268p+1", "-0x1.02200571019a9p+2"]
    fixed, x = made(Fastfood(0.5, seed=3), 5, 8), torch.arange(1.0, 6.0, dtype=torch.float64)
    error = np.abs(fixed(x)[:4].numpy() - [float.fromhex(v) for v in expected])
    assert (error <= allowed(fixed, x)).all()  # the tables are exact; only the order of the sums may vary


def test_equal_seeds_give_equal_maps_and_others_do_not() -> None:
    x = torch.randn(33)
    for kind in (Shuffle, lambda seed: Fastfood(0.5, seed)):
        first, again, other = (made(kind(seed), 33, 33)(x) for seed in (5, 5, 6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_a_map_ignores_and_leaves_torchs_and_numpys_generators() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    made(Fastfood(0.5, 4), 9, 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)


@given(st.integers(0, 2**63 - 1), st.integers(1, 300))
def test_a_permutation_has_each_number_once(seed: int, count: int) -> None:
    assert torch.equal(permutation(seed, count).long().sort().values, torch.arange(count))


def test_gaussians_and_signs_have_their_moments() -> None:
    count = 100_000
    values, flips = gaussians(11, count).double(), signs(11, count).double()
    # Five standard errors: 1/sqrt(n) of a mean, sqrt(2/n) of a variance, sqrt(96/n) of a fourth moment (3 - 0.1: 12 terms).
    assert abs(float(values.mean())) <= 5 / math.sqrt(count)
    assert abs(float(values.var()) - 1) <= 5 * math.sqrt(2 / count)
    assert abs(float((values**4).mean()) - 2.9) <= 5 * math.sqrt(96 / count)
    assert abs(float(flips.mean())) <= 5 / math.sqrt(count)
    assert set(flips.tolist()) == {-1.0, 1.0}


# --- the transform --------------------------------------------------------------------------------------------------

# (dtype, rounding of its results, rounding of a matmul's sums: bfloat16 is summed in float32)
PRECISIONS = [(torch.float64, 2.0**-53, 2.0**-53), (torch.float32, 2.0**-24, 2.0**-24), (torch.bfloat16, 2.0**-8, 2.0**-24)]


@pytest.mark.parametrize(("dtype", "unit", "inner"), PRECISIONS, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 4, 32, 64, 128, 1024, 4096])
def test_the_transform_is_scipys_hadamard_matrix(size: int, dtype: torch.dtype, unit: float, inner: float) -> None:
    x = torch.randn(3, 2, size).to(dtype)
    exact = x.double().numpy() @ scipy.linalg.hadamard(size).astype(float)
    bits = size.bit_length() - 1
    # One rounding of the result a radix step (never more steps than bits) and at most 64 sums inside each.
    bound = max(bits, 1) * (unit + 64 * inner) * x.double().abs().sum(-1, keepdim=True).numpy()
    assert hadamard(x).dtype == dtype
    assert hadamard(x).shape == x.shape
    assert (np.abs(hadamard(x).double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize("size", [1, 8, 64, 512])
def test_the_oracles_hadamard_matrix_is_scipys(size: int) -> None:
    assert np.array_equal(oracle.hadamard_matrix(size), scipy.linalg.hadamard(size))


@given(st.integers(0, 9))
def test_the_transform_twice_is_the_size(bits: int) -> None:
    x = torch.randint(-8, 9, (2**bits,)).double()
    assert torch.equal(hadamard(hadamard(x)), 2**bits * x)  # whole numbers below 2**53: exact


@pytest.mark.parametrize("size", [3, 6, 12, 100])
def test_a_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"last axis of {size}; it must be a power of two"):
        hadamard(torch.zeros(size))


@pytest.mark.parametrize(("size_in", "size_out"), [(1500, 3000), (100, 4000), (2048, 2048)])
def test_fastfood_keeps_the_elements_variance(size_in: int, size_out: int) -> None:
    """E y_j^2 = mean x^2 exactly, over B and G."""
    seeds, ratios = 24, []
    for seed in range(seeds):
        x = torch.randn(size_in, dtype=torch.float64)
        ratios.append(float((made(Fastfood(0.5, seed), size_in, size_out)(x) ** 2).mean() / (x**2).mean()))
    # One seed spreads by sqrt(8/p) from g^2 z^2 and sqrt(2/size_out) from the cut; five standard errors of the mean.
    padded = 1 << (size_out - 1).bit_length()
    assert abs(np.mean(ratios) - 1) <= 5 * (math.sqrt(8 / padded) + math.sqrt(2 / size_out)) / math.sqrt(seeds)


# --- in an adapter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [Shuffle(2), Fastfood(0.5, 2)], ids=repr)
def test_a_map_trains_nothing_and_saves_nothing(projection: Projection) -> None:
    spec = AdapterSpec(CP(2), FlatFold(2), projection)
    [(group, graph)] = spec.lay_out({"w": (8, 6)})
    adapter = make_adapter(spec, group, graph)
    assert not list(made(projection, 6, 6).parameters())
    assert not made(projection, 6, 6).state_dict()
    assert set(adapter.state_dict()) == {f"node_{n.name}" for n in graph.nodes}
    assert {n for n, _ in adapter.named_parameters()} == set(adapter.state_dict())


def test_a_shuffle_permutes_the_elements_of_dw() -> None:
    plain, shuffled = (AdapterSpec(CP(2), FlatFold(2, 1), p) for p in (None, Shuffle(3)))
    deltas = []
    for spec in (plain, shuffled):
        [(group, graph)] = spec.lay_out({"w": (8, 6)})
        adapter = make_adapter(spec, group, graph)
        with torch.no_grad():
            for k, parameter in enumerate(adapter.parameters()):
                parameter.copy_(torch.arange(float(parameter.numel())).reshape(parameter.shape) + k)
        deltas.append(adapter.delta("w").reshape(-1))
    assert torch.equal(deltas[1], deltas[0][permutation(3, 48).long()])
    assert not torch.equal(deltas[1], deltas[0])


def test_shuffle_refuses_to_change_the_length() -> None:
    with pytest.raises(SpecError, match="Shuffle keeps the length"):
        fixed_map(Shuffle(), 4, 5)


def test_no_projection_is_no_map() -> None:
    assert fixed_map(None, 4, 4) is None


# --- the transform in runs ------------------------------------------------------------------------------------------


@pytest.fixture(params=[4, 5, 7, 9])
def small_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for large sizes, which takes runs of 2**20, with runs small enough to compare with a dense matrix."""
    monkeypatch.setattr(walsh, "RUN_BITS", request.param)
    monkeypatch.setattr(walsh, "PLAIN_BITS", 2)


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("shape", [(8,), (64,), (512,), (3, 2, 256), (5, 1024), (2, 4096), (1, 2, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_transform_in_runs_is_scipys_too(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(-4, 5, shape).to(dtype)
    dense = torch.from_numpy(scipy.linalg.hadamard(shape[-1])).to(dtype)
    assert torch.equal(hadamard(x), x @ dense)  # small whole numbers: sums are exact


# torch's own forward-mode rules compile with torch.jit.script when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.usefixtures("small_runs")
def test_the_transform_in_runs_differentiates_twice_and_maps() -> None:
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    dense = torch.from_numpy(scipy.linalg.hadamard(128)).double()
    assert torch.autograd.gradcheck(hadamard, x[:1])
    assert torch.autograd.gradgradcheck(hadamard, x[:1].detach().requires_grad_())
    plain, way = x.detach(), torch.randn_like(x)
    # Sums of 128 products of sizes about 1: 128 roundings of 1e-16 each stay far below 1e-12.
    torch.testing.assert_close(torch.func.vmap(hadamard, in_dims=1)(plain.T.contiguous()), plain @ dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.func.jvp(hadamard, (plain,), (way,))[1], way @ dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(hadamard(plain.T[:, :2].T), plain[:2] @ dense, atol=1e-12, rtol=0)


def explicit(declared: Fastfood, size_in: int, size_out: int) -> np.ndarray:
    """A fastfood map of any order as a product of explicit matrices, applied from the left one after another."""
    p = 1 << (max(size_in, size_out) - 1).bit_length()
    result, transforms = np.eye(p)[:, :size_in], 0
    seen: dict[str, int] = {}
    for factor in declared.order:
        seen[factor] = seen.get(factor, 0) + 1
        mark = f" {seen[factor]}" if seen[factor] > 1 else ""
        if factor == "H":
            result, transforms = oracle.hadamard_matrix(p) @ result, transforms + 1
        elif factor == "B":
            result = np.diag(signs(declared.seed, p, f"signs{mark}").double().numpy()) @ result
        elif factor == "G":
            result = np.diag(gaussians(declared.seed, p, f"gaussians{mark}").double().numpy()) @ result
        else:
            result = np.eye(p)[permutation(declared.seed, p, f"permutation{mark}").numpy()] @ result
    scale = {"none": 1.0, "orthonormal": p ** (-transforms / 2)}.get(declared.scaling)
    if scale is None:
        scale = (size_in * p ** (transforms - 1)) ** -0.5 if transforms else 1.0
    return scale * result[:size_out]


@given(
    st.text("BHPG", min_size=1, max_size=8), st.sampled_from(["variance", "orthonormal", "none"]),
    st.integers(1, 20), st.integers(0, 20), st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_any_order_and_scaling_is_the_product_of_its_matrices(
    order: str, scaling: str, size_in: int, more: int, seed: int, tanh: bool
) -> None:
    declared = Fastfood(0.5, seed, tanh, order, scaling)
    fixed, matrix = made(declared, size_in, size_in + more), explicit(declared, size_in, size_in + more)
    x = torch.randn(3, size_in, dtype=torch.float64)
    wanted = x.numpy() @ matrix.T
    found = fixed(x).numpy()
    # Every transform adds p <= 64 numbers, so at most 64 times 8 roundings of the sum of absolute values.
    worst = np.abs(x.numpy()) @ np.abs(explicit_bound(declared, size_in, size_in + more)).T
    assert (np.abs(found - (np.tanh(wanted) if tanh else wanted)) <= 64 * 8 * EPS * (worst + tanh)).all()


def explicit_bound(declared: Fastfood, size_in: int, size_out: int) -> np.ndarray:
    """The same product with every entry's absolute value: what no partial sum exceeds."""
    p = 1 << (max(size_in, size_out) - 1).bit_length()
    result = np.eye(p)[:, :size_in]
    for factor in declared.order:
        if factor == "H":
            result = np.ones((p, p)) @ result
        elif factor == "G":
            result = 8.0 * result  # a sum of twelve uniform numbers is below 6 standard deviations
        elif factor == "P":
            result = np.broadcast_to(result.max(0), result.shape)
    transforms = declared.order.count("H")
    scale = {"none": 1.0, "orthonormal": p ** (-transforms / 2)}.get(declared.scaling)
    if scale is None:
        scale = (size_in * p ** (transforms - 1)) ** -0.5 if transforms else 1.0
    return scale * result[:size_out]


@pytest.mark.parametrize("order", ["BHPGH", "HGPHB", "BH", "GHBH"])
def test_scaling_by_variance_keeps_it(order: str) -> None:
    fixed = made(Fastfood(0.25, 1, order=order), 1 << 10, 1 << 12)
    x = torch.randn(64, 1 << 10, dtype=torch.float64)
    # The mean of 1024 squared Gaussians has a standard deviation of sqrt(2 / 1024), the rest is smaller: 5 of those.
    assert abs(float(fixed(x).var()) - 1) < 5 * math.sqrt(2 / 1024)


@pytest.mark.parametrize("order", ["", "X", "BHPGHBHPG", "bh", None])
def test_a_wrong_order_raises(order: object) -> None:
    with pytest.raises(sl.SpecError, match="order="):
        Fastfood(order=order)


def test_a_wrong_scaling_raises() -> None:
    with pytest.raises(sl.SpecError, match="scaling="):
        Fastfood(scaling="mean")


@given(st.integers(0, 99), st.integers(3, 30))
def test_composed_maps_are_one_after_another(seed: int, size_in: int) -> None:
    size_out = 4 * size_in
    fixed = made(sl.Compose(Fastfood(0.5, seed), Shuffle(seed + 1), Fastfood(0.5, seed + 2)), size_in, size_out)
    middle = 2 * size_in
    first, last = (made(Fastfood(0.5, s), a, b) for s, a, b in ((seed, size_in, middle), (seed + 2, middle, size_out)))
    x = torch.randn(2, size_in, dtype=torch.float64)
    wanted = last(first(x)[:, permutation(seed + 1, middle).long()])
    assert torch.equal(fixed(x), wanted)


def test_a_composed_map_is_part_of_a_spec() -> None:
    projection = sl.Compose(Fastfood(0.5, 1), Shuffle(2), Fastfood(0.2, 3))
    spec = sl.lorta(2, 3, 4, projection)
    assert projection.ratio == pytest.approx(0.1)
    assert spec == sl.AdapterSpec.from_dict(spec.to_dict())
    shapes = {f"layers.{k}.q_proj": (12, 20) for k in range(2)}
    assert spec.count(shapes) == oracle.count_lorta(2, 3, 4, 0.1 * 480)
    for wrong in ((), (Shuffle(),), (Shuffle(), None)):
        with pytest.raises(sl.SpecError, match="Compose was given"):
            sl.Compose(*wrong)
    with pytest.raises(sl.SpecError, match="ratios of its own"):
        sl.superlora(projection=projection, budget=100, ratio=0.5).choose(shapes)
