"""Updates that are not added: DoRA on every variant and products from a side, against dense formulas and PEFT's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optional import library
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import superlora_tn as sl
from superlora_tn.contraction.profile import CPU
from superlora_tn.contraction.rows import row_products
from superlora_tn.declare.joins import Join
from superlora_tn.update import joined as update_joined
from superlora_tn.update.joined import factors

OUT, IN = 12, 10
SPECS = {
    "lora": sl.lora(3, alpha=6),
    "lokr": sl.lokr(2),
    "loha": sl.loha(2),
    "lotr": sl.lotr(3),
    "superlora": sl.superlora(2, 3, groups=2, splits=2),
    "vera": sl.vera(4),
}
BLOCKS = sl.AdapterSpec(sl.Network("(b o) (c i)", {"b": 2, "c": 2}, R="b o i", D=sl.Node("b c", "eye", trainable=False)))
JOINS: dict[str, Join] = {
    "magnitude": sl.Magnitude(),
    "differentiated": sl.Magnitude(detached=False),
    "left": sl.Multiply("left"),
    "right": sl.Multiply("right"),
    "left, alone": sl.Multiply("left", residual=False),
    "right, alone": sl.Multiply("right", residual=False),
    "left, scaled": sl.Multiply("left", scaled=True),
    "right, scaled": sl.Multiply("right", residual=False, scaled=True),
}
Array = np.ndarray


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN, bias=False)).double()


def declared(spec: sl.AdapterSpec, join: Join) -> sl.AdapterSpec:
    alone = isinstance(join, sl.Multiply) and not join.residual
    return replace(spec, join=join, alpha=None if alone else spec.alpha)


def moved(tuned: sl.Tuned, size: float = 0.3) -> sl.Tuned:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return tuned


def attached(model: nn.Module, spec: sl.AdapterSpec, targets: list[str], **more: Any) -> sl.Tuned:
    return sl.attach(model, spec, targets, dtype=torch.float64, seed=1, **more)


def dense(join: Join, weight: Array, network: Array, magnitude: Array | None) -> Array:
    """W' by the formula."""
    if isinstance(join, sl.Magnitude):
        whole = weight + network
        assert magnitude is not None
        return magnitude[:, None] * whole / np.sqrt((whole**2).sum(1))[:, None]
    turn = network + np.eye(len(network)) if join.residual else network
    whole = turn @ weight if join.side == "left" else weight @ turn
    return whole if magnitude is None else magnitude[:, None] * whole


def formula(tuned: sl.Tuned, join: Join, name: str, weight: Tensor) -> Array:
    member = tuned._members[name]
    magnitude = member.magnitude().detach().numpy() if join.has_rows else None
    return dense(join, weight.detach().numpy(), member.delta().detach().numpy(), magnitude)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("name", SPECS)
def test_outputs_merged_weights_and_read_weights_follow_the_formula(name: str, join: str) -> None:
    spec = declared(SPECS[name], JOINS[join])
    x = torch.randn(7, IN, dtype=torch.float64)
    for more in ({}, {"at": "weight"}, {"route": "delta"}) + (() if name == "superlora" else ({"route": "apply"},)):
        model = layers()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        tuned = moved(attached(model, spec, ["0", "2"], **more))
        first, second = (formula(tuned, JOINS[join], n, before[f"{n}.weight"]) for n in "02")
        expected = np.tanh(x.numpy() @ first.T + before["0.bias"].numpy()) @ second.T
        # Sums of at most 12 products in float64, one after the other in two layers.
        np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(
            tuned.delta("0").detach().numpy() + before["0.weight"].numpy(), first, rtol=1e-10, atol=1e-11
        )
        tuned.merge()
        np.testing.assert_allclose(model[0].weight.detach().numpy(), first, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-10, atol=1e-11)
        tuned.unmerge()
        tuned.detach()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("join", ["magnitude", "differentiated", "left", "right", "left, scaled"])
@pytest.mark.parametrize("at", [None, "weight"])
def test_the_start_is_the_base_bit_for_bit(join: str, at: Any) -> None:
    for spec in SPECS.values():
        model, x = layers().float(), torch.randn(5, IN)
        expected = model(x)
        sl.attach(model, replace(spec, join=JOINS[join]), ["0", "2"], at=at)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("at", [None, "weight"])
def test_gradients_are_those_of_the_dense_formula(join: str, at: Any) -> None:
    """Of a detached norm, with the norm held where it is."""
    model, x = layers(), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    weight = model[0].weight.detach().clone()
    tuned = moved(attached(model, declared(SPECS["lora"], JOINS[join]), ["0"], at=at))
    up, down = (dict(tuned.named_parameters())[f"adapters.0.node_factor_{side}"] for side in ("out", "in"))
    held = torch.linalg.norm(weight + 2 * up @ down.T, dim=1).detach() if join == "magnitude" else None
    own = [p for p in tuned.parameters() if p.requires_grad]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        values = {id(p): value for p, value in zip(own, parameters, strict=True)}
        network = values[id(up)] @ values[id(down)].T * tuned.spec.scale
        if join in ("magnitude", "differentiated"):
            whole = weight + network
            norm = whole.square().sum(1).sqrt() if held is None else held
            changed = values[id(tuned.adapters[0].magnitude)][:, None] * whole / norm[:, None]
        else:
            turn = network + torch.eye(len(network), dtype=network.dtype) * JOINS[join].residual
            changed = turn @ weight if "left" in join else weight @ turn
            if "scaled" in join:
                changed = values[id(tuned.adapters[0].magnitude)][:, None] * changed
        return torch.tanh(x @ changed.T + model[0].bias) @ model[2].weight.T

    loss = torch.randn(4, IN, dtype=torch.float64)
    expected = torch.autograd.grad((run(x, *own) * loss).sum(), [x, *own])
    found = torch.autograd.grad((model(x) * loss).sum(), [x, *own])
    for one, other in zip(found, expected, strict=True):
        # The same products in another order, float64.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("more", [{"at": "weight"}, {"route": "apply"}, {"route": "delta"}], ids=str)
def test_a_weight_that_trains_beside_gets_the_gradient_of_the_dense_formula(join: str, more: dict[str, Any]) -> None:
    model, x = layers(), torch.randn(4, IN, dtype=torch.float64)
    tuned = moved(attached(model, declared(SPECS["lora"], JOINS[join]), ["0"], also=["0.weight", "0.bias"], **more))
    stored: Any = model[0]._parameters["weight"]
    own = [stored, model[0].bias, *tuned.adapters.parameters()]
    named = dict(tuned.named_parameters())
    network = named["adapters.0.node_factor_out"] @ named["adapters.0.node_factor_in"].T * tuned.spec.scale
    if isinstance(JOINS[join], sl.Magnitude):
        whole = stored + network
        norms = whole.square().sum(1).sqrt()
        changed = named["adapters.0.magnitude"][:, None] * whole / (norms.detach() if join == "magnitude" else norms)[:, None]
    else:
        turn = network + torch.eye(len(network), dtype=network.dtype) * JOINS[join].residual
        changed = turn @ stored if "left" in join else stored @ turn
        changed = named["adapters.0.magnitude"][:, None] * changed if "scaled" in join else changed
    loss = torch.randn(4, IN, dtype=torch.float64)
    expected = torch.autograd.grad(((torch.tanh(x @ changed.T + model[0].bias) @ model[2].weight.T) * loss).sum(), own)
    for _ in range(2):  # nothing that a first call keeps is taken for the second's
        found = torch.autograd.grad((model(x) * loss).sum(), own)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)  # the same products in another order, float64


@pytest.mark.parametrize("join", ["magnitude", "differentiated"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_weight_that_trains_beside_does_so_under_dropout(join: str, kind: str) -> None:
    """Dropout takes elements of the whole change's input, ``y + drop(x) (W' - W)^T``."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(IN, OUT) if kind == "linear" else nn.Conv2d(IN, OUT, 1)).double()
    x = torch.randn(7, IN, dtype=torch.float64)
    given = x if kind == "linear" else x[:, :, None, None]
    spec = replace(sl.lora(3, dropout=0.5), join=JOINS[join])
    tuned = moved(attached(model, spec, ["0"], also=["0.weight"])).train()
    model.train()
    named, stored = dict(tuned.named_parameters()), model[0].weight
    own, weight = [stored, *tuned.adapters.parameters()], stored.flatten(1)
    torch.manual_seed(8)
    found = torch.autograd.grad(model(given).square().sum(), own)
    torch.manual_seed(8)
    dropped = nn.functional.dropout(given, 0.5).flatten(1)
    whole = weight + named["adapters.0.node_factor_out"] @ named["adapters.0.node_factor_in"].T
    norms = whole.square().sum(1).sqrt()
    changed = named["adapters.0.magnitude"][:, None] * whole / (norms.detach() if join == "magnitude" else norms)[:, None]
    y = x @ weight.T + model[0].bias + dropped @ (changed - weight).T
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), own), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


# torch's own forward-mode rules compile with torch.jit.script when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("more", [{"at": "weight"}, {"route": "apply"}, {"route": "delta"}], ids=str)
def test_tangents_of_magnitudes_are_the_gradient_along_the_way(detached: bool, more: dict[str, Any]) -> None:
    """A norm that is held where it is has no tangent, as it has no gradient."""
    model, x = layers(), torch.randn(3, IN, dtype=torch.float64)
    moved(attached(model, sl.dora(sl.lora(2), detached), ["0"], also=["0.weight"], **more))
    model(x)
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    ways = {n: torch.randn_like(p) for n, p in values.items()}
    names = {n.rpartition(".")[2]: n for n in values}
    assert names.keys() == {"node_factor_out", "node_factor_in", "magnitude", "weight"}

    def run(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    def formula(values: dict[str, Tensor]) -> Tensor:
        up, down, magnitude, weight = (values[names[n]] for n in ("node_factor_out", "node_factor_in", "magnitude", "weight"))
        whole = weight + up @ down.T
        norms = whole.square().sum(1).sqrt()
        changed = magnitude[:, None] * whole / (norms.detach() if detached else norms)[:, None]
        return (torch.tanh(x @ changed.T + model[0].bias) @ model[2].weight.T).square().sum()

    leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
    slopes = torch.autograd.grad(formula(leaves), list(leaves.values()))
    wanted = sum((slope * ways[n]).sum() for slope, n in zip(slopes, leaves, strict=True))
    reverse = torch.func.grad(run)(values)
    torch.testing.assert_close(sum((reverse[n] * ways[n]).sum() for n in values), wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.func.jvp(run, (values,), (ways,))[1], wanted, rtol=1e-9, atol=1e-11)


def dora_of_peft(layer: nn.Module, rank: int, **more: Any) -> nn.Module:
    peft = library("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=True, target_modules=["0"], init_lora_weights=False, **more)
    return peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).base_model.model


def carried(theirs: nn.Module, tuned: sl.Tuned, turn: bool) -> dict[str, str]:
    """Give ours the values of PEFT's layer; which parameters of the two are the same."""
    table = isinstance(theirs[0].get_base_layer(), nn.Embedding)
    names = {"out": "lora_embedding_B.default" if table else "lora_B.default.weight"}
    names["in"] = "lora_embedding_A.default" if table else "lora_A.default.weight"
    given, own = dict(theirs[0].named_parameters()), dict(tuned.named_parameters())
    with torch.no_grad():
        own["adapters.0.node_factor_out"].copy_(given[names["out"]].flatten(1))
        own["adapters.0.node_factor_in"].copy_(given[names["in"]].flatten(1).T)
        own["adapters.0.magnitude"].copy_(given["lora_magnitude_vector.default.weight"].flatten())
        if turn:
            for one in (own["adapters.0.magnitude"], given["lora_magnitude_vector.default.weight"]):
                one.mul_(torch.linspace(0.5, 1.5, one.numel(), dtype=one.dtype).reshape(one.shape))
    return {
        "adapters.0.node_factor_out": names["out"],
        "adapters.0.node_factor_in": names["in"],
        "adapters.0.magnitude": "lora_magnitude_vector.default.weight",
    }


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), lambda: torch.randn(3, 5, IN)),
    "no bias": (lambda: nn.Linear(IN, OUT, bias=False), lambda: torch.randn(3, IN)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(20, 6), lambda: torch.randint(20, (3, 4))),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("route", ["apply", "delta"])
def test_dora_equals_pefts_layer(name: str, route: Any) -> None:
    make, draw = LAYERS[name]
    torch.manual_seed(4)
    layer, x = make().double(), draw()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    theirs = dora_of_peft(layer, 3)
    model = nn.Sequential(copy.deepcopy(layer))
    tuned = attached(model, sl.dora(sl.lora(3, alpha=6)), ["0"], route=route)
    same = carried(theirs, tuned, turn=True)
    y, expected = model(x), theirs(x)
    # PEFT multiplies in another order; float64.
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    loss = torch.randn_like(y)
    (y * loss).sum().backward()
    mine = None if x.grad is None else x.grad.clone()
    x.grad = None
    (expected * loss).sum().backward()
    if mine is not None:
        torch.testing.assert_close(mine, x.grad, rtol=1e-9, atol=1e-11)
    given = dict(theirs[0].named_parameters())
    for own, other in same.items():
        found, wanted = tuned.get_parameter(own).grad, given[other].grad
        assert found is not None
        assert wanted is not None
        wanted = wanted.flatten(1).T if own.endswith("factor_in") else wanted.reshape(found.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_dropout_takes_elements_of_both_products_as_in_peft() -> None:
    torch.manual_seed(4)
    layer, x = nn.Linear(IN, OUT).double(), torch.randn(6, IN, dtype=torch.float64)
    theirs = dora_of_peft(layer, 3, lora_dropout=0.5)
    model = nn.Sequential(copy.deepcopy(layer))
    tuned = attached(model, sl.dora(sl.lora(3, alpha=6, dropout=0.5)), ["0"])
    carried(theirs, tuned, turn=True)
    for module in (model, theirs):
        module.train()
    torch.manual_seed(9)
    expected = theirs(x)
    torch.manual_seed(9)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)
    theirs.eval()
    model.eval()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("detached", [True, False])
def test_norms_without_dw_are_those_of_w_plus_dw(detached: bool) -> None:
    """Values and gradients of every variant by the contractions that never build dW, against the norms themselves."""
    for spec in (sl.lora(3, alpha=6), sl.lokr(2), sl.loha(2), sl.lotr(3), sl.vera(4), sl.lonkr(2), sl.dense(), sl.gralora(2)):
        model = layers()
        tuned = moved(attached(model, sl.dora(spec, detached), ["0"], route="apply"))
        member, weight = tuned._members["0"], model[0].weight.detach()
        assert member.adapter.more(member, weight) is not None
        scale = factors(member, weight, None)
        norms = torch.linalg.norm(weight + member.current(), dim=1)
        expected = member.magnitude() / (norms.detach() if detached else norms)
        torch.testing.assert_close(scale, expected, rtol=1e-10, atol=1e-12)
        own, loss = list(tuned.parameters()), torch.randn(OUT, dtype=torch.float64)
        given = [torch.autograd.grad((s * loss).sum(), own, allow_unused=True) for s in (scale, expected)]
        for found, wanted in zip(*given, strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["lora", "lokr", "lotr", "vera"])
def test_a_large_layer_never_builds_dw(name: str) -> None:
    shape = (4096, 4096)
    graph = SPECS[name].lay_out({"layers.0.q_proj": shape})[0][1]
    rows = row_products(graph, shape, CPU, "dp")
    assert rows is not None
    # W is read once; all that is made is thin.
    assert max(rows.crossed.peak, rows.squared.peak) * 16 <= 4 * shape[0] * shape[1]
    seen: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and not any(isinstance(a, Tensor) and a.data_ptr() == found.data_ptr() for a in args):
                seen.append(found.numel())
            return found

    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    sl.attach(model, sl.dora(SPECS[name]), ["0"])
    with Sizes():
        model(torch.randn(2, 1024)).sum().backward()
    assert seen
    assert max(seen) < 1024 * 1024


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),  # which nothing counts
        lambda weight: np.multiply(weight.detach().numpy(), 2, out=weight.detach().numpy()),
    ],
    ids=["in place", "data", "numpy"],
)
def test_norms_of_w_are_found_again_when_w_changes(write: Callable[[Tensor], Any]) -> None:
    model, x = layers()[:1], torch.randn(3, IN, dtype=torch.float64)
    tuned = moved(attached(model, sl.dora(sl.lora(2)), ["0"], route="apply"))
    for fixed in (False, True):
        with tuned.fixed() if fixed else nullcontext(), torch.no_grad():
            model(x)
            write(model[0].weight) if not fixed else model[0].weight.mul_(2)
            first = model(x)
        expected = x.numpy() @ formula(tuned, sl.Magnitude(), "0", model[0].weight).T + model[0].bias.detach().numpy()
        np.testing.assert_allclose(first.numpy(), expected, rtol=1e-10, atol=1e-11)


def test_norms_of_w_are_found_once_in_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = [], update_joined.row_norms
    monkeypatch.setattr(update_joined, "row_norms", lambda matrix: found.append(1) or plain(matrix))
    model, x = layers()[:1], torch.randn(3, IN, dtype=torch.float64)
    tuned = moved(attached(model, sl.dora(sl.lora(2)), ["0"], route="apply"))
    with tuned.fixed(), torch.no_grad():
        torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    assert len(found) == 1


@pytest.mark.parametrize("spec", [sl.oft(2), sl.hra(2), replace(sl.lora(3), join=sl.Multiply("left", scaled=True))], ids=repr)
def test_autocast_narrows_no_weight(spec: sl.AdapterSpec) -> None:
    """What is built of a weight, to be read or merged, is computed in its own dtype; autocast is for what layers compute."""
    for at in ("output", "weight"):
        model = layers().float()
        tuned = moved(sl.attach(model, spec, ["0", "2"], seed=1, at=at))
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                delta = tuned.delta("0").detach()
                tuned.merge()
            found.append((delta, model[0].weight.detach().clone()))
            tuned.unmerge()
        for plain, cast in zip(*found, strict=True):
            assert torch.equal(plain, cast)


def test_rows_of_zeros_stay_zero() -> None:
    model, x = layers(), torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[4] = 0
    for route in ("apply", "delta"):
        tuned = attached(model, sl.dora(sl.lora(2)), ["0"], route=route)
        y = model(x)
        y.sum().backward()
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(p.grad).all() for p in tuned.parameters() if p.grad is not None)
        tuned.merge()
        assert torch.isfinite(model[0].weight).all()
        tuned.detach()


def test_blocks_on_the_diagonal_turn_each_its_own_inputs() -> None:
    model, x = layers(), torch.randn(5, IN, dtype=torch.float64)
    weight, bias = (model[0].weight.detach().clone(), model[0].bias.detach())
    tuned = moved(attached(model, replace(BLOCKS, join=sl.Multiply("right")), ["0"]))
    assert tuned.num_parameters == 2 * 5 * 5
    blocks = tuned._members["0"].adapter.tensors()[0].detach()
    turn = torch.block_diag(*blocks) + torch.eye(IN, dtype=torch.float64)
    torch.testing.assert_close(model[0](x), x @ turn.T @ weight.T + bias, rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,eoi->neo", x, self.stack)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


Kinds = tuple[Callable[[], nn.Module], Callable[[], Tensor], list[Any], str]
ONE: Any = nn.Sequential
KINDS: dict[str, Kinds] = {
    "convolution": (lambda: ONE(nn.Conv2d(4, 6, 3, padding=1)), lambda: torch.randn(2, 4, 5, 5), ["0"], "mlr"),
    "no batch": (lambda: ONE(nn.Conv2d(4, 6, 3, padding=1)), lambda: torch.randn(4, 5, 5), ["0"], "mlr"),
    "groups": (lambda: ONE(nn.Conv2d(4, 6, 3, groups=2)), lambda: torch.randn(2, 4, 5, 5), ["0"], "mlr"),
    "transposed": (lambda: ONE(nn.ConvTranspose2d(4, 6, 3)), lambda: torch.randn(2, 4, 5, 5), ["0"], "ml"),
    "table": (lambda: ONE(nn.Embedding(20, 6, padding_idx=2)), lambda: torch.randint(20, (3, 4)), ["0"], "mlr"),
    "rows of a table": (
        lambda: ONE(nn.Embedding(20, 6)),
        lambda: torch.randint(20, (3, 4)),
        [sl.Rows("0", ("a", "b"), use=("b",), sizes=(15, 5))],
        "m",
    ),
    "bags": (lambda: ONE(nn.EmbeddingBag(20, 6, mode="mean")), lambda: torch.randint(20, (3, 4)), ["0"], "mlr"),
    "blocks of rows": (
        lambda: ONE(nn.Linear(6, 12)),
        lambda: torch.randn(3, 6),
        [sl.Rows("0", ("q", "k", "v"), use=("q", "v"), heads=2)],
        "mlr",
    ),
    "tied": (Tied, lambda: torch.randint(9, (2, 3)), ["table+head"], "m"),
    "experts": (Experts, lambda: torch.randn(2, 4), ["stack"], "mlr"),
    "attention": (Attends, lambda: torch.randn(2, 3, 12), ["q_proj", "v_proj", "out_proj"], "mlr"),
    "sequences": (lambda: nn.LSTM(5, 6), lambda: torch.randn(4, 2, 5), ["weight_ih_l0"], "mlr"),
}
SHORT = {"m": "magnitude", "l": "left", "r": "right"}


@pytest.mark.parametrize(("name", "join"), [(n, j) for n, kind in KINDS.items() for j in kind[3]])
def test_each_kind_of_layer_computes_what_its_merged_weight_does(name: str, join: str) -> None:
    make, draw, targets, _ = KINDS[name]
    torch.manual_seed(6)
    model, x = make().double().eval(), draw()
    x = x.double() if x.is_floating_point() else x

    def run() -> Tensor:
        found = model(x)
        return found[0] if isinstance(found, tuple) else found

    base = run()
    tuned = attached(model, replace(sl.lora(2), join=JOINS[SHORT[join]]), targets)
    torch.testing.assert_close(run(), base, rtol=0, atol=0)
    moved(tuned)
    y = run()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())
    assert (y - base).abs().max() > 1e-3
    tuned.merge()
    # The merged weight is dW built, in float64; what merging writes is checked against the formula above.
    torch.testing.assert_close(run(), y.detach(), rtol=1e-10, atol=1e-11)
    tuned.detach()
    torch.testing.assert_close(run(), base, rtol=0, atol=0)


def test_what_no_network_multiplies_is_refused_by_name() -> None:
    for name, join in (("tied", "left"), ("rows of a table", "right"), ("transposed", "right")):
        make, _, targets, _ = KINDS[name]
        with pytest.raises(sl.AttachError, match=r"no network multiplies|at its output"):
            sl.attach(make(), replace(sl.lora(2), join=JOINS[join]), targets)


@pytest.mark.parametrize("join", JOINS)
def test_a_compiled_model_computes_the_same_and_a_strength_of_none_is_the_base(join: str) -> None:
    model, x = layers(), torch.randn(5, IN, dtype=torch.float64)
    base = model(x)
    tuned = moved(attached(model, declared(SPECS["lora"], JOINS[join]), ["0", "2"], route="apply"))
    y = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-10, atol=1e-12)
    if isinstance(JOINS[join], sl.Multiply):
        tuned.strength = 0
        with torch.no_grad():  # it scales the network, and no magnitudes
            for adapter in tuned.adapters if "scaled" in join else ():
                adapter.magnitude.fill_(1)
        torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("join", ["magnitude", "left", "right"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_quantised_weight_joins_as_it_reads_back(join: str, dropout: float) -> None:
    quantization = library("torchao.quantization")
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(5, 64)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    base = model(x)
    tuned = sl.attach(model, replace(sl.lora(4, dropout=dropout), join=JOINS[join]), ["0"], seed=1)
    torch.testing.assert_close(model.train()(x), base, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = x.clone().requires_grad_()
    y = model.eval()(given)
    y.square().sum().backward()
    whole = (tuned.delta("0") + model[0].weight.dequantize()).detach()
    # Sums of 64 products in float32.
    torch.testing.assert_close(y.detach(), x @ whole.T + model[0].bias.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.grad, 2 * y.detach() @ whole, rtol=1e-5, atol=1e-4)
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())


@pytest.mark.parametrize("join", ["magnitude", "left", "right"])
def test_files_states_and_resets_carry_the_join(join: str, tmp_path: Path) -> None:
    model, x = layers(), torch.randn(3, IN, dtype=torch.float64)
    base = model(x)
    tuned = moved(attached(model, replace(SPECS["superlora"], join=JOINS[join]), ["0", "2"]))
    expected, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    assert tuned.num_parameters == sum(p.numel() for p in tuned.parameters()) == tuned.spec.count(tuned.targets)
    tuned.save(tmp_path)
    said = {
        "magnitude": "2 with rows scaled to trained magnitudes (DoRA)",
        "left": "2 multiplied from the left by the network N: W' = ",
        "right": "2 multiplied from the right by the network N, as OFT and the like do: W' = ",
    }
    assert said[join] in str(tuned)
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    tuned.reset_parameters()
    torch.testing.assert_close(model(x), base, rtol=0, atol=0)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    tuned.replace(tmp_path)
    tuned.detach()
    loaded = sl.load(model, tmp_path)
    assert loaded.spec.join == JOINS[join]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_declaration_that_adds_is_saved_as_before() -> None:
    assert "join" not in sl.lora(2).to_dict()
    for join in JOINS.values():
        spec = declared(SPECS["lora"], join)
        assert sl.AdapterSpec.from_dict(spec.to_dict()) == spec


def test_what_cannot_join_is_refused_in_words(tmp_path: Path) -> None:
    model = layers()
    one = sl.attach(model, sl.dora(sl.lora(2)), ["0"])
    with pytest.raises(sl.AttachError, match="share a weight only where all are added"):
        sl.attach(model, sl.lora(2), ["0"], name="other")
    one.merge()
    with pytest.raises(sl.AttachError, match="unmerge"):
        one.reset_parameters()
    with pytest.raises(sl.AttachError, match="unmerge"):
        one.delta("0")
    one.detach()
    sl.attach(model, sl.lora(2), ["0"])
    with pytest.raises(sl.AttachError, match="share a weight only where all are added"):
        sl.attach(model, sl.dora(sl.lora(2)), ["0"], name="other")
    with pytest.raises(sl.SpecError, match="choose 'left'"):
        sl.Multiply("up")  # type: ignore[arg-type]
    with pytest.raises(sl.SpecError, match="give Magnitude"):
        sl.AdapterSpec(sl.CP(2), join="left")  # type: ignore[arg-type]
    with pytest.raises(sl.SpecError, match="leave alpha=None"):
        sl.AdapterSpec(sl.CP(2), alpha=2, join=sl.Multiply("left", residual=False))
    with pytest.raises(sl.SpecError, match="joins otherwise already"):
        sl.dora(sl.dora(sl.lora(2)))
    with pytest.raises(sl.SpecError, match="no nodes of the base's values"):
        sl.attach(layers(), replace(sl.hira(2), join=sl.Multiply("left")), ["0"])
    with pytest.raises(sl.AttachError, match="complex"):
        sl.attach(layers(), sl.dora(sl.lora(2)), ["0"], dtype=torch.complex64)
    for join in (sl.Magnitude(), sl.Multiply("left")):
        tuned = sl.attach(layers(), replace(sl.lora(2), join=join), ["0"])
        with pytest.raises(sl.SpecError, match="starts are for updates that are added"):
            sl.start(tuned, sl.pissa())
        with pytest.raises(sl.SpecError, match="conversions are for updates that are added"):
            sl.convert(tuned, sl.lora(3))
        lacking, said = ("gguf", "hold no magnitudes") if join == sl.Magnitude() else ("peft", "are for updates that are added")
        with pytest.raises(sl.CheckpointError, match=said):
            tuned.save(tmp_path / "other", format=lacking)
        with pytest.raises(sl.SpecError, match="are for updates that are added"):
            sl.combine({"superlora": 1.0}, model=tuned._model[0])


@pytest.mark.parametrize("join", ["magnitude", "left", "right, alone"])
def test_verify_proves_the_join_and_notices_a_wrong_one(join: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(sl.lora(2), join=JOINS[join])
    certificate = sl.verify(spec, against="-", examples=4)
    assert certificate
    assert certificate.rows[0].claim == "W' = the join's formula"

    def wrong(*arguments: Any) -> Tensor:
        found: Tensor = right(*arguments)
        return found * (1 + 1e-4)

    from superlora_tn.model import weights

    right = weights.joined
    monkeypatch.setattr(weights, "joined", wrong)
    certificate = sl.verify(spec, against="-", examples=4)
    assert not certificate
    assert certificate.failures[0].claim == "W' = the join's formula"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("join", ["left", "right", "right, alone", "left, scaled", "right, scaled"])
def test_sequences_of_several_lengths_are_multiplied_one_by_one(join: str, layout: torch.layout) -> None:
    model = layers()[:1]  # 10 inputs, 12 outputs
    moved(attached(model, declared(SPECS["lora"], JOINS[join]), ["0"]))
    pieces = [torch.randn(n, IN, dtype=torch.float64) for n in (2, 5)]
    together = model(torch.nested.nested_tensor(pieces, layout=layout))
    for found, x in zip(together.unbind(), pieces, strict=True):
        torch.testing.assert_close(found, model(x), rtol=1e-11, atol=1e-12)  # float64, by the built change
