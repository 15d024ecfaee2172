"""An adapter starts at dW = 0 exactly, by one zero node, and every trainable node learns from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import given
from strategies import SHAPES, Case, cases, node_tensors
from test_equals_dense import VARIANTS
from torch import nn

import superlora_tn as sl
from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.maps import Fastfood
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, Network, Node, SpecError
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import loha, lokr, lonkr, lora, lorta, lotr, vera
from superlora_tn.update.base import Adapter
from superlora_tn.update.initialise import first_values
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


# --- the first values hang on the seed alone ------------------------------------------------------------------------

INITS = ("auto", "uniform", "normal", "orthogonal", "square", "eye", "ones", "zeros")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta by default": lambda: default_device("meta"),
    "on meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
each_surrounding = pytest.mark.parametrize("surrounding", SURROUNDINGS)


def values(seed: int | None = 9) -> dict[str, torch.Tensor]:
    """First values of a node of each kind."""
    indices = dict(zip(INITS, ("o a", "a b", "b c", "c d", "d e", "e f", "f g", "g i"), strict=True))
    sizes = dict.fromkeys("abcdefg", 3)
    network = Network("o i", sizes, **{n: Node(i, init=n) for n, i in indices.items()})
    [(_, graph)] = AdapterSpec(network).lay_out({"w": (5, 7)})
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    found = dict(zip((n.name for n in graph.nodes), first_values(graph, 7, generator), strict=True))
    assert set(found) == set(INITS)
    return found


def test_a_square_node_starts_as_torchs_linear_layer_of_as_many_numbers() -> None:
    gate = Network("(a b) (c d)", G=Node("a b c d", init="square"), H=Node("a", init="zeros"))
    [(_, graph)] = AdapterSpec(gate).lay_out({"w": (36, 36)})
    found = first_values(graph, 7, torch.Generator().manual_seed(0))[0]
    layer = torch.nn.Linear(36, 36).weight
    # 1296 uniform numbers: their largest is within 1 % of the bound but for chance of e^-12, the deviation within 5 %.
    assert 0.99 / 6 < found.abs().max() <= 1 / 6
    assert found.std() == pytest.approx(layer.std().item(), rel=0.1)


@pytest.mark.parametrize("seed", [9, None])
@each_surrounding
def test_no_default_of_torchs_changes_the_first_values(surrounding: str, seed: int | None) -> None:
    torch.manual_seed(4)
    plain = values(seed)
    torch.manual_seed(4)
    with SURROUNDINGS[surrounding]():
        found = values(seed)
    for name, value in plain.items():
        assert (value.dtype, value.device.type) == (torch.float32, "cpu") == (found[name].dtype, found[name].device.type)
        assert torch.equal(value, found[name]), name
        assert not found[name].is_inference()


def test_first_values_of_a_seed_are_these_for_ever() -> None:
    """Torch's CPU generator in float32; written down once, as a change would change every adapter of a seed."""
    expected = {
        "auto": ["0x1.4cb1a6p-2", "-0x1.a6cd14p-2", "-0x1.577756p-5"],
        "uniform": ["-0x1.0046fep-5", "0x1.493f86p-5", "-0x1.473894p-2"],
        "normal": ["-0x1.028408p-1", "-0x1.04b72ap-2", "0x1.a73d0cp-7"],
    }
    found = values()
    for name, first in expected.items():
        wanted = torch.tensor([float.fromhex(v) for v in first])
        # Whole numbers make the uniform ones; the others take a logarithm and a cosine, whose last bit varies.
        torch.testing.assert_close(found[name].flatten()[:3], wanted, rtol=2.0**-22 if name == "normal" else 0, atol=0)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@each_surrounding
@pytest.mark.parametrize(
    "spec", [lora(2), vera(2), lotr(2), lorta(2, projection=Fastfood(0.5, 1))], ids=["lora", "vera", "lotr", "fastfood"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_an_adapter_of_a_seed_is_the_same_in_any_surroundings(surrounding: str, spec: AdapterSpec, dtype: torch.dtype) -> None:
    models = [
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.complex64 if dtype.is_complex else torch.float32) for _ in "ab"
    ]
    plain = sl.attach(models[0], spec, ["0", "1"], seed=3, dtype=dtype)
    with SURROUNDINGS[surrounding]():
        other = sl.attach(models[1], spec, ["0", "1"], seed=3, dtype=dtype)
    for one, two in zip((*plain.parameters(), *plain.buffers()), (*other.parameters(), *other.buffers()), strict=True):
        assert one.dtype is two.dtype
        assert one.device == two.device
        assert torch.equal(one, two)
    for p in other.parameters():
        nn.init.ones_(p)
    models[1](torch.ones(2, 8, dtype=models[1][0].weight.dtype)).abs().sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_an_order_one_group_of_the_flat_fold_starts_at_zero() -> None:
    assert_starts_at_zero(Case(AdapterSpec(Dense(), FlatFold(1, groups=3)), SHAPES))
