"""Sums of parts: dW, gradients and first values against a dense float64 oracle, on both routes, anywhere in products."""

from __future__ import annotations

import copy
import json
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.cli import main
from superlora_tn.contraction.plan import choose
from superlora_tn.contraction.profile import CPU
from superlora_tn.contraction.summed import SumChoice, crop_price, padded_shape
from superlora_tn.tools.suggest import cost

OUT, IN = 12, 8
Part = Any


@st.composite
def parts(draw: st.DrawFn, depth: int = 2, sizes: tuple[int, int] = (OUT, IN)) -> Part:
    """Parts over a matrix in which sums and products stand at any level."""
    kinds = ["dense", "cp", "tucker", "network"] + (["sum", "sum", "kronecker", "hadamard"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "dense":
        return sl.Dense()
    if kind == "cp":
        return sl.CP(draw(st.integers(1, min(sizes))))
    if kind == "tucker":
        return sl.Tucker(draw(st.integers(1, min(sizes))))
    if kind == "network":
        return sl.Network("(a b) c", {"a": 2, "r": 2}, U="a r", V="r b c") if sizes[0] % 2 == 0 else sl.CP(1)
    if kind == "kronecker":
        first = draw(st.sampled_from([f for f in (1, 2) if not any(size % f for size in sizes)]))
        inner = [draw(parts(depth - 1, (first, first))), draw(parts(depth - 1, (sizes[0] // first, sizes[1] // first)))]
        return sl.Kronecker(*inner, factor=first)
    inner = draw(st.lists(parts(depth - 1, sizes), min_size=1, max_size=3))
    if kind == "hadamard":
        return sl.Hadamard(*inner)
    weights = draw(st.none() | st.lists(st.sampled_from([1.0, -1.0, 0.5, 2.0]), min_size=len(inner), max_size=len(inner)))
    return sl.Sum(*inner, weights=weights)


def dense(part: Part, nodes: dict[str, Tensor], sizes: tuple[int, int], prefix: str = "") -> Tensor:
    """The matrix by the textbook, differentiable, with sums as sums: nothing is multiplied out."""

    def own(name: str) -> Tensor:
        return nodes[f"node_{prefix}{name}"]

    if isinstance(part, sl.Dense):
        return own("weight").reshape(sizes)
    if isinstance(part, sl.CP):
        return own("factor_out") @ own("factor_in").T
    if isinstance(part, sl.Tucker):
        return own("factor_out") @ own("core") @ own("factor_in").T
    if isinstance(part, sl.Network):
        return torch.einsum("ar,rbc->abc", own("U"), own("V")).reshape(sizes)
    if isinstance(part, sl.Kronecker):
        f = part.factor
        each = zip(part.parts, [(f, f), (sizes[0] // f, sizes[1] // f)], strict=True)
        a, b = (dense(p, nodes, s, f"{prefix}k{k + 1}_") for k, (p, s) in enumerate(each))
        return torch.kron(a, b)
    mark = "t" if isinstance(part, sl.Sum) else "h"
    inner = [dense(p, nodes, sizes, f"{prefix}{mark}{k + 1}_") for k, p in enumerate(part.parts)]
    if isinstance(part, sl.Hadamard):
        return reduce(torch.mul, inner)
    return sum(w * one for w, one in zip(part.weights or [1.0] * len(inner), inner, strict=True))


def attached(spec: sl.AdapterSpec, route: str | None, fill: bool = True) -> tuple[nn.Sequential, sl.Tuned, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    weight = model[0].weight.detach().clone()
    tuned = sl.attach(model, spec, ["0"], dtype=torch.float64, seed=1, route=route)
    if fill:
        with torch.no_grad():
            for node in tuned.parameters():
                node.normal_()
    return model, tuned, weight


def nodes_of(tuned: sl.Tuned) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: p for name, p in tuned.named_parameters()}


@given(parts(), st.sampled_from(["apply", "delta", None]), st.sampled_from([None, 3.0]))
def test_values_and_gradients_are_those_of_the_dense_sum(part: Part, route: str | None, alpha: float | None) -> None:
    spec = sl.AdapterSpec(part, alpha=alpha)
    assert sl.AdapterSpec.from_dict(spec.to_dict()) == spec
    model, tuned, weight = attached(spec, route)
    nodes = nodes_of(tuned)
    assert spec.count([(OUT, IN)]) == sum(p.numel() for p in nodes.values())
    delta = spec.scale * dense(part, nodes, (OUT, IN))
    x = torch.randn(5, IN, dtype=torch.float64)
    wanted = x @ (weight + delta).T + model[0].bias
    # float64 sums of some hundred products of numbers near 1, in another order.
    close = {"rtol": 1e-9, "atol": 1e-9 * max(1.0, float(delta.detach().abs().max()))}
    torch.testing.assert_close(tuned.delta("0"), delta, **close)
    found = model(x)
    torch.testing.assert_close(found, wanted, **close)
    cotangent = torch.randn_like(wanted)
    own = torch.autograd.grad((found * cotangent).sum(), list(nodes.values()))
    oracle = torch.autograd.grad((wanted * cotangent).sum(), list(nodes.values()))
    for a, b in zip(own, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(1.0, float(b.abs().max())))


@given(parts())
def test_a_sum_starts_at_zero_and_every_term_trains(part: Part) -> None:
    try:
        model, tuned, _ = attached(sl.AdapterSpec(part), None, fill=False)
    except sl.SpecError as error:
        assert "of one term start at zero" in str(error)
        return
    assert not tuned.delta("0").any()
    x = torch.randn(7, IN, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    graph = next(iter(tuned._adapters())).graph
    moved = {name for name, p in nodes_of(tuned).items() if p.grad is not None and bool(p.grad.any())}
    for term in graph.networks:
        zero = [n.name for n in term.graph.nodes if n.init == "zeros"]
        assert len(zero) == 1
        assert f"node_{zero[0]}" in moved


def test_each_term_has_a_split_of_its_own() -> None:
    part = sl.Sum(sl.Kronecker(sl.Dense(), sl.Dense(), factor=2), sl.Network("(a b) c", {"a": 3}, W="a b c"))
    with pytest.raises(sl.SpecError, match="two ways that do not fit together"):
        sl.AdapterSpec(sl.Hadamard(*part.parts)).count([(6, 4)])
    assert sl.AdapterSpec(part).count([(6, 4)]) == 4 + 6 + 24


MIXED = sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.Dense()), weights=(1, -0.5))


def test_several_weights_share_a_sum_by_member() -> None:
    spec = sl.AdapterSpec(sl.Sum(sl.Tucker(2, factors="out in"), sl.CP(1)), sl.PhysicalFold("member out in"))
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(IN, OUT).double() for _ in range(3)])
    tuned = sl.attach(model, spec, ["0", "1", "2"], dtype=torch.float64, seed=1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    n = nodes_of(tuned)
    for m in range(3):
        first = n["node_t1_factor_out"] @ n["node_t1_core"][m] @ n["node_t1_factor_in"].T
        second = (n["node_t2_factor_out"] * n["node_t2_factor_member"][m]) @ n["node_t2_factor_in"].T
        torch.testing.assert_close(tuned.delta(f"{m}"), first + second, rtol=1e-12, atol=1e-12)


def test_it_saves_merges_copies_and_switches(tmp_path: Any) -> None:
    model, tuned, weight = attached(sl.AdapterSpec(MIXED, alpha=4.0, dropout=0.5), None)
    model.eval()
    x = torch.randn(5, IN, dtype=torch.float64)
    before, delta = model(x), tuned.delta("0").detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    tuned.save(tmp_path)
    other = nn.Sequential(nn.Linear(IN, OUT)).double()
    other[0].load_state_dict({"weight": weight, "bias": model[0].bias})
    sl.load(other, tmp_path)
    assert torch.equal(other.eval()(x), before)
    tuned.strength = 0.5
    torch.testing.assert_close(tuned.delta("0"), delta / 2)
    torch.testing.assert_close(model(x), x @ (weight + delta / 2).T + model[0].bias)
    tuned.strength = 1.0
    tuned.merge()
    torch.testing.assert_close(model[0].weight, weight + delta)
    tuned.unmerge()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), before)
    model.train()
    assert not torch.equal(model(x), model(x))  # dropout, once for all terms
    assert len(list(tuned.parameters())) == len(set(tuned.parameters())) == 4
    assert "sum of 2 networks" not in str(tuned)
    tuned.detach()
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("spec", [sl.AdapterSpec(MIXED), sl.quan_ta(3), sl.miss(3), sl.gralora(4, 2, hybrid=2)], ids=str)
def test_a_handle_plans_each_network_as_the_command_does(spec: sl.AdapterSpec, tmp_path: Any, capsys: Any) -> None:
    """Also of a cropped network, whose price has the padding in it."""
    tuned = sl.attach(nn.Sequential(nn.Linear(8, 8)), spec, ["0"])
    found = tuned.plan("0", 5)
    assert isinstance(found, SumChoice)
    terms = spec.lay_out({"0": (8, 8)})[0][1].networks
    own = [choose(t.graph, padded_shape(t) if t.crops else (8, 8), 5) for t in terms]
    assert [(c.apply, c.delta) for _, c in found.each] == [(c.apply, c.delta) for c in own]
    crops = [crop_price(t, (8, 8), 5) for t in terms]
    assert found.price == pytest.approx(sum(c.price for c in own) + sum(crops))
    assert found.tokens == 5
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    assert main(["plan", "--spec", str(tmp_path / "spec.json"), "--shape", "8x8", "--tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert printed.count("refused ") == len(terms)
    assert ("crop  " in printed) == any(crops)


@pytest.mark.parametrize("join", [sl.Magnitude(), sl.Multiply("left")])
def test_it_joins_the_weight_in_other_ways(join: Any) -> None:
    sizes = (OUT, OUT) if isinstance(join, sl.Multiply) else (OUT, IN)
    model, tuned, weight = attached(sl.AdapterSpec(MIXED, join=join), None)
    network = dense(sl.CP(2), nodes_of(tuned), sizes, "t1_")
    a, b = (nodes_of(tuned)[f"node_t2_k{k}_weight"] for k in (1, 2))
    network = network - 0.5 * torch.kron(a, b)
    x = torch.randn(5, IN, dtype=torch.float64)
    if isinstance(join, sl.Multiply):
        wanted = weight + network @ weight
    else:
        whole = weight + network
        wanted = whole / whole.norm(dim=1, keepdim=True) * nodes_of(tuned)["magnitude"][:, None]
    torch.testing.assert_close(model(x), x @ wanted.T + model[0].bias, rtol=1e-10, atol=1e-10)


def test_other_formats_hold_dw_of_a_sum(tmp_path: Any) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model, tuned, _ = attached(sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(1), weights=(1, -2))), None)
    x = torch.randn(5, IN, dtype=torch.float64)
    y = model(x)
    tuned.save(tmp_path / "peft", format="peft")
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(IN, OUT)).double()
    sl.load(other, tmp_path / "peft", dtype=torch.float64)
    # Through an SVD, kept in float32 at the least.
    torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)


def test_a_convolution_and_an_embedding_take_a_sum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    tuned = sl.attach(model, sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(1))), ["0"], dtype=torch.float64, seed=1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    whole = model[0].weight + tuned.delta("0").reshape(6, 4, 3, 3)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, whole, model[0].bias, padding=1), rtol=1e-9, atol=1e-9)
    table = nn.Sequential(nn.Embedding(10, 6)).double()
    tuned = sl.attach(table, sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(1))), ["0"], dtype=torch.float64, seed=1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    numbers = torch.tensor([[1, 3, 1], [9, 0, 2]])
    whole = table[0].weight + tuned.delta("0").T
    torch.testing.assert_close(table(numbers), nn.functional.embedding(numbers, whole))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sl.Sum(), "Sum was given no part"),
        (lambda: sl.Sum(sl.CP(1), weights=(1, 2)), "for 1 parts; give one number each"),
        (lambda: sl.Sum(sl.CP(1), weights=(0,)), "leave the part out"),
        (lambda: sl.Sum(sl.CP(1), weights=(float("nan"),)), "finite number"),
        (
            lambda: sl.AdapterSpec(reduce(sl.Hadamard, [sl.Sum(*[sl.Dense()] * 3)] * 4)).count([(4, 4)]),
            "multiply out to 81 terms or more",
        ),
    ],
)
def test_what_is_no_sum_is_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises(sl.SpecError, match=words):
        make()


def test_products_of_sums_are_multiplied_out() -> None:
    first, second = sl.Sum(sl.CP(1), sl.Dense()), sl.Sum(sl.Dense(), sl.CP(2), weights=(2, -1))
    graph = sl.AdapterSpec(sl.Hadamard(first, second)).lay_out({"a": (OUT, IN)})[0][1]
    assert [term.weight for term in graph.terms] == [2, -1, 2, -1]
    names = [{n.name.partition("_t")[0] + n.name.partition("_t")[2][:1] for n in term.graph.nodes} for term in graph.terms]
    assert names == [{f"h1{a}", f"h2{b}"} for a, b in product("12", "12")]
    assert np.prod([len(p.parts) for p in (first, second)]) == len(graph.terms)


def test_thin_terms_run_as_one_and_others_by_themselves() -> None:
    """Two LoRAs and a Kronecker product: values and gradients with all kinds of x."""
    part = sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.Dense(), factor=2), sl.CP(1), weights=(1, 1, -3))
    model, tuned, weight = attached(sl.AdapterSpec(part, alpha=4.0), "apply")
    adapter = next(iter(tuned._adapters()))
    assert [own.graph.nodes[0].name for own in adapter._thin] == ["t1_factor_out", "t3_factor_out"]
    delta = adapter.scale * dense(part, nodes_of(tuned), (OUT, IN))
    for x in (torch.randn(IN), torch.randn(2, 3, IN), torch.randn(0, IN)):
        x = x.double().requires_grad_()
        wanted, found = x @ (weight + delta).T + model[0].bias, model(x)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        own, oracle = (torch.autograd.grad(y.sum(), [x, *tuned.parameters()], retain_graph=True) for y in (found, wanted))
        for a, b in zip(own, oracle, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_terms_choose_their_zero_around_the_declared_ones() -> None:
    """One term says where it starts; the next may not take the factor that both share, though a product would."""
    said = sl.Network("o i", W=sl.Node("o i", init="zeros"))
    for part in (sl.Hadamard(sl.Sum(said, sl.CP(2)), sl.CP(1)), sl.Hadamard(sl.Sum(sl.CP(2), said), sl.CP(1))):
        model, tuned, _ = attached(sl.AdapterSpec(part), None, fill=False)
        assert not tuned.delta("0").any()
        zero = [name for name, p in nodes_of(tuned).items() if not p.any()]
        assert len(zero) == 2
        assert not any(name.startswith("node_h2") for name in zero)
        model(torch.randn(7, IN, dtype=torch.float64)).pow(2).sum().backward()
        assert all(nodes_of(tuned)[name].grad.any() for name in zero)
    with pytest.raises(sl.SpecError, match="h1_t1_W and h2_W start at zero"):
        sl.AdapterSpec(sl.Hadamard(sl.Sum(said, sl.CP(2)), said)).count([(OUT, IN)])


def test_what_is_cropped_says_so_and_costs_its_padding() -> None:
    cropped = sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense(), crop=True))
    _, graph = cropped.lay_out({"a": (50, 30)})[0]
    assert graph.equation() == "out1 in1, out2 in2 -> out1 out2 in1 in2 (out 50 of 56)"
    term, device = graph.terms[0], CPU
    assert padded_shape(term) == (56, 30)
    # Forward and backward: outputs are read, cut and added to others, 50 + 50 + 56 numbers a row; x stays as it is.
    assert crop_price(term, (50, 30), 100, device) == pytest.approx(2 * (400 * 156 / device.bandwidth + device.latency))
    whole = sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense(), factor=-1)).lay_out({"a": (56, 30)})[0][1]
    assert crop_price(whole.networks[0], (56, 30), 100, device) == 0
    prices = [
        cost(spec, {"a": shape}, 100).seconds
        for spec, shape in ((cropped, (50, 30)), (sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense())), (56, 30)))
    ]
    assert prices[0] == pytest.approx(prices[1] + crop_price(term, (50, 30), 100, device))
    both = sl.AdapterSpec(sl.Sum(sl.CP(1), sl.Kronecker(sl.Dense(), sl.Dense(), crop=True), weights=(1, -2)))
    words = both.lay_out({"a": (50, 31)})[0][1].equation()
    assert words.endswith("- 2 x out1 in1, out2 in2 -> out1 out2 in1 in2 (out 50 of 56, in 31 of 35)")


def test_a_strength_reaches_all_terms_once() -> None:
    """It is set where it is set, and a call that is not told of it again has it."""
    part = sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.Dense(), factor=2), weights=(1, -3))
    model, tuned, weight = attached(sl.AdapterSpec(part, alpha=4.0), "apply")
    delta = 2.0 * dense(part, nodes_of(tuned), (OUT, IN))  # alpha / rank
    x = torch.randn(3, IN, dtype=torch.float64)
    for strength in (1.0, -0.5, 0.0, 2.0):
        tuned.strength = strength
        for own in (model, copy.deepcopy(model)):
            wanted = x @ (weight + strength * delta).T + model[0].bias
            torch.testing.assert_close(own(x), wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(tuned.delta("0"), strength * delta, rtol=1e-10, atol=1e-10)
