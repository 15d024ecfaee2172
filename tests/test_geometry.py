"""Geometry of updates: shared singular directions and distance, against numpy and by their invariances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from superlora_tn.tools import geometry
from superlora_tn.tools.geometry import Comparison, compare, compare_all, figure

SIDES = st.tuples(st.integers(5, 12), st.integers(5, 12))
SEEDS = st.integers(0, 2**31)
# Singular values fall by 0.7 each, so the gap behind the fifth is 0.07 of the first, and rounding (about 1e-15) turns
# the directions by no more than about 1e-13.
TURN = 1e-11


def orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def falling(shape: tuple[int, int], seed: int, fall: float = 0.7, rank: int | None = None) -> Tensor:
    """A random matrix with known singular values, ``fall ** k``."""
    most = rank or min(shape)
    u, v = orthogonal(shape[0], most, seed), orthogonal(shape[1], most, seed + 1)
    return (u * fall ** torch.arange(most)) @ v.T


def close(a: Comparison, b: Comparison, allowed: float = TURN) -> bool:
    return max(abs(a.left - b.left), abs(a.right - b.right), abs(a.distance - b.distance)) <= allowed


def oracle(delta: Tensor, reference: Tensor, k: int) -> Comparison:
    """The definitions, in numpy."""
    (u, _, vh), (u2, _, vh2) = (np.linalg.svd(m.double().numpy()) for m in (delta, reference))
    left = np.linalg.norm(u[:, :k].T @ u2[:, :k]) ** 2 / k
    right = np.linalg.norm(vh[:k] @ vh2[:k].T) ** 2 / k
    return Comparison(left, right, float(np.linalg.norm((delta - reference).double().numpy())))


@given(SIDES, SEEDS, st.integers(1, 5))
def test_it_is_the_definition(shape: tuple[int, int], seed: int, k: int) -> None:
    a, b = falling(shape, seed), falling(shape, seed + 2)
    assert close(compare(a, b, k), oracle(a, b, k))


@given(SIDES, SEEDS)
def test_it_is_symmetric_and_within_its_bounds(shape: tuple[int, int], seed: int) -> None:
    a, b = falling(shape, seed), falling(shape, seed + 2)
    result = compare(a, b)
    assert close(result, compare(b, a))
    assert 0 <= result.left <= 1
    assert 0 <= result.right <= 1


@given(SIDES, SEEDS)
def test_rotating_both_changes_nothing(shape: tuple[int, int], seed: int) -> None:
    a, b = falling(shape, seed), falling(shape, seed + 2)
    out, into = orthogonal(shape[0], shape[0], seed + 4), orthogonal(shape[1], shape[1], seed + 5)
    assert close(compare(a, b), compare(out @ a @ into, out @ b @ into))


@given(SIDES, SEEDS)
def test_transposing_swaps_left_and_right(shape: tuple[int, int], seed: int) -> None:
    a, b = falling(shape, seed), falling(shape, seed + 2)
    result = compare(a, b)
    assert close(compare(a.T, b.T), Comparison(result.right, result.left, result.distance))


@given(SIDES, SEEDS, st.sampled_from([1e-200, 1e-3, -2.0, 1e150]))
def test_scale_moves_the_distance_only(shape: tuple[int, int], seed: int, scale: float) -> None:
    a = falling(shape, seed)
    result = compare(a, scale * a)
    assert abs(result.left - 1) <= TURN
    assert abs(result.right - 1) <= TURN
    expected = abs(1 - scale) * float(a.norm())
    assert abs(result.distance - expected) <= 1e-14 * max(expected, 1)


@given(SIDES, SEEDS)
def test_the_distance_is_a_metric(shape: tuple[int, int], seed: int) -> None:
    a, b, c = (falling(shape, seed + 2 * k) for k in range(3))
    assert compare(a, a).distance == 0
    assert compare(a, b).distance > 0
    assert compare(a, c).distance <= compare(a, b).distance + compare(b, c).distance + TURN


@given(st.integers(1, 5), SEEDS)
def test_updates_without_a_common_direction_share_nothing(k: int, seed: int) -> None:
    frame, other = orthogonal(12, 2 * k, seed), orthogonal(11, 2 * k, seed + 1)
    values = 0.7 ** torch.arange(k, dtype=torch.float64)
    a, b = (frame[:, :k] * values) @ other[:, :k].T, (frame[:, k:] * values) @ other[:, k:].T
    result = compare(a, b, k)
    assert max(result.left, result.right) <= TURN
    assert abs(compare(a, (frame[:, :k] * values) @ other[:, k:].T, k).left - 1) <= TURN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_missing_directions_share_nothing(rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rank)
    low = torch.randn(20, rank, generator=generator, dtype=dtype) @ torch.randn(rank, 30, generator=generator, dtype=dtype)
    result = compare(low, low)
    assert abs(result.left - rank / 5) <= TURN
    assert abs(result.right - rank / 5) <= TURN
    assert max(compare(low, falling((20, 30), 0)).left, compare(low, falling((20, 30), 0)).right) <= rank / 5


def test_a_zero_update_shares_nothing_and_is_as_far_as_the_reference_is_long() -> None:
    reference = falling((8, 9), 0)
    assert compare(torch.zeros(8, 9), reference) == Comparison(0, 0, float(torch.linalg.matrix_norm(reference)))
    assert compare(torch.zeros(8, 9), torch.zeros(8, 9)) == Comparison(0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    a, b = falling((40, 30), 0).to(dtype).requires_grad_(), falling((40, 30), 2).to(dtype)
    assert close(compare(a, b), oracle(a.detach().double(), b.double(), 5))


def exactly(monkeypatch: pytest.MonkeyPatch, a: Tensor, b: Tensor, k: int = 5) -> Comparison:
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "EXACT_SIDE", 10**9)
        return compare(a, b, k)


@pytest.mark.parametrize("fall", [0.5, 0.9, 0.97])
def test_the_randomised_decomposition_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch, fall: float) -> None:
    a = falling((560, 530), 0, fall, rank=200)
    b = a + 0.3 * falling((560, 530), 2, fall, rank=200)
    assert geometry._randomised(a / a.norm(), 5, 1e-12) is not None
    # Each subspace is off by a sine of TOLERANCE at most (Wedin), and dL is linear in either projector.
    assert close(compare(a, b), exactly(monkeypatch, a, b), 4 * geometry.TOLERANCE)


def test_a_large_update_of_low_rank_is_seen_as_such() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(530, 3, generator=generator) @ torch.randn(3, 540, generator=generator)
    assert abs(compare(low, low).left - 3 / 5) <= TURN


def test_where_singular_values_hardly_fall_the_exact_decomposition_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 520, 515, generator=generator)
    assert geometry._randomised((a / a.norm()).double(), 5, 1e-12) is None
    assert compare(a, b) == exactly(monkeypatch, a, b)


def test_it_repeats_and_leaves_the_random_state_alone() -> None:
    a, b = falling((520, 515), 0, rank=60), falling((520, 515), 2, rank=60)
    before = torch.get_rng_state()
    first = compare(a, b)
    torch.manual_seed(5)
    assert compare(a, b) == first
    torch.set_rng_state(before)
    compare(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_many_directions_of_a_large_matrix() -> None:
    a = falling((520, 515), 0, 0.99)
    assert abs(compare(a, a, 515).left - 1) <= 1e-9


def test_compare_all_goes_by_name() -> None:
    a, b = falling((8, 9), 0), falling((8, 9), 2)
    results = compare_all({"v": a, "q": b}, {"q": b, "v": b}, 3)
    assert list(results) == ["v", "q"]
    assert results["v"] == compare(a, b, 3)
    assert results["q"].distance == 0


GOOD = torch.eye(6)
WRONG = [
    (torch.zeros(6, 5), 2, r"shapes \(6, 5\) and \(6, 6\) were given; both must be matrices"),
    (torch.zeros(6, 6, 1, 1), 2, r"Reshape a convolution's update"),
    (GOOD, 7, r"k=7 directions were asked of a matrix \(6, 6\); choose k from 1 to 6"),
    (GOOD, 0, r"k=0 directions"),
    (GOOD, True, r"k=True directions"),
    (GOOD.long(), 2, r"the update is of dtype torch.int64"),
    (GOOD * float("nan"), 2, r"the update has numbers that are not finite"),
]


@pytest.mark.parametrize(("delta", "k", "words"), WRONG)
def test_what_does_not_compare_says_why(delta: Tensor, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compare(delta, GOOD, k)
    with pytest.raises(ValueError, match=f"weight 'q': .*{words}"):
        compare_all({"q": delta}, {"q": GOOD}, k)


def test_weights_without_a_partner_are_named() -> None:
    with pytest.raises(ValueError, match=r"'v' is among the references only; .* \(1 have no partner\)"):
        compare_all({"q": GOOD}, {"q": GOOD, "v": GOOD})
    with pytest.raises(ValueError, match=r"'q' is among the updates only"):
        compare_all({"q": GOOD}, {})


def test_the_figure_has_a_row_a_type_and_a_line_a_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    made = []
    panels = geometry.panels
    monkeypatch.setattr(geometry, "panels", lambda *size: made.append(panels(*size)) or made[-1])
    names = [f"encoder.layer.{k}.attention.{kind}" for k in range(3) for kind in ("query", "value")]
    results = {variant: {name: Comparison(0.1 * k, 0.2, 3.0 + k) for k, name in enumerate(names)} for variant in ("LoRA", "2D")}
    del results["2D"][names[2]]  # a variant may lack a weight
    place = figure(results, tmp_path / "new" / "geometry.png", "all")
    assert place.read_bytes().startswith(b"\x89PNG")
    [(_, grid)] = made
    assert grid.shape == (2, 3)
    assert [line.get_label() for line in grid[0, 0].lines] == ["LoRA", "2D"]
    assert list(grid[1, 0].lines[0].get_ydata()) == pytest.approx([0.1, 0.3, 0.5])
    assert list(grid[0, 2].lines[1].get_xdata()) == [0, 2]
    assert [axes.get_title() for axes in grid[:, 0]] == [
        "attention.query: dL, left directions",
        "attention.value: dL, left directions",
    ]


def test_a_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no comparison to draw"):
        figure({"LoRA": {}}, tmp_path / "empty.png")
