"""Ranks above what a weight can use: a preset caps them, a plain part refuses, and what is to be kept is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import EPS, Bound, Case, dense_tensor, targets

import superlora_tn as sl
from superlora_tn import CP, AdapterSpec, FlatFold, PhysicalFold, SpecError, TensorTrain, Tucker

PRESETS: dict[str, Callable[[int], AdapterSpec]] = {
    "lora": sl.lora,
    "loha": sl.loha,
    "lokr": sl.lokr,
    "lokr both": lambda r: sl.lokr(r, decompose_both=True),
    "lotr": sl.lotr,
    "lonkr": sl.lonkr,
    "lorta": sl.lorta,
    "superlora": lambda r: sl.superlora(r, order=3),
    "superlora matrix": lambda r: sl.superlora(r),
    "superlora splits": lambda r: sl.superlora(r, splits=2),
    "superlora by weight": lambda r: sl.superlora(r, groups="weight"),
    "vera": sl.vera,
}
SHAPES = st.dictionaries(
    st.sampled_from(["a.0.q", "a.0.v", "a.1.q", "a.1.v", "router"]),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    min_size=1,
)


@pytest.mark.parametrize("name", PRESETS)
@given(SHAPES, st.integers(1, 40))
def test_a_preset_takes_any_rank_on_any_weight(name: str, shapes: dict[str, tuple[int, int]], rank: int) -> None:
    spec = PRESETS[name](rank)
    assert spec.count(shapes) > 0
    for bound in Case(spec, shapes).bound():
        for target in bound.targets:
            error = np.abs(bound.adapter.delta(target).detach().numpy() - bound.reference[target])
            assert (error <= bound.error(target)).all()


@given(SHAPES, st.integers(1, 40))
def test_lora_takes_the_rank_of_each_weight_where_that_is_lower(shapes: dict[str, tuple[int, int]], rank: int) -> None:
    expected = sum(min(rank, o, i) * (o + i) for o, i in shapes.values())
    assert sl.lora(rank).count(shapes) == expected


def test_a_router_of_one_output_stops_no_preset() -> None:
    shapes = {"blocks.0.attn.wq": (6144, 6144), "txtfusion_projector": (1, 12)}
    assert sl.lora(32).count(shapes) == 32 * 2 * 6144 + 1 * 13
    assert sl.loha(32).count(shapes) == 2 * sl.lora(32).count(shapes)
    with pytest.raises(SpecError, match=r"rank=32 over modes of sizes \(1, 12\); there a rank above 1 adds nothing"):
        AdapterSpec(CP(32)).count(shapes)
    assert AdapterSpec(CP(32, over="keep")).count(shapes) == 32 * (2 * 6144 + 13)


def test_the_scale_stays_that_of_the_rank_that_was_declared() -> None:
    for make in (sl.lora, sl.loha, sl.lotr, sl.lokr):
        assert make(32, alpha=16.0).scale == 0.5
        assert make(32, alpha=16.0, rslora=True).scale == 16 / math.sqrt(32)
    [bound] = Case(sl.lora(32, alpha=16.0), {"router": (1, 12)}).bound()
    dw = 0.5 * oracle.lora(bound.values["factor_out"], bound.values["factor_in"].T)
    assert np.abs(bound.adapter.delta("router").detach().numpy() - dw).max() <= 4 * EPS * np.abs(dw).max()


SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


@st.composite
def parts(draw: st.DrawFn, order: int) -> CP | Tucker | TensorTrain:
    rank: int | tuple[int, ...] = draw(st.integers(1, 9))
    kind = draw(st.sampled_from([CP, Tucker, TensorTrain]))
    if kind is not CP and draw(st.booleans()):
        rank = tuple(draw(st.integers(1, 9)) for _ in range(order if kind is Tucker else order - 1))
    return kind(rank)  # type: ignore[arg-type]


def unfoldings(tensor: np.ndarray, cuts: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The matrices that have these modes as rows."""
    found = []
    for rows in cuts:
        rest = [m for m in range(tensor.ndim) if m not in rows]
        found.append(tensor.transpose(*rows, *rest).reshape(math.prod(tensor.shape[m] for m in rows), -1))
    return found


def bound_of(part: CP | Tucker | TensorTrain, side: int, order: int) -> Bound:
    """A part on the one weight whose flat fold has these equal sides."""
    [bound] = Case(AdapterSpec(part, FlatFold(order)), {"w": (side, side ** (order - 1))}).bound()
    return bound


@given(st.data(), st.integers(1, 3), st.integers(2, 4))
def test_capped_ranks_reach_as_far_as_those_that_were_declared(data: st.DataObject, side: int, order: int) -> None:
    """A Tucker or a train reaches the tensors whose unfoldings have its ranks; random ones have just these, capped or kept."""
    part = data.draw(parts(order))
    modes = [f"m{k + 1}" for k in range(order)]
    ranks = []
    for over in ("cap", "keep"):
        bound = bound_of(replace(part, over=over), side, order)
        tensor = dense_tensor(part, modes, bound.values)
        cuts = [tuple(range(k)) for k in range(1, order)] if isinstance(part, TensorTrain) else [(k,) for k in range(order)]
        ranks.append([int(np.linalg.matrix_rank(m)) for m in unfoldings(tensor, cuts)])
    assert ranks[0] == ranks[1]


@given(st.data(), st.integers(1, 3), st.integers(2, 4))
def test_over_says_what_happens_to_a_rank_above_its_bound(data: st.DataObject, side: int, order: int) -> None:
    part = data.draw(parts(order))
    kept, capped = (bound_of(replace(part, over=over), side, order).graph for over in ("keep", "cap"))
    assert capped.num_parameters <= kept.num_parameters
    try:
        refused = bound_of(part, side, order).graph
    except SpecError as error:
        assert "adds nothing. Choose rank <= " in str(error)
        assert "over='cap'" in str(error)
        assert capped.num_parameters < kept.num_parameters
    else:
        assert refused == kept


def test_published_counts_of_plain_tuckers_stay() -> None:
    """One rank for all modes may be above the smaller ones, as TensLoRA counts it."""
    shapes = targets(12, 3, (768, 768))
    plain = AdapterSpec(Tucker(16), PhysicalFold("layer type out in"))
    assert plain.count(shapes) == 16**4 + 16 * (12 + 3 + 768 + 768)
    capped = AdapterSpec(Tucker(16, over="cap"), PhysicalFold("layer type out in"))
    assert capped.count(shapes) == 12 * 3 * 16 * 16 + 12 * 12 + 3 * 3 + 2 * 16 * 768
