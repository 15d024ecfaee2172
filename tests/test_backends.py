"""Every registered backend runs every plan, whole, and gives the oracle's numbers."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import EPS, SHAPES, Case, dense_tensor, physical_cases
from test_equals_dense import VARIANTS

from superlora_tn.contraction.backend import BackendError, backend, backends, compiled
from superlora_tn.contraction.plan import make_plan
from superlora_tn.declare.parts import Network
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec

pytestmark = pytest.mark.parametrize("name", backends())
RNG = np.random.default_rng(5)


def as_input(name: str, array: np.ndarray) -> Any:
    """An operand as the backend takes it; the reference takes numpy, the others tensors."""
    return array if name == "numpy_reference" else torch.from_numpy(array)


def as_array(result: Any) -> np.ndarray:
    return result if isinstance(result, np.ndarray) else result.detach().cpu().numpy()


def roundings(graph: Graph) -> int:
    """As `strategies.Bound.roundings`: terms summed plus products, for the backend and for the oracle."""
    kept = {i for _, indices in graph.modes for i in indices}
    return 2 * (math.prod(s for i, s in graph.sizes if i not in kept) + len(graph.nodes) + 4)


def draw_nodes(graph: Graph) -> dict[str, np.ndarray]:
    return {n.name: RNG.standard_normal(n.shape) for n in graph.nodes}


def by_matrix(spec: AdapterSpec, graph: Graph, values: dict[str, np.ndarray]) -> np.ndarray:
    """The oracle's tensor with all members first: (members..., flat) or (members..., out, in)."""
    modes = [mode for mode, _ in graph.modes if mode.name != "group"]
    batched = [mode.name for mode, _ in graph.modes if mode.name == "group"]
    names = [m.name for m in modes]
    if batched:
        count = graph.size["group"]
        slices = [dense_tensor(spec.network, names, {n: v[g] for n, v in values.items()}) for g in range(count)]
        return np.stack(slices).reshape(count, -1)
    tensor = dense_tensor(spec.network, names, values)
    order = [k for role in ("member", "flat", "out", "in") for k, m in enumerate(modes) if m.role == role]
    sizes = [m.size for m in modes if m.role == "member"]
    tail = [math.prod(m.size for m in modes if m.role == role) for role in ("flat", "out", "in")]
    flat = any(m.role == "flat" for m in modes)
    return tensor.transpose(order).reshape(*sizes, *(tail[:1] if flat else tail[1:]))


def assert_all_members(name: str, spec: AdapterSpec, graph: Graph) -> None:
    """The delta plan with nothing fixed, with and without alpha and out."""
    values = draw_nodes(graph)
    run = compiled(make_plan(graph, "delta", fixed=False), name)
    operands = [as_input(name, v) for v in values.values()]
    expected = by_matrix(spec, graph, values)
    size = by_matrix(spec, graph, {n: np.abs(v) for n, v in values.items()})
    out = RNG.standard_normal(expected.shape)
    for alpha in (1.0, -0.3):
        plain = as_array(run(*operands, alpha=alpha))
        added = as_array(run(*operands, out=as_input(name, out.copy()), alpha=alpha))
        allowed = roundings(graph) * EPS * (size + np.abs(out))
        assert plain.shape == expected.shape
        assert (np.abs(plain - alpha * expected) <= allowed).all()
        assert (np.abs(added - (out + alpha * expected)) <= allowed).all()


def assert_apply(name: str, spec: AdapterSpec, graph: Graph, d_in: int, tokens: int) -> None:
    """The apply plan of each of the first members."""
    values, x = draw_nodes(graph), RNG.standard_normal((tokens, d_in))
    members = [m.size for m, _ in graph.modes if m.role == "member"]
    run = compiled(make_plan(graph, "apply", tokens), name)
    for place in list(np.ndindex(*members))[:3]:
        picks = graph.select(place)
        operands = [as_input(name, np.ascontiguousarray(v[s])) for v, s in zip(values.values(), picks, strict=True)]
        delta = by_matrix(spec, graph, values)[place]
        size = by_matrix(spec, graph, {n: np.abs(v) for n, v in values.items()})[place]
        out = RNG.standard_normal((tokens, delta.shape[0]))
        allowed = roundings(graph) * (d_in + 2) * EPS * (np.abs(x) @ size.T + np.abs(out))
        plain = as_array(run(as_input(name, x), *operands, alpha=0.7))
        added = as_array(run(as_input(name, x), *operands, out=as_input(name, out.copy()), alpha=0.7))
        assert (np.abs(plain - 0.7 * x @ delta.T) <= allowed).all()
        assert (np.abs(added - (out + 0.7 * x @ delta.T)) <= allowed).all()


@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_all_members_at_once_equal_the_oracle(name: str, spec: AdapterSpec) -> None:
    for _, graph in spec.lay_out(SHAPES):
        assert_all_members(name, spec, graph)


@given(case=physical_cases())
def test_all_members_of_a_random_network_equal_the_oracle(name: str, case: Case) -> None:
    for _, graph in case.spec.lay_out(case.shapes):
        assert_all_members(name, case.spec, graph)


@given(case=physical_cases())
def test_the_apply_plan_of_a_random_network_equals_the_oracle(name: str, case: Case) -> None:
    for group, graph in case.spec.lay_out(case.shapes):
        assert_apply(name, case.spec, graph, group.shape[1], tokens=3)


def test_a_plan_serves_any_number_of_tokens(name: str) -> None:
    [(_, graph)] = VARIANTS[1].lay_out({"w": (12, 18)})
    run = compiled(make_plan(graph, "apply", 32), name)
    values = draw_nodes(graph)
    delta = by_matrix(VARIANTS[1], graph, values)
    for tokens in (0, 1, 5, 100):
        x = RNG.standard_normal((tokens, 18))
        got = as_array(run(as_input(name, x), *[as_input(name, v) for v in values.values()]))
        assert got.shape == (tokens, 12)
        assert np.all(np.abs(got - x @ delta.T) <= 100 * EPS * (np.abs(x) @ np.abs(delta.T) + 18 * 3 * 5))


@pytest.mark.parametrize("leading", [(4,), (4, 1), (1, 4), (2, 2)])
def test_x_and_out_may_have_several_leading_axes(name: str, leading: tuple[int, ...]) -> None:
    """The reference broadcast out (4, 1, out) against (4, out), to 16 rows."""
    [(_, graph)] = VARIANTS[1].lay_out({"w": (12, 18)})
    values, x, out = draw_nodes(graph), RNG.standard_normal((*leading, 18)), RNG.standard_normal((*leading, 12))
    operands = [as_input(name, array) for array in (x, *values.values())]
    found = as_array(compiled(make_plan(graph, "apply", 4), name)(*operands, out=as_input(name, out.copy())))
    assert found.shape == out.shape
    np.testing.assert_allclose(found, out + x @ by_matrix(VARIANTS[1], graph, values).T, rtol=1e-12, atol=1e-12)


def test_out_is_left_as_it_was(name: str) -> None:
    """A caller may still need the base output, and autograd may hold it."""
    [(_, graph)] = VARIANTS[1].lay_out({"w": (12, 18)})
    out = RNG.standard_normal((4, 12))
    before = out.copy()
    operands = [as_input(name, v) for v in (RNG.standard_normal((4, 18)), *draw_nodes(graph).values())]
    compiled(make_plan(graph, "apply", 4), name)(*operands, out=as_input(name, out), alpha=2.0)
    assert np.array_equal(out, before)


def test_a_network_of_scalars_and_one_of_one_node_run(name: str) -> None:
    one = AdapterSpec(Network("o i", w="o i"))
    scalars = AdapterSpec(Network("o i", a="", b="", w="o i", c=""))
    lone = AdapterSpec(Network("o i", a="o", b="i"))
    for spec, shape in ((one, (3, 4)), (scalars, (3, 4)), (lone, (3, 4)), (scalars, (1, 1)), (one, (1, 5)), (lone, (5, 1))):
        [(_, graph)] = spec.lay_out({"w": shape})
        assert_all_members(name, spec, graph)
        assert_apply(name, spec, graph, shape[1], tokens=2)


def test_equal_plans_compile_once(name: str) -> None:
    [(_, graph)] = VARIANTS[1].lay_out({"w": (12, 18)})
    plan = make_plan(graph, "delta")
    assert compiled(plan, name) is compiled(pickle.loads(pickle.dumps(plan)), name)


def test_a_backend_says_its_own_name_and_an_unknown_one_names_those_there_are(name: str) -> None:
    assert name == backend(name).NAME
    with pytest.raises(BackendError, match=name):
        backend("no_such_backend")
