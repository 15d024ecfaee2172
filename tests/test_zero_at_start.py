"""An adapter starts at dW = 0 exactly, by one zero node, and every trainable node learns from there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import SHAPES, Case, cases, node_tensors
from test_equals_dense import VARIANTS

from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, Network, Node, SpecError
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import loha, lokr, lonkr, lora, lotr, vera
from superlora_tn.update.base import Adapter
from superlora_tn.update.make import make_adapter


def fresh(case: Case) -> list[Adapter]:
    layout = case.spec.lay_out(case.shapes)
    return [make_adapter(case.spec, group, graph, dtype=torch.float64) for group, graph in layout]


def assert_starts_at_zero(case: Case) -> None:
    for adapter in fresh(case):
        zeros = [name for name, tensor in node_tensors(adapter).items() if not tensor.any()]
        assert len(zeros) == 1
        assert all(not adapter.delta(target).any() for target in adapter.group.members)


def assert_learns(case: Case) -> None:
    """Two steps of SGD on a random linear loss; its weights make no gradient vanish by symmetry."""
    for adapter in fresh(case):
        generator = torch.Generator().manual_seed(3)
        targets = list(adapter.group.members)
        weights = [torch.randn(adapter.delta(t).shape, generator=generator, dtype=torch.float64) for t in targets]
        reached = set()
        for _ in range(2):
            adapter.zero_grad()
            sum((adapter.delta(t) * w).sum() for t, w in zip(targets, weights, strict=True)).backward()
            reached |= {name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter -= parameter.grad
        assert reached == {name for name, _ in adapter.named_parameters()}


@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_every_variant_starts_at_zero(spec: AdapterSpec) -> None:
    assert_starts_at_zero(Case(spec, SHAPES))


@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_every_node_of_every_variant_learns_within_two_steps(spec: AdapterSpec) -> None:
    assert_learns(Case(spec, SHAPES))


PUBLISHED_ZERO = {
    "factor_out": lora(2),
    "h2_factor_out": loha(2),
    "k1_weight": lokr(2),
    "core": lotr(2),
    "b": vera(2),
    "k1_factor_out": lonkr(1, 3),
}


@pytest.mark.parametrize("name", PUBLISHED_ZERO)
def test_a_variant_starts_at_zero_where_its_paper_or_peft_does(name: str) -> None:
    [adapter] = fresh(Case(PUBLISHED_ZERO[name], {"w": (64, 64)}))
    assert [n for n, t in node_tensors(adapter).items() if not t.any()] == [name]


@given(cases())
def test_a_random_network_starts_at_zero(case: Case) -> None:
    assert_starts_at_zero(case)


@given(cases())
def test_every_node_of_a_random_network_learns_within_two_steps(case: Case) -> None:
    assert_learns(case)


@pytest.mark.parametrize("name", ["B", "C", "A"])
def test_the_node_declared_at_zero_is_the_one(name: str) -> None:
    nodes = {n: Node(i, init="zeros" if n == name else "auto") for n, i in (("B", "o r"), ("C", "r s"), ("A", "s i"))}
    inner = Network("o i", {"r": 2, "s": 2}, **nodes)
    for part, prefix in ((inner, ""), (Hadamard(inner, CP(2)), "h1_"), (Kronecker(Dense(), inner), "k2_")):
        [adapter] = fresh(Case(AdapterSpec(part), {"w": (12, 18)}))
        assert [n for n, t in node_tensors(adapter).items() if not t.any()] == [prefix + name]


def test_two_nodes_at_zero_in_different_parts_are_refused() -> None:
    part = Network("o i", {"r": 2}, B=Node("o r", init="zeros"), A="r i")
    with pytest.raises(SpecError, match="exactly one node may"):
        AdapterSpec(Hadamard(part, part)).lay_out({"w": (4, 4)})


def test_a_frozen_node_at_zero_is_refused_since_nothing_would_ever_train() -> None:
    with pytest.raises(SpecError):
        AdapterSpec(Network("o i", {"r": 2}, B=Node("o r", init="zeros", trainable=False), A="r i")).lay_out({"w": (4, 4)})


def test_the_zero_node_is_trainable_where_only_a_later_part_trains() -> None:
    frozen = Network("o i", {"r": 2}, B=Node("o r", trainable=False), A="r i")
    for part in (frozen, Kronecker(frozen, frozen), Hadamard(frozen, frozen)):
        case = Case(AdapterSpec(part), {"w": (12, 18)})
        assert_starts_at_zero(case)
        assert_learns(case)


def test_the_first_values_follow_the_generator_alone() -> None:
    spec = AdapterSpec(Kronecker(CP(2), CP(2)), PhysicalFold())
    [(group, graph)] = spec.lay_out({"w": (12, 18)})
    states = []
    for noise in (0, 5):
        torch.manual_seed(noise)
        adapter = make_adapter(spec, group, graph, generator=torch.Generator().manual_seed(9))
        states.append(node_tensors(adapter))
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_an_order_one_group_of_the_flat_fold_starts_at_zero() -> None:
    assert_starts_at_zero(Case(AdapterSpec(Dense(), FlatFold(1, groups=3)), SHAPES))
