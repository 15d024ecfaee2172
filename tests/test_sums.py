"""Sums of parts, nested at will, and modes cropped from larger ones, against the dense oracle.

Tolerances are those of test_equals_dense and test_gradients, whose bounds count the terms of a sum too.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SHAPES, Bound, Case, flat_cases, node_tensors, physical_cases
from test_equals_dense import assert_delta, assert_forward
from test_gradients import assert_gradients
from test_zero_at_start import assert_learns

import superlora_tn as sl
from superlora_tn.declare.bounds import MAX_TERMS
from superlora_tn.network.sums import summed
from superlora_tn.update.make import make_adapter

physical, flat = physical_cases(summed=True), flat_cases(summed=True)
LINEAR = flat.filter(lambda c: not getattr(c.spec.projection, "tanh", False))


@given(physical, st.sampled_from(["apply", "delta", None]), st.sampled_from([(), (0,), (2, 3), (33,)]))
@settings(max_examples=60)
def test_dw_and_both_routes_are_the_oracles(case: Case, route: str | None, leading: tuple[int, ...]) -> None:
    for bound in case.bound(route=route):
        assert_delta(bound)
        assert_forward(bound, leading)


@given(flat, st.booleans())
@settings(max_examples=40)
def test_on_a_flat_fold_too(case: Case, recompute: bool) -> None:
    for bound in case.bound(recompute=recompute):
        assert_delta(bound)
        assert_forward(bound, (3,))


@given(physical | LINEAR)
@settings(max_examples=40)
def test_the_gradient_of_every_node_is_the_oracles(case: Case) -> None:
    for bound in case.bound():
        assert_gradients(bound)


@given(physical)
@settings(max_examples=40)
def test_dw_starts_at_zero_and_every_node_learns(case: Case) -> None:
    """Each term has one zero node, or is cancelled by its frozen copy; after a step no trained node lacks a gradient."""
    assert_learns(case)
    for group, graph in case.spec.lay_out(case.shapes):
        adapter = make_adapter(case.spec, group, graph, dtype=torch.float64)
        bound = Bound(case.spec, group, graph, case.shapes, adapter)
        for target in bound.targets:
            # Zero nodes give zeros; a part and its frozen copy cancel but for rounding where other terms lie between them.
            size = bound.error(target) if any(n.copies for n in graph.nodes) else 0.0
            assert (np.abs(adapter.delta(target).detach().numpy()) <= size).all()
        zeros = {name for name, tensor in node_tensors(adapter).items() if not tensor.any()}
        for own in (term.graph for term in graph.networks):
            assert sum(n.name in zeros for n in own.nodes) == (0 if _departs(graph, own) else 1)
        assert case.spec.count(case.shapes) >= adapter.num_parameters == sum(p.numel() for p in adapter.parameters())


def _departs(graph: object, own: object) -> bool:
    """Whether a term stands beside another one of which each node is its own or a copy."""
    copied = {n.copies for n in graph.nodes} - {None}  # type: ignore[attr-defined]
    return any(n.copies is not None or n.name in copied for n in own.nodes)  # type: ignore[attr-defined]


@given(physical | flat)
@settings(max_examples=40)
def test_a_declaration_survives_json(case: Case) -> None:
    back = sl.AdapterSpec.from_dict(json.loads(json.dumps(case.spec.to_dict(), allow_nan=False)))
    assert back == case.spec
    assert back.lay_out(case.shapes) == case.spec.lay_out(case.shapes)


# --- what every adapter does, on sums and crops ---------------------------------------------------------------------

NETWORKS = {
    "low rank and Kronecker": sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.Dense()), weights=(1, 0.5)),
    "sum in a product": sl.Kronecker(sl.Sum(sl.CP(1), sl.Dense()), sl.CP(2)),
    "departed": sl.Sum(sl.CP(3), sl.Frozen(sl.CP(3)), weights=(1, -1)),
    "cropped": sl.Network("(o1 o2) (i1 i2)", {"o1": 5, "i1": 3, "r": 2}, crop=True, a="o1 i1 r", b="r o2 i2"),
    "cropped in a sum": sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.CP(1), crop=True)),
    "mapped": sl.Sum(sl.CP(2), sl.Network("o i", S=sl.Node("o i", map=sl.Fourier(9)))),
}
each_network = pytest.mark.parametrize("part", NETWORKS.values(), ids=NETWORKS)


class Two(torch.nn.Module):
    """Two layers of 18 numbers to 12 and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(18, 12), torch.nn.Linear(12, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def tuned_two(spec: sl.AdapterSpec, **options: object) -> tuple[Two, sl.Tuned]:
    """A float64 model whose adapters have random values in what trains."""
    torch.manual_seed(0)
    model = Two().double()
    tuned = sl.attach(model, spec, ["first", "second"], seed=1, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, tuned


X = torch.randn(7, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@each_network
@pytest.mark.parametrize("join", [None, sl.Magnitude(), sl.Multiply("left")], ids=str)
def test_a_call_is_that_of_the_merged_model_and_survives_copies_files_and_strengths(
    part: object, join: object, tmp_path: object
) -> None:
    """Two layers of 18 and 12 numbers of size 1, so float64 sums of some 100 products: 1e-10 is far above their rounding."""
    spec = sl.AdapterSpec(part, alpha=2, join=join)  # type: ignore[arg-type]
    model, tuned = tuned_two(spec)
    y = model(X)
    assert torch.equal(copy.deepcopy(model)(X), y)
    tuned.save(tmp_path)  # type: ignore[arg-type]
    torch.manual_seed(0)
    again = Two().double()
    sl.load(again, tmp_path)  # type: ignore[arg-type]
    torch.testing.assert_close(again(X), y, rtol=1e-10, atol=1e-10)
    tuned.merge()
    torch.testing.assert_close(model(X), y, rtol=1e-10, atol=1e-10)
    tuned.unmerge()
    if join is None:
        whole = {name: tuned.delta(name) for name in tuned.targets}
        tuned.strength = 0.5
        for name, delta in whole.items():
            torch.testing.assert_close(tuned.delta(name), delta / 2, rtol=1e-12, atol=1e-12)


@each_network
def test_rows_and_columns_of_dw_are_looked_up(part: sl.Sum) -> None:
    """An embedding takes columns of a table's dW, against dW itself; exact but for the order of a few products."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(20, 12).double()
    tuned = sl.attach(torch.nn.Sequential(table), sl.AdapterSpec(part), ["0"], seed=1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    numbers = torch.tensor([[3, 0], [19, 3]])
    before = table(numbers)
    tuned.merge()
    torch.testing.assert_close(before, table(numbers), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("part", [sl.Sum(sl.CP(2), sl.CP(1)), NETWORKS["cropped"], NETWORKS["departed"]], ids=str)
def test_halves_of_terms_lie_side_by_side(part: sl.Sum) -> None:
    """A convolution asks for two thin matrices; their product is dW, and their bond the sum of the terms' bonds."""
    for bound in Case(sl.AdapterSpec(part), {"w": (14, 17)}).bound(route="apply"):
        halves = bound.adapter.members["w"].halves(rows=10)
        if part is NETWORKS["cropped"]:  # its first node is on out and in
            assert halves is None
            continue
        assert halves is not None
        outer, inner = halves
        assert outer.shape[1] == inner.shape[0] == {2: 3, 3: 6}[part.parts[0].rank]
        assert (np.abs((outer @ inner).detach().numpy() - bound.reference["w"]) <= bound.error("w")).all()


@pytest.mark.parametrize("fold", [sl.PhysicalFold(), sl.PhysicalFold("out in kernel")], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_a_sum_is_that_of_the_merged_weight(fold: sl.PhysicalFold, groups: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 10, 3, groups=groups).double()
    parts = sl.Sum(sl.Tucker(2, "out"), sl.Kronecker(sl.Dense(), sl.Dense()), weights=(1, -1))
    crop = sl.Kronecker(sl.Dense(), sl.Tucker(2, "out"), crop=True)
    for part in (parts, crop):
        tuned = sl.attach(torch.nn.Sequential(layer), sl.AdapterSpec(part, fold), ["0"], seed=1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter))
        x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
        before = layer(x)
        tuned.merge()
        torch.testing.assert_close(before, layer(x), rtol=1e-11, atol=1e-11)
        tuned.detach()


@pytest.mark.parametrize("part", [NETWORKS["low rank and Kronecker"], NETWORKS["cropped in a sum"]], ids=str)
def test_it_compiles_into_one_graph(part: sl.Sum) -> None:
    model, _ = tuned_two(sl.AdapterSpec(part))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), model(X), rtol=1e-12, atol=1e-12)


def test_members_share_a_sum_and_a_stack_of_experts_reads_it() -> None:
    """All members of a group at once, against each by itself."""
    spec = sl.AdapterSpec(sl.Sum(sl.CP(2), sl.Tucker(2)), sl.PhysicalFold("member out in"))
    for bound in Case(spec, SHAPES).bound():
        bound.adapter.stack_up()
        whole = bound.adapter.together(list(bound.adapter.members.values()))
        assert whole is not None
        for k, target in enumerate(bound.targets):
            assert (np.abs(whole[k].detach().numpy() - bound.reference[target]) <= bound.error(target)).all()


def test_a_frozen_copy_starts_at_what_it_copies_and_stays_there() -> None:
    model, tuned = tuned_two(sl.AdapterSpec(NETWORKS["departed"]))
    trained = {n.rpartition(".")[2]: p for n, p in tuned.named_parameters()}
    assert set(trained) == {"node_t1_factor_out", "node_t1_factor_in"}
    fresh = sl.attach(Two(), sl.AdapterSpec(NETWORKS["departed"]), ["first"], seed=1)
    state = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    values = {n.rpartition(".")[2]: v for n, v in state.items()}
    for side in ("out", "in"):
        assert torch.equal(values[f"node_t1_factor_{side}"], values[f"node_t2_factor_{side}"])
        assert bool(values[f"node_t1_factor_{side}"].any())
    model(X).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tuned.parameters())


def test_counts_are_of_what_trains_and_is_embedded() -> None:
    """By hand: CP(8) and LoKr-like; 50 outputs in 7 x 8, of which both sides are kept whole."""
    both = sl.AdapterSpec(sl.Sum(sl.CP(8), sl.Kronecker(sl.Dense(), sl.Dense())))
    assert both.count([(768, 768)]) == 8 * (768 + 768) + 24 * 24 + 32 * 32
    shared = sl.AdapterSpec(sl.Kronecker(sl.Sum(sl.CP(1), sl.Dense()), sl.Dense()))
    assert shared.count([(12, 12)]) == (3 + 3) + 3 * 3 + 4 * 4
    cropped = sl.Network("(o1 o2) i", {"o1": 7, "o2": 8}, crop=True, U="o1 i", V="o2 i")
    assert sl.AdapterSpec(cropped).count([(50, 30)]) == (7 + 8) * 30
    assert sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense(), crop=True)).count([(50, 30)]) == 7 * 5 + 8 * 6


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x @ weight.T + bias


@each_network
@pytest.mark.parametrize("route", ["apply", "delta"])
def test_a_step_of_a_whole_model_is_that_of_its_dense_updates(part: sl.Sum, route: str) -> None:
    """Gradients of x and of all parameters, against W + dW as plain products; sums of some 100 numbers of size 1 in float64."""
    model, tuned = tuned_two(sl.AdapterSpec(part), route=route)
    x = X.clone().requires_grad_()
    wanted = [x, *tuned.parameters()]
    found = torch.autograd.grad(model(x).square().sum(), wanted)
    layers = {name: (getattr(model, name).weight + tuned.delta(name), getattr(model, name).bias) for name in tuned.targets}
    expected = torch.autograd.grad(_plain(_plain(x, *layers["first"]).tanh(), *layers["second"]).square().sum(), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


COPIED = {
    "same": (
        sl.Network(
            "o i", {"r": 2, "s": 2, "t": 2}, B="o r", G="r s", H=sl.Node("s t", map=sl.Same("G"), trainable=False), A="t i"
        ),
        lambda b, g, a: b @ g @ g @ a,
    ),
    "spread": (
        sl.Network(
            "o i", {"r": 2}, B=sl.Node("o r", map=sl.Spread(1)), A=sl.Node("r i", map=sl.Spread(1, 1, "B"), trainable=False)
        ),
        lambda t: (t / 12**0.5).expand(6, 2) @ (t / 16**0.5).expand(2, 8),  # one number, drawn for all places of each node
    ),
    "softmax": (
        sl.Network("o i", {"r": 2}, B=sl.Node("o r", map=sl.Softmax()), A="r i"),
        lambda b, a: b.exp() / b.exp().sum(1, keepdim=True) @ a,
    ),
}


@pytest.mark.parametrize("name", COPIED)
def test_a_network_with_maps_may_depart_from_its_frozen_copy(name: str) -> None:
    """dW is the network less its first value, by the maps' definitions; it starts at zero and every number trains."""
    network, value = COPIED[name]
    layer = torch.nn.Sequential(torch.nn.Linear(8, 6, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64)
    before = layer(x)
    tuned = sl.attach(layer, sl.AdapterSpec(sl.Sum(network, sl.Frozen(network), weights=(1, -1))), "0", dtype=torch.float64)
    first = value(*(p.detach().clone() for p in tuned.parameters()))
    assert not tuned.delta("0").any()  # to the last bit
    layer(x).square().sum().backward()
    assert all(bool((p.grad != 0).all()) for p in tuned.parameters())
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p))
    dense = value(*tuned.parameters()) - first
    # A few dozen roundings of float64 on numbers of a few units.
    torch.testing.assert_close(tuned.delta("0"), dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), before + x @ dense.T, rtol=0, atol=1e-12)


# --- refusals -------------------------------------------------------------------------------------------------------

DIFFERENCE = sl.Sum(sl.CP(2), sl.Frozen(sl.CP(2)), weights=(1, -1))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: sl.Sum(), "no part"),
        (lambda: sl.Sum(sl.CP(2), weights=(1, 2)), r"weights=\(1, 2\) for 1 parts"),
        (lambda: sl.Sum(sl.CP(2), weights=(0.0,)), "leave the part out"),
        (lambda: sl.Sum(sl.CP(2), weights=("a",)), "weights"),
        (lambda: sl.Sum(sl.CP(2), sl.Frozen(sl.CP(3)), weights=(1, -1)), "opposite weight"),
        (lambda: sl.Sum(sl.CP(2), sl.Frozen(sl.CP(2))), "opposite weight"),
        (lambda: sl.Kronecker(sl.Frozen(sl.CP(2)), sl.CP(2)), "a part is one of"),
        (lambda: sl.Frozen(3), "Frozen was given 3"),
        (lambda: sl.AdapterSpec(sl.Frozen(sl.CP(2))), "give a part"),
        (lambda: sl.Kronecker(sl.CP(2), crop=1), "crop"),
        (lambda: sl.Network("o i", {"r": 2}, crop="o r", a="r i"), "crop"),
        (lambda: sl.Network("o i", {"r": "s"}, a="o r", b="r i"), "'r' is as large as 's'"),
        (lambda: sl.Network("o i", {"r": "s", "s": "r"}, a="o r", b="r s", c="s i"), "a bond whose size is a number"),
        (lambda: sl.Network("(o p) i", {"o": "i"}, a="o p i"), "'o' is as large as 'i'"),
        (lambda: sl.Network("o i", {"r": -1}, a="o r", b="r i"), "-1 for 'r', the least side"),
        (lambda: sl.Network("o i", {"o": -1}, a="o i"), "-1 for 'o', the least side"),
        (lambda: sl.Network("(o p) i", {"o": -1, "p": -1}, a="o p i"), "-1 for 'o', the least side"),
        (lambda: sl.Network("o i", {"r": -2}, a="o r", b="r i"), "rank"),
    ],
)
def test_what_is_no_sum_is_refused_when_it_is_declared(made: object, words: str) -> None:
    with pytest.raises(sl.SpecError, match=words):
        made()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (sl.Hadamard(DIFFERENCE, DIFFERENCE), "start at zero; exactly one may"),
        (sl.Hadamard(*[sl.Sum(*[sl.CP(1)] * 9)] * 2), f"at most {MAX_TERMS}"),
        (sl.Sum(sl.Dense(), sl.Base()), "no trainable node"),
        (sl.Kronecker(sl.Dense(), sl.Kronecker(sl.CP(1), sl.CP(1), crop=True)), "some of its digits"),
        (sl.Network("(o1 o2) i", {"o1": 30, "o2": 9}, crop=True, a="o1 i", b="o2 i"), "most of which would be cut"),
        (sl.Network("(o1 o2) i", {"o1": 7, "o2": 8}, a="o1 i", b="o2 i"), "crop=True"),
        (sl.Hadamard(sl.Kronecker(sl.CP(1), sl.CP(1), crop=True), sl.CP(1)), "from sizes that differ"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_words(part: sl.Sum, words: str) -> None:
    with pytest.raises(sl.SpecError, match=words):
        sl.AdapterSpec(part).count([(50, 30)])


@pytest.mark.parametrize("crop", [False, True])
def test_sizes_may_wait_for_the_weight(crop: bool) -> None:
    """The least side of a split where it is wanted, and bonds as large as a side: found for each weight."""
    sizes = {"o2": -1, "r": "o1", "s": 2, "t": "s"}
    part = sl.Network("(o1 o2) i", sizes, crop=crop, a="o1 o2 r s t", b="r s t i")
    spec = sl.AdapterSpec(part)
    assert sl.AdapterSpec.from_dict(spec.to_dict()) == spec
    splits = {12: (4, 3), 16: (4, 4), 30: (6, 5), 50: (8, 7) if crop else (10, 5)}
    for out, (o1, o2) in splits.items():
        [(_, graph)] = spec.lay_out({"w": (out, 6)})
        assert [n.shape for n in graph.nodes] == [(o1, o2, o1, 2, 2), (o1, 2, 2, 6)]
        assert spec.count([(out, 6)]) == 4 * o1 * (o1 * o2 + 6)


def test_a_split_of_an_older_file_is_what_it_was() -> None:
    """KRAdapter was declared without sizes at first: its sides ascend, where now the smaller one is the fastest."""
    old = sl.Network("(v u) i", crop=True, V="v i", U=sl.Node("u i", init="zeros"))
    spec = sl.AdapterSpec.from_dict(json.loads(json.dumps(sl.AdapterSpec(old).to_dict())))
    for now, sides in ((spec, (7, 8)), (sl.kradapter(), (8, 7))):
        [(_, graph)] = now.lay_out({"w": (50, 30)})
        assert [n.shape[0] for n in graph.nodes] == list(sides)


def test_networks_of_waiting_sizes_are_no_sum_of_one_form() -> None:
    bonds, least = {"r": "o"}, {"o1": -1, "r": 2}
    spec = sl.AdapterSpec(sl.Network("o i", bonds, a="o r", b="r i"))
    with pytest.raises(sl.SpecError, match="bonds as large as modes"):
        summed([spec, spec])
    with pytest.raises(sl.SpecError, match="cropped"):
        summed([sl.kradapter(), sl.kradapter()])
    split = sl.AdapterSpec(sl.Network("(o1 o2) i", least, a="o1 o2 r", b="r i"))
    assert summed([split, split]).network == sl.Network("(o1 o2) i", least | {"r": 4}, a="o1 o2 r", b="r i")


def test_a_flat_fold_crops_by_itself() -> None:
    spec = sl.AdapterSpec(sl.Kronecker(sl.CP(1), sl.CP(1), crop=True), sl.FlatFold(2, 1, splits=1))
    with pytest.raises(sl.SpecError, match="belongs to a physical fold"):
        spec.count([(50, 30)])
