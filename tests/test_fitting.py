"""The pieces of a fit against plain linear algebra: environments, unfoldings, closed forms, joint steps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from superlora_tn.contraction.layout import Equation
from superlora_tn.declare.fold import FlatFold, Mode
from superlora_tn.declare.maps import Compose, Fastfood, Shuffle
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, Network, Part, TensorTrain, Tucker
from superlora_tn.network.expand import lower
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.als import Fitting, balanced, conjugate_gradients, environments
from superlora_tn.tools.closed_forms import trees
from superlora_tn.tools.environment import Environment
from superlora_tn.tools.frames import equation_of, frame
from superlora_tn.tools.newton import Newton
from superlora_tn.tools.problem import Mapped, Picked, Problem, Unfolding, Whole
from superlora_tn.tools.singular import leading

RING = Network("x y", {"a": 2, "b": 2, "c": 2}, A="a x b", B="b y c", C="c a")
NETWORKS: dict[str, tuple[Part, tuple[int, ...]]] = {
    "cp": (CP(3), (4, 5, 6)),
    "tucker": (Tucker(2), (4, 5, 6)),
    "train": (TensorTrain(2), (3, 4, 5, 2)),
    "kronecker": (Kronecker(Dense(), CP(2)), (6, 8)),
    "loha": (Hadamard(CP(2), CP(2)), (6, 8)),
    "hadamard of others": (Hadamard(Tucker(2), Kronecker(CP(1), Dense())), (6, 8)),
    "ring": (RING, (5, 6)),
    "dense": (Dense(), (3, 4)),
}
LOOPED = {"cp", "loha", "hadamard of others", "ring"}


def equation(part: Part, sizes: tuple[int, ...]) -> Equation:
    modes = tuple(Mode(name, size, "flat") for name, size in zip("xyzw", sizes, strict=False))
    return equation_of(lower(part, modes), fixed=True)


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(name: str, seed: int = 0) -> tuple[Problem, list[Tensor]]:
    """A problem whose wanted tensor is noise, and random nodes."""
    whole = equation(*NETWORKS[name])
    size = dict(whole.sizes)
    wanted = draw(tuple(size[i] for axis in whole.result for i in axis), seed + 100)
    made = Problem(whole, Whole(), wanted)
    return made, [draw(shape, seed + k) for k, shape in enumerate(made.shapes)]


def matrix(environment: Environment, nodes: list[Tensor]) -> np.ndarray:
    """E of a node, column by column."""
    node = nodes[environment.node]
    units = torch.eye(node.numel(), dtype=torch.float64).reshape(-1, *node.shape)
    return torch.stack([environment.push(nodes, unit).reshape(-1) for unit in units], dim=1).numpy()


@pytest.mark.parametrize("name", NETWORKS)
def test_an_environment_is_the_matrix_that_multiplies_its_node(name: str) -> None:
    made, nodes = problem(name)
    tensor = made.value(*nodes).numpy().reshape(-1)
    for environment in environments(made.equation):
        e = matrix(environment, nodes)
        # Sums of at most some hundred products of normal numbers.
        assert np.allclose(e @ nodes[environment.node].numpy().reshape(-1), tensor, atol=1e-11)
        pulled = environment.pull(nodes, made.wanted).numpy().reshape(-1)
        assert np.allclose(e.T @ made.wanted.numpy().reshape(-1), pulled, atol=1e-11)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_spectrum_solves_the_normal_equations(name: str, damping: float) -> None:
    made, nodes = problem(name)
    for environment in environments(made.equation):
        e = matrix(environment, nodes)
        right = environment.pull(nodes, made.wanted)
        spectrum = environment.spectrum(nodes)
        found = spectrum.solve(right, damping).numpy().reshape(-1)
        normal = e.T @ e + damping * np.eye(e.shape[1])
        expected = np.linalg.pinv(normal, rcond=1e-12, hermitian=True) @ right.numpy().reshape(-1)
        # The condition of E'E is below 1e5 for these nodes.
        assert np.allclose(found, expected, atol=1e-9 * np.abs(expected).max())
        assert spectrum.exact
        assert spectrum.largest == pytest.approx(np.linalg.eigvalsh(e.T @ e).max(), rel=1e-9)


def test_a_singular_environment_takes_the_least_step() -> None:
    made, nodes = problem("cp")
    nodes[1][:, 2] = nodes[1][:, 1]
    nodes[2][:, 2] = nodes[2][:, 1]
    environment = environments(made.equation)[0]
    e = matrix(environment, nodes)
    found = environment.spectrum(nodes).solve(environment.pull(nodes, made.wanted)).numpy().reshape(-1)
    expected = np.linalg.pinv(e, rcond=1e-8) @ made.wanted.numpy().reshape(-1)
    assert np.allclose(found, expected, atol=1e-9 * np.abs(expected).max())


def test_a_side_too_long_for_eigenvectors_goes_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from superlora_tn.tools import environment as room

    made, nodes = problem("tucker")
    monkeypatch.setattr(room, "MAX_SIDE", 1)
    assert not environments(made.equation)[1].spectrum(nodes).exact
    slow = Fitting(made, environments(made.equation), nodes)
    errors = [slow.error, slow.sweep(), slow.sweep()]
    monkeypatch.undo()
    quick = Fitting(made, environments(made.equation), nodes)
    # At most forty steps for eight unknowns end at conjugate gradients' own tolerance, 1e-10.
    assert errors == pytest.approx([quick.error, quick.sweep(), quick.sweep()], rel=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sweep_puts_the_last_node_at_its_least_squares_solution(name: str) -> None:
    made, nodes = problem(name)
    fitting = Fitting(made, environments(made.equation), nodes)
    before = fitting.error
    fitting.sweep()
    e = matrix(fitting.environments[-1], fitting.nodes)
    best = np.linalg.lstsq(e, made.wanted.numpy().reshape(-1), rcond=None)[0]
    missed = np.linalg.norm(made.wanted.numpy().reshape(-1) - e @ best) / fitting.wanted
    assert fitting.error == pytest.approx(missed, rel=1e-9)
    assert fitting.error < before


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", ["cp", "tucker", "ring"])
def test_joint_steps_lower_the_error_down_to_where_no_gradient_is_left(name: str, direct: bool) -> None:
    # A CP (and LoHa nearly always) may have no nearest network to noise: the error falls for ever while nodes grow and cancel.
    made, nodes = problem(name, seed=3)
    fitting = Fitting(made, environments(made.equation), nodes)
    newton = Newton(fitting)
    assert newton.possible
    newton._direct = direct
    errors = [fitting.error, *(newton.step() for _ in range(300))]
    assert all(b <= a for a, b in pairwise(errors))
    slopes = [e.pull(fitting.nodes, fitting.residual).norm() for e in fitting.environments]
    # Steps end in a valley with slow directions.
    first = Fitting(made, fitting.environments, nodes)
    started = [e.pull(nodes, first.residual).norm() for e in first.environments]
    assert max(slopes) < 1e-3 * max(started)


@pytest.mark.parametrize("name", NETWORKS)
def test_trees_are_told_from_networks_with_loops(name: str) -> None:
    found = trees(equation(*NETWORKS[name]))
    assert (found is None) == (name in LOOPED)
    if found is not None:
        assert sorted(k for tree in found for k in tree.nodes) == list(range(len(equation(*NETWORKS[name]).inputs)))


def test_a_network_in_which_all_share_bonds_is_seen_to_have_loops_at_once() -> None:
    bonds = {f"r{a}_{b}": 2 for a in range(11) for b in range(a)}
    nodes = {f"n{k}": " ".join(["o" if k == 0 else "", *(b for b in bonds if str(k) in b[1:].split("_"))]) for k in range(11)}
    network = Network("o", bonds, **nodes)
    graph = lower(network, (Mode("m1", 3, "flat"),))
    assert trees(equation_of(graph, fixed=True)) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_balancing_changes_the_gauge_alone(name: str) -> None:
    made, nodes = problem(name)
    nodes = [n * 10.0**k for k, n in enumerate(nodes)]
    after = balanced(made.equation, nodes)
    value = made.value(*nodes)
    assert torch.allclose(made.value(*after), value, rtol=0, atol=1e-13 * float(value.abs().max()) * 100)
    sizes = [float(n.norm()) for n in after]
    assert max(sizes) < 1.01 * min(sizes)


SHAPES = {"a": (5, 7), "b": (4, 6)}
MAPS = {
    "none": None,
    "shuffle": Shuffle(1),
    "shuffles": Compose(Shuffle(1), Shuffle(2)),
    "fastfood": Fastfood(0.5),
    "tanh": Fastfood(0.5, tanh=True),
}


@pytest.mark.parametrize("name", MAPS)
def test_an_unfolding_is_its_folds_own_and_its_derivative_has_its_adjoint(name: str) -> None:
    spec = AdapterSpec(Tucker(2), FlatFold(3, 2), MAPS[name])
    [(group, graph)] = spec.lay_out(SHAPES)
    own = frame(group, spec, graph)
    load = {n: draw(shape) for n, shape in SHAPES.items()}.__getitem__
    for number in range(len(own.places)):
        made = own.problem(number, load)
        check(made.unfolding, made.shape, len(made.wanted))


def check(unfolding: Unfolding, shape: tuple[int, ...], count: int) -> None:
    at, step, elements = draw(shape, 1) / 3, draw(shape, 2), draw((count,), 3)
    pushed, pulled = unfolding.push(at, step), unfolding.pull(at, elements)
    assert float(pushed @ elements) == pytest.approx(float((step * pulled).sum()), rel=1e-10)
    small = 1e-6  # central differences are off by its square
    difference = (unfolding(at + small * step) - unfolding(at - small * step)) / (2 * small)
    assert torch.allclose(pushed, difference, atol=1e-8)
    if unfolding.isometric:
        assert torch.equal(unfolding.pull(at, unfolding(step)), step)


def test_a_large_maps_derivative_is_the_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from superlora_tn.tools import frames

    spec = AdapterSpec(Tucker(2), FlatFold(3, 2), Fastfood(0.5))
    [(group, graph)] = spec.lay_out(SHAPES)
    load = {n: draw(shape) for n, shape in SHAPES.items()}.__getitem__
    small = frame(group, spec, graph).problem(1, load)
    monkeypatch.setattr(frames, "MAX_MATRIX", 0)
    large = frame(group, spec, graph).problem(1, load)
    assert isinstance(large.unfolding, Mapped)
    at, elements = draw(small.shape, 1), draw((len(small.wanted),), 2)
    # Two ways through transforms of 64 numbers.
    assert torch.allclose(small.unfolding(at), large.unfolding(at), atol=1e-12)
    assert torch.allclose(small.unfolding.pull(at, elements), large.unfolding.pull(at, elements), atol=1e-12)


def test_picked_elements_keep_distances_only_where_none_is_left_out() -> None:
    assert Picked(torch.arange(12), (3, 4)).isometric
    assert not Picked(torch.arange(11), (3, 4)).isometric


def test_conjugate_gradients_solve_a_singular_system_that_has_a_solution() -> None:
    root = draw((6, 4))
    matrix_ = root @ root.mT  # rank 4
    right = matrix_ @ draw((6,), 1)
    found = conjugate_gradients(lambda x: matrix_ @ x, right, lambda x: x, 50, 1e-12)
    assert torch.allclose(matrix_ @ found, right, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (3, 5), (1, 4), (4, 1)])
def test_more_triples_than_a_matrix_has_are_zero(rows: int, columns: int) -> None:
    given = draw((rows, columns))
    u, s, v = leading(given, 7)
    assert (u.shape, s.shape, v.shape) == ((rows, 7), (7,), (columns, 7))
    assert torch.allclose((u * s) @ v.mT, given, atol=1e-13)
    assert not s[min(rows, columns) :].any()


def test_the_first_triples_of_a_large_matrix_of_low_rank_are_exact() -> None:
    given = draw((700, 5)) @ draw((5, 620), 1)
    u, s, v = leading(given, 5)
    assert float(((u * s) @ v.mT - given).norm() / given.norm()) < 1e-13
    assert math.isclose(float(s.square().sum()), float(given.square().sum()), rel_tol=1e-12)
