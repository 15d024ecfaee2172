"""Identities between methods: the rows of SuperLoRA's table, and the algebra of networks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import oracle
import pytest
import torch
from strategies import EPS, SHAPES, Bound, Case, node_tensors, targets

from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, Network, Part, TensorTrain, Tucker
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora

Array = np.ndarray
RNG = np.random.default_rng(8)


def one(spec: AdapterSpec, shapes: Mapping[str, tuple[int, int]] | None = None) -> Bound:
    """The only group of a spec, filled with random values."""
    [bound] = Case(spec, dict(shapes or {"w": (12, 18)})).bound()
    return bound


def delta_with(bound: Bound, values: Mapping[str, Array], target: str | None = None) -> Array:
    """dW with the given node values."""
    tensors = node_tensors(bound.adapter)
    assert set(values) == set(tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(np.asarray(values[name], dtype=np.float64).reshape(tensor.shape)))
    return bound.adapter.delta(target or bound.targets[0]).detach().numpy().copy()  # a dense dW is the node itself


def close(a: Array, b: Array, terms: int, size: float) -> bool:
    """Two sums of `terms` products, each at most `size` in absolute value, in any order."""
    return bool((np.abs(a - b) <= 2 * (terms + 10) * EPS * max(terms, 1) * size).all())


# --- the rows of SuperLoRA's table ----------------------------------------------------------------------------------

ROWS = {
    "dense": (superlora(1, order=1, groups="weight"), dense()),
    "lora": (superlora(3, order=2, groups="weight", alpha=6), lora(3, alpha=6)),
    "lokr": (superlora(1, order=2, groups="weight", splits=2), lokr(1, decompose_both=True)),
    "lonkr": (superlora(1, order=2, groups="weight", splits=3), lonkr(1, 3)),
    "lorta-3": (superlora(2, order=3, groups=5), lorta(2, 3, 5)),
    "lorta-4": (superlora(2, order=4), lorta(2, 4)),
    "lokr-is-lonkr-of-two": (lonkr(2, 2), lokr(2, decompose_both=True)),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table_is_the_named_variant(row: str) -> None:
    ours, named = ROWS[row]
    shapes = targets(2, 2, (24, 36))
    assert ours.count(shapes) == named.count(shapes)
    for a, b in zip(Case(ours, shapes).bound(), Case(named, shapes).bound(), strict=True):
        values = {n: RNG.standard_normal(v.shape) for n, v in a.values.items()}
        for target in a.targets:
            assert np.array_equal(delta_with(a, values, target), delta_with(b, values, target))


def gradients(bound: Bound) -> dict[str, Array]:
    """Gradients of a seeded linear loss over all weights, by node, at the values that the adapter holds."""
    weights = torch.Generator().manual_seed(5)
    deltas = [bound.adapter.delta(target) for target in bound.targets]
    loss = [(d * torch.randn(d.shape, generator=weights, dtype=d.dtype)).sum() for d in deltas]
    torch.stack(loss).sum().backward()
    return {n.removeprefix("node_"): p.grad.numpy() for n, p in bound.adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table_has_the_named_variants_gradients(row: str) -> None:
    shapes = targets(2, 2, (24, 36))
    for a, b in zip(*(list(Case(spec, shapes).bound()) for spec in ROWS[row]), strict=True):
        delta_with(a, a.values)
        delta_with(b, a.values)
        ours, named = gradients(a), gradients(b)
        assert set(ours) == set(named) == set(a.values)
        assert all(np.array_equal(ours[n], named[n]) and ours[n].any() for n in named)


def test_lotr_is_the_papers_formula_with_the_layers_factor_held_at_the_identity() -> None:
    """Its row of the table: F = I, G = 1, K = 1, a core, M = 3; dW, gradients and counts of what both train."""
    shapes = targets(4, 1, (4, 4))
    own, flat = one(lotr(2), shapes), one(AdapterSpec(Tucker((4, 2, 2)), FlatFold(3)), shapes)
    renamed = {"core": "core", "factor_out": "factor_m2", "factor_in": "factor_m3"}
    values = {"factor_m1": np.eye(4), **{renamed[n]: v for n, v in own.values.items()}}
    assert own.spec.count(shapes) == flat.spec.count(shapes) - 4 * 4
    for target in own.targets:
        assert close(delta_with(flat, values, target), own.reference[target], 4 * 4, own.magnitude[target].max())
    ours, theirs = gradients(own), gradients(flat)
    for name, other in renamed.items():
        # 64 elements of dW with normal weights below 5 each, at most 4 x 4 products of the others' values below 5 in each.
        assert close(ours[name], theirs[other], 64 * 16, 5.0**4)


def test_lotr_is_a_tucker_whose_member_factor_is_the_identity() -> None:
    shapes = targets(2, 2, (12, 18))
    own = one(lotr(3), shapes)
    full = one(AdapterSpec(Tucker((4, 3, 3)), PhysicalFold("member out in")), shapes)
    values = {**own.values, "factor_member": np.eye(4)}
    for target in own.targets:
        assert close(delta_with(full, values, target), own.reference[target], 4 * 9, own.magnitude[target].max())


# --- parts ----------------------------------------------------------------------------------------------------------

PARTS: list[Part] = [
    Dense(),
    CP(2),
    Tucker(2),
    TensorTrain(2),
    Hadamard(CP(1), CP(2)),
    Network("o i", {"r": 2}, b="o r", a="r i"),
]


@pytest.mark.parametrize("part", PARTS, ids=repr)
@pytest.mark.parametrize(("product", "prefix"), [(Kronecker, "k1_"), (Hadamard, "h1_")])
def test_a_product_of_one_part_is_the_part(part: Part, product: type, prefix: str) -> None:
    alone, wrapped = one(AdapterSpec(part)), one(AdapterSpec(product(part)))
    values = {f"{prefix}{n}": v for n, v in alone.values.items()}
    assert np.array_equal(delta_with(wrapped, values), delta_with(alone, alone.values))


@pytest.mark.parametrize("fold", [PhysicalFold(), PhysicalFold("layer out in"), FlatFold(3, 1), FlatFold(4, 1)], ids=repr)
def test_cp_is_a_tucker_with_a_superdiagonal_core(fold: PhysicalFold | FlatFold) -> None:
    shapes = targets(3, 1, (12, 18))
    cps, tuckers = (Case(AdapterSpec(part, fold), shapes).bound() for part in (CP(2), Tucker(2)))
    for cp, tucker in zip(cps, tuckers, strict=True):
        order = len(cp.graph.modes)
        core = np.zeros((2,) * order)
        core[(np.arange(2),) * order] = 1.0
        for target in cp.targets:
            got = delta_with(tucker, {**cp.values, "core": core}, target)
            assert close(got, cp.reference[target], 2**order, cp.magnitude[target].max())


def test_a_tucker_of_the_outer_modes_is_a_train_of_order_three() -> None:
    shapes = targets(3, 1, (12, 18))
    tucker = one(lotr(3), shapes)
    train = one(AdapterSpec(TensorTrain(3), PhysicalFold("out member in")), shapes)
    v = tucker.values
    values = {"core_out": v["factor_out"], "core_member": v["core"].transpose(1, 0, 2), "core_in": v["factor_in"].T}
    for target in tucker.targets:
        assert close(delta_with(train, values, target), tucker.reference[target], 9, tucker.magnitude[target].max())


def test_loha_lies_inside_lora_of_the_product_of_ranks() -> None:
    """(sum_r b_r a_r) * (sum_s d_s c_s) = sum_rs (b_r * d_s)(a_r * c_s): row-wise Khatri-Rao products."""
    own, wide = one(loha(3)), one(lora(9))
    v = own.values
    khatri = {
        f"factor_{m}": np.einsum("dr,ds->drs", v[f"h1_factor_{m}"], v[f"h2_factor_{m}"]).reshape(-1, 9) for m in ("out", "in")
    }
    assert close(delta_with(wide, khatri), own.reference["w"], 9, own.magnitude["w"].max())


def test_loras_add_up_by_rank() -> None:
    first, second, both = one(lora(2)), one(lora(3)), one(lora(5))
    signed = {**second.values, "factor_out": -0.5 * second.values["factor_out"]}
    values = {n: np.concatenate([v, signed[n]], 1) for n, v in first.values.items()}
    expected = first.reference["w"] - 0.5 * second.reference["w"]
    assert close(delta_with(both, values), expected, 5, (first.magnitude["w"] + second.magnitude["w"]).max())


@pytest.mark.parametrize(("r1", "r2"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_the_rank_of_lokr_is_the_product_of_ranks(r1: int, r2: int) -> None:
    bound = one(AdapterSpec(Kronecker(CP(r1), CP(r2))), {"w": (20, 24)})
    v = bound.values
    low = [v[f"k{k}_factor_out"] @ v[f"k{k}_factor_in"].T for k in (1, 2)]
    assert [np.linalg.matrix_rank(w) for w in low] == [r1, r2]
    assert np.linalg.matrix_rank(bound.adapter.delta("w").detach().numpy()) == r1 * r2


def test_a_kronecker_has_rank_one_after_van_loans_rearrangement() -> None:
    bound = one(AdapterSpec(Kronecker(Dense(), Dense(), factor=4)), {"w": (12, 20)})
    delta = bound.adapter.delta("w").detach().numpy().reshape(4, 3, 4, 5).transpose(0, 2, 1, 3).reshape(16, 15)
    assert np.linalg.matrix_rank(delta) == 1


# --- what a network reaches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [PhysicalFold(), PhysicalFold("layer out in"), FlatFold(3)], ids=repr)
def test_a_tucker_of_full_rank_reaches_any_tensor_and_a_lower_one_does_not(fold: PhysicalFold | FlatFold) -> None:
    def first_group(part: Part) -> Bound:
        return next(iter(Case(AdapterSpec(part, fold), targets(3, 1, (6, 5))).bound()))

    dense = first_group(Dense())
    names, sizes = [m.name for m, _ in dense.graph.modes], [m.size for m, _ in dense.graph.modes]
    lower = [size - 1 for size in sizes]
    whole = RNG.standard_normal(sizes)
    turns = [np.linalg.qr(RNG.standard_normal((size, size)))[0] for size in sizes]
    core = oracle.tucker(whole, {k: q.T for k, q in enumerate(turns)})
    kept = tuple(slice(rank) for rank in lower)
    lost = core.copy()
    lost[kept] = 0
    factors = {f"factor_{name}": q for name, q in zip(names, turns, strict=True)}
    first = {name: q[:, :rank] for (name, q), rank in zip(factors.items(), lower, strict=True)}
    got = delta_with(first_group(Tucker(tuple(sizes))), {"core": core, **factors})
    short = delta_with(first_group(Tucker(tuple(lower))), {"core": core[kept], **first})
    wanted = delta_with(dense, {"weight": whole})
    missed = delta_with(dense, {"weight": oracle.tucker(lost, dict(enumerate(turns)))})
    # LAPACK's Q are orthogonal to within a few d u each, and an element is at most |T|.
    size = float(np.linalg.norm(whole))
    assert close(got, wanted, 4 * sum(sizes), size)
    assert close(wanted - short, missed, 4 * sum(sizes), size)
    assert np.abs(missed).max() > 1e-3


# --- gauge freedom --------------------------------------------------------------------------------------------------


def gauge(size: int) -> tuple[Array, Array]:
    """A well-conditioned matrix and its inverse: a rotation, and scales between 1/2 and 2."""
    rotation, _ = np.linalg.qr(RNG.standard_normal((size, size)))
    scales = np.linspace(0.5, 2.0, size)
    return rotation * scales, (rotation / scales).T


def test_a_gauge_on_any_bond_of_a_train_leaves_dw_unchanged() -> None:
    bound = one(AdapterSpec(TensorTrain((3, 2)), PhysicalFold("layer out in")), targets(4, 1, (12, 18)))
    target = bound.targets[2]
    (g, inverse), (h, back) = gauge(3), gauge(2)
    assert np.abs(g @ inverse - np.eye(3)).max() <= 100 * EPS
    v = bound.values
    core = np.einsum("ab,bmc,cd->amd", inverse, v["core_out"], h)
    moved = {"core_layer": v["core_layer"] @ g, "core_out": core, "core_in": back @ v["core_in"]}
    # Scales up to 2 and their inverses, and rotations of 3, widen each term at most by (2 x 3)^2 a bond.
    assert close(delta_with(bound, moved, target), bound.reference[target], 6 * 13, 36**2 * bound.magnitude[target].max())


def test_a_gauge_on_a_tuckers_bond_leaves_dw_unchanged() -> None:
    bound = one(lotr(3), targets(2, 1, (12, 18)))
    target = bound.targets[1]
    g, inverse = gauge(3)
    v = bound.values
    moved = {**v, "factor_out": v["factor_out"] @ g, "core": np.einsum("ab,mbc->mac", inverse, v["core"])}
    assert close(delta_with(bound, moved, target), bound.reference[target], 9 * 9, 36 * bound.magnitude[target].max())


def test_scaling_one_side_of_a_hyperbond_is_undone_on_another() -> None:
    """A CP bond is a copy node: only diagonal gauges pass through it; powers of two do so exactly."""
    bound = one(AdapterSpec(CP(3), PhysicalFold("layer out in")), targets(4, 1, (12, 18)))
    before = delta_with(bound, bound.values)
    scales = np.array([2.0, 0.25, 8.0])
    moved = {
        **bound.values,
        "factor_out": bound.values["factor_out"] * scales,
        "factor_layer": bound.values["factor_layer"] / scales,
    }
    assert np.array_equal(delta_with(bound, moved), before)


# --- flat and physical ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [CP(2), Tucker(2), TensorTrain(2), Kronecker(CP(1), Dense())], ids=repr)
def test_a_flat_fold_of_order_two_without_surplus_is_the_physical_fold(part: Part) -> None:
    """For one square weight the vector is read row by row, so m1 is out and m2 is in: no permutation at all."""
    physical = one(AdapterSpec(part), {"w": (16, 16)})
    flat = one(AdapterSpec(part, FlatFold(2)), {"w": (16, 16)})
    values = {n.replace("out", "m1").replace("in", "m2"): v for n, v in physical.values.items()}
    assert np.array_equal(delta_with(flat, values), delta_with(physical, physical.values))


@pytest.mark.parametrize("modes", ["layer out in", "in out layer", "out in layer"])
def test_a_flat_fold_without_surplus_is_any_physical_fold_with_its_modes_permuted(modes: str) -> None:
    """The vector runs over (layer, out, in), in fastest: m1 m2 m3, whatever the order of the physical modes."""
    shapes = targets(3, 1, (3, 3))
    physical, flat = one(AdapterSpec(Tucker(2), PhysicalFold(modes)), shapes), one(AdapterSpec(Tucker(2), FlatFold(3)), shapes)
    assert flat.group.surplus == 0
    order = [modes.split().index(m) for m in ("layer", "out", "in")]
    factors = {f"factor_m{k + 1}": physical.values[f"factor_{m}"] for k, m in enumerate(("layer", "out", "in"))}
    for target in shapes:
        got = delta_with(flat, {"core": physical.values["core"].transpose(order), **factors}, target)
        assert close(got, physical.reference[target], 8, physical.magnitude[target].max())


def test_a_flat_fold_by_weight_is_the_sum_over_groups_of_one() -> None:
    together = list(Case(lorta(2, 3, 1), {"w": (8, 8)}).bound())
    apart = list(Case(AdapterSpec(Tucker(2), FlatFold(3, "weight")), {"w": (8, 8)}).bound())
    for a, b in zip(together, apart, strict=True):
        assert np.array_equal(delta_with(a, a.values), delta_with(b, a.values))


def test_a_stack_of_weights_sharing_a_is_the_two_dimensional_fold() -> None:
    """ShareLoRA is the stacked fold with G = 1: the width is `in`, so A is the width's factor and B is stacked."""
    shapes = {f"layer.{k}.q": (5, 6) for k in range(6)}
    bound = one(AdapterSpec(CP(2), FlatFold(2, 1, stacked=True)), shapes)
    assert [m.size for m, _ in bound.graph.modes] == [6, 30]
    tensor = bound.values["factor_m1"] @ bound.values["factor_m2"].T
    pieces = np.split(tensor.reshape(-1), 6)
    for target, piece in zip(shapes, pieces, strict=True):
        error = np.abs(bound.adapter.delta(target).detach().numpy() - piece.reshape(5, 6))
        assert (error <= bound.error(target)).all()
    assert bound.spec.count(SHAPES) > 0
