"""Folds: every element of every weight is in exactly one place, and whole numbers stay whole."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import targets

from superlora_tn.declare.fold import FlatFold, PhysicalFold, equal_side, factorise, split_name
from superlora_tn.declare.maps import Fastfood
from superlora_tn.declare.parts import Dense, SpecError
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.make import make_adapter

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


def numbered(spec: AdapterSpec, shapes: dict[str, tuple[int, int]]) -> list[torch.Tensor]:
    """dW of each target where every stored number is its own place in the concatenated groups."""
    deltas = []
    for group, graph in spec.lay_out(shapes):
        adapter = make_adapter(spec, group, graph, dtype=torch.float64)
        count = getattr(group, "groups", 1)
        with torch.no_grad():
            [weight] = adapter.parameters()
            rows = weight.view(count, -1)
            for g in range(count):
                start = group.start(g) if hasattr(group, "start") else 0
                rows[g] = torch.arange(start, start + rows.shape[1], dtype=torch.float64)
        deltas += [adapter.delta(t).detach() for t in shapes if t in group.members]
    return deltas


@given(SHAPES, st.integers(1, 7), st.integers(1, 4))
def test_a_flat_fold_covers_each_element_once_in_order(pairs: list[tuple[int, int]], groups: int, order: int) -> None:
    shapes = {f"layer.{k}.q": pair for k, pair in enumerate(pairs)}
    total = sum(o * i for o, i in pairs)
    spec = AdapterSpec(Dense(), FlatFold(order, min(groups, total)))
    flat = torch.cat([d.reshape(-1) for d in numbered(spec, shapes)])
    assert torch.equal(flat, torch.arange(total, dtype=torch.float64))


@given(st.integers(1, 500), st.data())
def test_groups_are_runs_as_even_as_can_be(total: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, total))
    [group] = FlatFold(2, groups).lay_out({"w": (total, 1)})
    starts = [group.start(g) for g in range(groups + 1)]
    assert [b - a for a, b in itertools.pairwise(starts)] == oracle.run_lengths(total, groups)
    assert (starts[0], starts[-1]) == (0, total)
    assert group.length == math.ceil(total / groups)


@given(SHAPES, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1.0, 0.5, 0.3, 0.07, 0.01]))
def test_sides_are_the_smallest_that_hold_the_group(
    pairs: list[tuple[int, int]], order: int, splits: int, groups: int, ratio: float
) -> None:
    total = sum(o * i for o, i in pairs)
    groups = min(groups, total)
    [group] = FlatFold(order, groups, splits).lay_out({f"l.{k}.q": p for k, p in enumerate(pairs)}, ratio)
    # ratio * 100 is a whole number here, so this is exact where a float product is not.
    assert group.inner == -(-round(ratio * 100) * total // (100 * groups))
    assert [m.size for m in group.modes] == [oracle.side(group.inner, order * splits) ** splits] * order
    assert group.surplus == math.prod(m.size for m in group.modes) - group.inner >= 0


@given(SHAPES)
def test_groups_by_weight_give_each_weight_its_own(pairs: list[tuple[int, int]]) -> None:
    shapes = {f"l.{k}.q": pair for k, pair in enumerate(pairs)}
    groups = FlatFold(3, "weight").lay_out(shapes)
    assert [list(g.members.items()) for g in groups] == [[(n, (0, o, i))] for n, (o, i) in shapes.items()]


def test_stacked_is_as_wide_as_the_widest_weight() -> None:
    [group] = FlatFold(2, 2, stacked=True).lay_out({"a.0.q": (3, 4), "a.1.q": (5, 7)})
    assert [m.size for m in group.modes] == [7, math.ceil(24 / 7)]


@given(st.sampled_from(["member out in", "layer type out in", "out type in layer", "layer type head out in"]))
def test_a_physical_fold_covers_each_element_once(modes: str) -> None:
    shapes = targets(3, 2, (4, 5))
    spec = AdapterSpec(Dense(), PhysicalFold(modes, heads=2 if "head" in modes else None))
    flat = torch.cat([d.reshape(-1) for d in numbered(spec, shapes)])
    assert torch.equal(flat.sort().values, torch.arange(120, dtype=torch.float64))


MIXED = {"l.0.q": (4, 5), "l.0.v": (4, 5), "l.1.q": (4, 5), "l.1.v": (4, 5), "l.0.up": (7, 5), "l.1.up": (7, 5)}
GROUPINGS = {
    "out in": [[n] for n in MIXED],
    "member out in": [["l.0.q", "l.0.v", "l.1.q", "l.1.v"], ["l.0.up", "l.1.up"]],
    "layer out in": [["l.0.q", "l.1.q"], ["l.0.v", "l.1.v"], ["l.0.up", "l.1.up"]],
    "type out in": [["l.0.q", "l.0.v"], ["l.1.q", "l.1.v"], ["l.0.up"], ["l.1.up"]],
    "layer type out in": [["l.0.q", "l.0.v", "l.1.q", "l.1.v"], ["l.0.up", "l.1.up"]],
}


@pytest.mark.parametrize("modes", GROUPINGS)
def test_the_modes_say_which_weights_share_a_network(modes: str) -> None:
    groups = [list(g.members) for g in PhysicalFold(modes).lay_out(MIXED)]
    assert sorted(groups) == sorted(GROUPINGS[modes])


def test_a_hole_in_layers_times_types_is_refused() -> None:
    with pytest.raises(SpecError, match="every type in every layer"):
        PhysicalFold("layer type out in").lay_out({"l.0.q": (4, 4), "l.0.v": (4, 4), "l.1.q": (4, 4)})


def test_more_groups_than_elements_is_refused() -> None:
    with pytest.raises(SpecError, match="groups=7"):
        FlatFold(2, 7).lay_out({"w": (2, 3)})


def test_factorise_is_pefts_factorization() -> None:
    peft = pytest.importorskip("peft.tuners.lokr.layer", reason="PEFT, whose rule this is, is not installed")
    for size in range(1, 2001):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 64, 1000):
            assert factorise(size, 2, factor) == peft.factorization(size, factor), (size, factor)


@given(st.integers(1, 5000), st.sampled_from([-1, 1, 2, 3, 5, 8, 30]))
def test_factorise_in_two_is_the_nearest_pair_of_divisors(size: int, factor: int) -> None:
    assert factorise(size, 2, factor) == oracle.even_pair(size, factor)


@given(st.integers(1, 5000), st.integers(1, 5))
def test_factorise_splits_whole_and_ascending(size: int, count: int) -> None:
    factors = factorise(size, count)
    assert math.prod(factors) == size
    assert len(factors) == count
    assert list(factors) == sorted(factors)


@given(st.integers(1, 7), st.data())
def test_equal_side_is_exact(order: int, data: st.DataObject) -> None:
    """Next to perfect powers, where a float root is off by one."""
    root = data.draw(st.integers(1, int(2 ** (48 / order))))
    length = max(1, root**order + data.draw(st.integers(-1, 1)))
    side = equal_side(length, order)
    assert (side - 1) ** order < length <= side**order


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("encoder.layer.3.attention.q_proj", "encoder.layer.3", "attention.q_proj"),
        ("h.0.attn", "h.0", "attn"),
        ("blocks.2.experts.5.up", "blocks.2.experts.5", "up"),
        ("q_proj", "", "q_proj"),
        ("model.head", "", "model.head"),
        ("net.0", "", "net.0"),
        ("net.3.0", "net.3", "0"),
        ("layer12.q", "", "layer12.q"),
    ],
)
def test_a_name_splits_behind_its_last_layer_number(name: str, layer: str, kind: str) -> None:
    assert split_name(name) == (layer, kind) == oracle.layer_and_type(name)


@given(st.lists(st.sampled_from(["a", "0", "12", "layer", "q2"]), min_size=1, max_size=6))
def test_split_name_loses_nothing(words: list[str]) -> None:
    name = ".".join(words)
    layer, kind = split_name(name)
    assert ".".join(w for w in (layer, kind) if w) == name
    assert kind
    assert (layer, kind) == oracle.layer_and_type(name)


def test_a_ratio_is_counted_in_fractions_not_floats() -> None:
    """0.07 x 100 is 7.000000000000001 as floats."""
    [group] = FlatFold(1, 1).lay_out({"w": (10, 10)}, Fastfood(0.07).ratio)
    assert group.inner == 7
