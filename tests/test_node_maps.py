"""Nodes that are functions of what is stored: maps against NumPy and PEFT's layers, and a model's life."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from models import TARGETS, Tiny, noise, perturb, seeded
from optional import library
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import superlora_tn as sl
from superlora_tn.update import node_maps
from superlora_tn.update.node_maps import table, value

PLACES = [71, 15, 81, 77, 51, 57]  # of 96, from torch 2.11's permutation of seed 777
SHAPE = (2, 6, 6)  # a batch of two matrices
MAPS = (
    sl.Selected(7, seed=3),
    sl.Fourier(7, seed=3),
    sl.Circulant(3),
    sl.Cayley(),
    sl.Exponential(),
    sl.Householder(3),
    sl.Householder(4, less_one=True),
    sl.Softmax(),
    sl.Normalised(),
)
each_map = pytest.mark.parametrize("made", MAPS, ids=str)


def places(made: sl.Selected | sl.Fourier, rows: int, columns: int) -> list[tuple[int, int]]:
    """As PEFT draws them."""
    flat = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(made.seed))[: made.count]
    return [(int(p) // columns, int(p) % columns) for p in flat]


def skew(stored: np.ndarray, n: int) -> np.ndarray:
    found = np.zeros((n, n))
    for number, (i, j) in zip(stored, itertools.combinations(range(n), 2), strict=True):
        found[i, j], found[j, i] = number, -number
    return found


def formula(made: object, stored: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """One matrix, from the definition: loops, sums of waves, inverses and eigenvalues."""
    result, one = np.zeros((rows, columns)), np.eye(rows)
    if isinstance(made, sl.Selected):
        for number, place in zip(stored, places(made, rows, columns), strict=True):
            result[place] = number
    elif isinstance(made, sl.Fourier):
        p, q = np.ogrid[:rows, :columns]
        for number, (k, m) in zip(stored, places(made, rows, columns), strict=True):
            result += number * np.cos(2 * np.pi * (k * p / rows + m * q / columns)) / (rows * columns)
    elif isinstance(made, sl.Circulant):
        for p, q in np.ndindex(rows, columns):
            result[p, q] = stored[p // made.size, q // made.size, (q - p) % made.size] / columns
    elif isinstance(made, sl.Cayley):
        result = (one - skew(stored, rows)) @ np.linalg.inv(one + skew(stored, rows))
    elif isinstance(made, sl.Exponential):
        values, vectors = np.linalg.eigh(1j * skew(stored, rows))
        result = ((vectors * np.exp(-1j * values)) @ vectors.conj().T).real
    elif isinstance(made, sl.Householder):
        result = one
        for u in stored.T:
            result = result @ (one - 2 * np.outer(u, u) / (u @ u))
        result = result - one if made.less_one else result
    elif isinstance(made, sl.Softmax):
        result = np.exp(stored) / np.exp(stored).sum(-1, keepdims=True)
    else:
        result = stored / np.sqrt((stored**2).sum(-1, keepdims=True))
    return result


@each_map
def test_a_map_is_its_formula_and_its_gradient_is_right(made: sl.Node) -> None:
    torch.manual_seed(0)
    stored = torch.randn(made.stored(SHAPE), dtype=torch.float64, requires_grad=True)
    fixed = table(made, SHAPE)
    found = value(made, stored, SHAPE, fixed)
    wanted = np.stack([formula(made, one, *SHAPE[1:]) for one in stored.detach().numpy()])
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=0, atol=1e-13)  # sums of 36 terms of order 1 at 1e-16
    assert torch.autograd.gradcheck(lambda s: value(made, s, SHAPE, fixed), stored)


@pytest.mark.parametrize("route", ["apply", "delta"])
@pytest.mark.parametrize(
    ("made", "rows", "columns"),
    [(sl.Circulant(8), 16, 24), (sl.Circulant(9), 9, 27), (sl.Householder(4, less_one=True), 10, 10)],
    ids=str,
)
def test_x_meets_the_node_on_both_routes(made: sl.Node, rows: int, columns: int, route: str) -> None:
    """By waves of even and odd length, and by thin matrices, of a batch with a bond."""
    spec = sl.AdapterSpec(
        sl.Network("o i", {"b": 2}, w=sl.Node("b o i", map=made), g=sl.Node("b", init="ones", trainable=False))
    )
    model = nn.ModuleDict({"layer": nn.Linear(columns, rows).double()})
    tuned = sl.attach(model, spec, ["layer"], route=route).to(torch.float64)
    (stored,) = tuned.parameters()
    with torch.no_grad():
        stored.normal_()
    wanted = sum(formula(made, one, rows, columns) for one in stored.detach().numpy())
    x = torch.randn(3, columns, dtype=torch.float64, requires_grad=True)
    found = model["layer"](x) - nn.functional.linear(x, model["layer"].weight, model["layer"].bias)
    # sums of 27 numbers of order 1 at 1e-16
    np.testing.assert_allclose(found.detach().numpy(), x.detach().numpy() @ wanted.T, rtol=0, atol=1e-13)
    both = torch.autograd.grad(model["layer"](x).sin().sum(), (x, stored), retain_graph=True)
    dense = [value(made, one, (rows, columns), table(made, (rows, columns))) for one in stored]
    y = nn.functional.linear(x, model["layer"].weight + sum(dense), model["layer"].bias)
    for one, other in zip(both, torch.autograd.grad(y.sin().sum(), (x, stored)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_block_rotations_go_block_by_block() -> None:
    plan = sl.make_plan(sl.oft(4).lay_out({"layer": (12, 16)})[0][1], "apply", 32)
    assert plan.names == ("x", "R")
    assert plan.flops == 2 * 32 * 16 * 4
    plan = sl.make_plan(sl.hra(2).lay_out({"layer": (12, 16)})[0][1], "apply", 32)
    assert plan.flops == 2 * 2 * 32 * 16 * 2  # two products with two columns


@pytest.mark.parametrize("route", ["apply", "delta"])
@pytest.mark.parametrize("gated", [False, True], ids=["twice", "gated"])
def test_an_identity_beside_another_node_over_both_its_indices(gated: bool, route: Literal["apply", "delta"]) -> None:
    same, rows, columns, blocks = sl.Node("b c", trainable=False, map=sl.Identity()), 6, 9, 3
    beside = sl.Node("b c") if gated else same
    network = sl.Network("(b o) (c i)", {"b": blocks, "c": blocks}, same=same, beside=beside, R="b o i")
    model = nn.Sequential(nn.Linear(columns, rows)).double()
    base = model[0].weight.detach().numpy()
    tuned = sl.attach(model, sl.AdapterSpec(network), ["0"], dtype=torch.float64, route=route)
    perturb(tuned)
    own = {n.rpartition("node_")[2]: p.detach().numpy() for n, p in tuned.named_parameters()}
    gates = own["beside"] if gated else np.eye(blocks)
    delta = np.zeros((rows, columns))
    for k, block in enumerate(own["R"]):
        delta[k * 2 : k * 2 + 2, k * 3 : k * 3 + 3] = gates[k, k] * block
    x = noise(5, columns, dtype=torch.float64)
    np.testing.assert_allclose(tuned.delta("0").detach().numpy(), delta, rtol=1e-12, atol=1e-12)
    expected = x.numpy() @ (base + delta).T + model[0].bias.detach().numpy()
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", ["output", "weight"])
def test_what_is_stored_is_mapped_once_a_pass(monkeypatch: pytest.MonkeyPatch, at: Literal["output", "weight"]) -> None:
    """Whatever number of layers and calls a pass has, and in both of them the gradients of all come together."""
    calls, plain = [], node_maps.value
    monkeypatch.setattr(node_maps, "value", lambda *arguments: calls.append(1) or plain(*arguments))
    spec = sl.AdapterSpec(sl.Network("o i", w=sl.Node("o i", map=sl.Fourier(9))), alpha=9.0)
    model = nn.ModuleList([seeded(0, lambda: nn.Linear(8, 8))])
    model.forward = lambda x: model[0](model[0](model[0](x)))
    own = model[0].weight.detach()
    tuned = sl.attach(model, spec, ["0"], at=at)
    (stored,) = tuned.parameters()
    with torch.no_grad():
        stored.normal_()
    x = torch.randn(3, 8)
    model(x).square().sum().backward()
    assert len(calls) == 1
    found, stored.grad = stored.grad, None
    merged = stored.detach().double().requires_grad_()
    weight = own.double() + 9 * plain(spec.network.nodes[0][1].map, merged, (8, 8), table(sl.Fourier(9), (8, 8)))
    y = x.double()
    for _ in range(3):
        y = nn.functional.linear(y, weight, model[0].bias.double())
    y.square().sum().backward()
    torch.testing.assert_close(found.double(), merged.grad, rtol=1e-4, atol=1e-5)  # float32 through three layers


def test_circulant_blocks_and_waves_of_a_matrix_that_is_not_square() -> None:
    for made in (sl.Circulant(2), sl.Fourier(9, seed=1), sl.Selected(9, seed=1)):
        stored = torch.randn(made.stored((4, 6)), dtype=torch.float64)
        found = value(made, stored, (4, 6), table(made, (4, 6)))
        np.testing.assert_allclose(found.numpy(), formula(made, stored.numpy(), 4, 6), rtol=0, atol=1e-13)


def peft_layer(config: object, out: int, inward: int) -> tuple[nn.Module, nn.Module]:
    base = seeded(0, lambda: nn.Sequential(nn.Linear(inward, out)))
    peft = library("peft")
    return seeded(0, lambda: nn.Sequential(nn.Linear(inward, out))), peft.get_peft_model(base, config)


def compare(spec: sl.AdapterSpec, name: str, config: object) -> None:
    """Equal values, gradients and counts of our network and PEFT's layer, at the same stored numbers."""
    ours, theirs = peft_layer(config, 12, 8)
    tuned = sl.attach(ours, spec, targets=["0"])
    (own,) = tuned.parameters()
    (other,) = (p for n, p in theirs.named_parameters() if p.requires_grad and name in n)
    assert own.numel() == other.numel() == spec.count([(12, 8)])
    torch.manual_seed(1)
    with torch.no_grad():
        own.copy_(torch.randn(own.shape) / 10)
        other.copy_(own.reshape(other.shape))
    x = torch.randn(5, 8)
    found = [model(x) for model in (ours, theirs)]
    for y in found:
        y.square().sum().backward()
    # float32 through transforms or a solver of at most 96 numbers
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.reshape(-1), other.grad.reshape(-1), rtol=1e-4, atol=1e-5)


def test_fourier_is_pefts_fourierft() -> None:
    peft = library("peft")
    config = peft.FourierFTConfig(n_frequency=20, scaling=150.0, random_loc_seed=777, target_modules=["0"])
    compare(sl.fourier_ft(20), "fourierft_spectrum", config)


def test_circulant_is_pefts_c3a() -> None:
    compare(sl.c3a(4), "c3a_kernel", library("peft").C3AConfig(block_size=4, target_modules=["0"]))


def test_cayley_blocks_are_pefts_oft() -> None:
    """PEFT multiplies x by R, so W by its transpose: the node is read with its axes the other way round."""
    config = library("peft").OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=False, target_modules=["0"])
    compare(sl.oft(4), "oft_R", config)


def test_reflections_are_pefts_hra() -> None:
    compare(sl.hra(4), "hra_u", library("peft").HRAConfig(r=4, target_modules=["0"]))


def test_a_rotation_needs_two_inputs() -> None:
    with pytest.raises(sl.SpecError, match="oft was given size=1, and one input alone has no rotation"):
        sl.oft(1)


@pytest.mark.parametrize("spec", [sl.fourier_ft(9), sl.shira(9), sl.c3a(4), sl.oft(4), sl.hra(4)])
def test_the_base_is_as_it_was_at_the_start_and_everything_trains(spec: sl.AdapterSpec) -> None:
    model, base = (seeded(0, lambda: nn.Sequential(nn.Linear(8, 12))) for _ in range(2))
    tuned = sl.attach(model, spec, targets=["0"], seed=0)
    x = seeded(1, lambda: torch.randn(5, 8))
    # The two reflections of a pair, each of unit vectors in float32, cancel to some 1e-7.
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    model(x).pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())


# Networks of no paper: a shared spectrum over layers; a rotation between thin factors; a bank mixed by weights.
NEW = {
    "waves": sl.AdapterSpec(
        sl.Network("m o i", {"r": 2}, s=sl.Node("r o i", map=sl.Fourier(30)), g="m r"),
        sl.PhysicalFold("member out in"),
        alpha=99,
    ),
    "turned": sl.AdapterSpec(sl.Network("o i", {"r": 3, "s": 3}, b="o r", t=sl.Node("r s", map=sl.Cayley()), a="s i")),
    "bank": sl.AdapterSpec(
        sl.Network("o i", {"k": 4, "r": 2}, v="k o", c=sl.Node("r k", map=sl.Softmax()), a=sl.Node("r i", map=sl.Normalised()))
    ),
}
each_new = pytest.mark.parametrize("spec", NEW.values(), ids=NEW)


def trained(model: nn.Module, spec: sl.AdapterSpec, x: Tensor) -> sl.Tuned:
    """Attached with seed 0 and trained for three steps, in which every stored tensor moves."""
    tuned = sl.attach(model, spec, targets=TARGETS, seed=0)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in tuned.named_parameters())
    return tuned


@each_new
def test_a_network_of_no_paper_lives_as_any_other(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    x = seeded(1, lambda: torch.randn(4, 5, 12))
    model, base = seeded(0, Tiny), seeded(0, Tiny)
    start = base(x)
    tuned = sl.attach(model, spec, targets=TARGETS, seed=0)
    torch.testing.assert_close(model(x), start, rtol=0, atol=0)
    assert tuned.num_parameters == sum(p.numel() for p in tuned.parameters())
    tuned.detach()
    tuned = trained(model, spec, x)
    y = model(x)
    assert not torch.allclose(y, start, atol=1e-4)
    tuned.merge()
    # dW through x and in W round apart, over rows of at most 64 numbers in float32
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    tuned.save(tmp_path / "adapter")
    again = seeded(0, Tiny)
    sl.load(again, tmp_path / "adapter")
    assert torch.equal(again(x), model(x))
    assert sl.AdapterSpec.from_dict(spec.to_dict()) == spec
    other = seeded(0, Tiny)
    sl.attach(other, spec, targets=TARGETS, seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    tuned.detach()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


@each_new
def test_the_peft_plug_in_carries_it(spec: sl.AdapterSpec) -> None:
    peft = library("peft")
    plugin = pytest.importorskip("superlora_tn.peft")
    model, x = seeded(0, Tiny).eval(), torch.randn(2, 5, 12)
    start = model(x).detach()
    model = peft.get_peft_model(model, plugin.SuperLoraConfig(spec=spec, target_modules=TARGETS))
    torch.testing.assert_close(model(x), start, rtol=0, atol=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) / 2)
    y = model(x)
    assert not torch.allclose(y, start, atol=1e-4)
    # as above: dW in W and through x round apart
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


@each_new
def test_a_compiled_or_recorded_call_is_the_same(spec: sl.AdapterSpec) -> None:
    model, x = seeded(0, Tiny).eval(), torch.randn(2, 5, 12)
    trained(model, spec, x)
    recorded = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(recorded(x), model(x), rtol=1e-5, atol=1e-5)  # float32, in another order


def test_places_stay_as_adapters_were_saved_with() -> None:
    """They are torch's; a release that draws others would move what files mean."""
    assert table(sl.Fourier(6, seed=777), (12, 8)).tolist() == PLACES


def test_verify_takes_a_network_of_maps() -> None:
    pytest.importorskip("hypothesis")
    certificate = sl.verify(NEW["bank"], examples=3, shapes=[(12, 8)])
    assert certificate, str(certificate)


@each_new
def test_halves_and_the_meta_device(spec: sl.AdapterSpec) -> None:
    model = seeded(0, lambda: Tiny().to(torch.bfloat16))
    sl.attach(model, spec, targets=TARGETS)
    model(torch.randn(2, 5, 12, dtype=torch.bfloat16)).sum().backward()
    with torch.device("meta"):
        shell = Tiny()
    tuned = sl.attach(shell, spec, targets=TARGETS)
    assert all(p.is_meta for p in tuned.parameters())


def test_tensors_that_only_stand_for_others_leave_nothing() -> None:
    """A model that is called with fake tensors of another device, to plan its memory, computes as before."""
    model, x = seeded(0, Tiny), torch.randn(2, 5, 12)
    sl.attach(model, sl.fourier_ft(9), targets=TARGETS)
    expected = model(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {n: torch.empty(p.shape, device="cuda") for n, p in model.named_parameters()}
        found = torch.func.functional_call(model, fakes, (torch.empty(2, 5, 12, device="cuda"),))
    assert found.device.type == "cuda"
    assert torch.equal(model(x), expected)


def test_tables_stay_where_they_are_for_a_device_without_memory() -> None:
    maps = node_maps.NodeMaps(sl.fourier_ft(9).lay_out({"layer": (12, 8)})[0][1])
    before = list(maps._tables)
    assert any(table is not None for table in before)
    for device in ("meta", "cpu"):
        maps.place(torch.device(device))
        assert all(now is then for now, then in zip(maps._tables, before, strict=True))


@pytest.mark.parametrize("spec", [sl.fourier_ft(9), sl.oft(4), sl.hra(4), sl.uni_lora(9), sl.vb_lora(2, length=4)], ids=repr)
def test_a_model_without_memory_is_called(spec: sl.AdapterSpec) -> None:
    with torch.device("meta"):
        shell = Tiny()
    tuned = sl.attach(shell, spec, targets=TARGETS)
    shell(torch.empty(2, 5, 12, device="meta")).sum().backward()
    assert all(p.grad.is_meta for p in tuned.parameters())


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(sl.SpecError, match="96 elements"):
        sl.AdapterSpec(sl.Network("o i", w=sl.Node("o i", map=sl.Selected(97)))).count([(12, 8)])
    with pytest.raises(sl.SpecError, match="common divisor"):
        sl.AdapterSpec(sl.Network("o i", w=sl.Node("o i", map=sl.Circulant(3)))).count([(12, 8)])
    with pytest.raises(sl.SpecError, match="square"):
        sl.AdapterSpec(sl.Network("o i", w=sl.Node("o i", map=sl.Cayley()))).count([(12, 8)])
    with pytest.raises(sl.SpecError, match="start at zero"):
        sl.AdapterSpec(sl.Network("o i", w=sl.Node("o i", map=sl.Cayley()))).count([(8, 8)])
    with pytest.raises(sl.SpecError, match="an odd count cannot start at zero"):
        sl.Householder(3, less_one=True)
    with pytest.raises(sl.SpecError, match="nothing of its own to train"):
        sl.Node("o i", map=sl.Identity())
    two = sl.Network("o i", {"r": 8}, a=sl.Node("o r", map=sl.Householder(2, less_one=True)), b=sl.Node("r i", "zeros"))
    with pytest.raises(sl.SpecError, match="exactly one node may"):
        sl.AdapterSpec(two).count([(8, 8)])
    with pytest.raises(sl.SpecError, match="as many indices"):
        sl.Node("o", map=sl.Cayley())
    with pytest.raises(sl.SpecError, match="never train"):
        sl.Node("o r", "zeros", map=sl.Normalised())
    with pytest.raises(sl.SpecError, match="flat fold"):
        sl.AdapterSpec(sl.Network("a b", w=sl.Node("a b", map=sl.Selected(3))), sl.FlatFold(order=2)).count([(8, 8)])
    with pytest.raises(sl.SpecError, match="has a map"):
        NEW["bank"].check_added("sums are")


def test_a_node_without_a_map_is_written_as_before() -> None:
    assert all("map" not in node for _, node in sl.lotr(2).to_dict()["network"].get("nodes", []))
    plain = sl.AdapterSpec(sl.Network("o i", {"r": 2}, b="o r", a="r i"))
    assert all("map" not in node for _, node in plain.to_dict()["network"]["nodes"])


@pytest.mark.parametrize(
    ("spec", "route"), [(sl.AdapterSpec(sl.Dense(), alpha=3.0), "apply"), (sl.fourier_ft(9, alpha=3.0), "delta")], ids=str
)
def test_x_comes_back_through_w_and_a_matrix_at_once(spec: sl.AdapterSpec, route: str) -> None:
    """Where the network is one matrix: its scale counts in x's gradient, and in that of what it is made of."""
    layer = nn.Linear(6, 5)
    tuned = sl.attach(nn.Sequential(layer), spec, ["0"], route=route)
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    x = torch.randn(4, 6, requires_grad=True)
    weight = (layer.weight + tuned.delta("0")).detach().double().requires_grad_()
    given = torch.randn(4, 5)
    layer(x).backward(given)
    # float32, products of 6 numbers of order 1
    torch.testing.assert_close(x.grad.double(), given.double() @ weight, rtol=1e-5, atol=1e-5)
    (stored,) = tuned.parameters()
    nearby = torch.randn_like(stored)
    change = (given.double() * (x.detach().double() @ moved(tuned, stored, nearby).double().t())).sum()
    torch.testing.assert_close((stored.grad * nearby).sum().double(), change, rtol=1e-4, atol=1e-4)


def moved(tuned: sl.Tuned, stored: nn.Parameter, by: Tensor) -> Tensor:
    """What dW, which is linear in what is stored, gains by a step."""
    before = tuned.delta("0").detach()
    with torch.no_grad():
        stored += by
    return tuned.delta("0").detach() - before
