"""Embeddings: rows of dW looked up in the nodes, as torch looks them up in the table W + dW, whatever the network."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tied, noise, perturb, same_state, seeded
from optional import library
from torch import Tensor, nn
from torch.nn import functional as F

import superlora_tn as sl
from superlora_tn.declare.joins import Join
from superlora_tn.model import recognise

NUM, DIM = 12, 6
SPECS = {
    "lora": sl.lora(3, alpha=4),
    "loha": sl.loha(2),
    "lokr": sl.lokr(1),
    "lokr low": sl.lokr(1, decompose_both=True, factor=2),
    "lonkr": sl.lonkr(1, 3),
    "lotr": sl.lotr(2),
    "vera": sl.vera(3),
    "dense": sl.dense(),
    "in first": sl.AdapterSpec(sl.Tucker((2, 3), factors="in out"), sl.PhysicalFold("layer in out")),
    "train heads": sl.AdapterSpec(sl.TensorTrain(2), sl.PhysicalFold("in head out", heads=2)),
    "notation": sl.AdapterSpec(
        sl.Network("(o1 o2) (i1 i2)", {"r": 2, "i1": 3}, a="i1 o2 r", b=sl.Node("r i2 o1", init="zeros"))
    ),
    "lorta": sl.lorta(2, groups=2),
    "fastfood": sl.lorta(2, projection=sl.Fastfood(0.5, seed=1)),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_route = pytest.mark.parametrize("route", [None, "delta"])


def attached(layer: nn.Module, spec: sl.AdapterSpec, **options: Any) -> tuple[nn.Module, sl.Tuned, Tensor]:
    """The layer in float64 with a trained adapter, and its dW (dim, num)."""
    model = nn.ModuleDict({"layer": layer.double()})
    tuned = sl.attach(model, spec, ["layer"], seed=0, dtype=torch.float64, **options)
    perturb(tuned)
    return model["layer"], tuned, tuned.delta("layer")


def gradients(y: Tensor, tuned: sl.Tuned, g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, list(tuned.parameters()), g, retain_graph=True))


@each_spec
@each_route
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (40,)], ids=str)
def test_a_lookup_is_that_of_the_table_with_dw(spec: sl.AdapterSpec, route: str | None, shape: tuple[int, ...]) -> None:
    layer, tuned, delta = attached(nn.Embedding(NUM, DIM), spec, route=route)
    assert tuned.targets == {"layer": (DIM, NUM)}
    x = torch.randint(0, NUM, shape)
    y, expected = layer(x), F.embedding(x, layer.state_dict()["weight"] + delta.T)
    torch.testing.assert_close(y, expected)
    g = noise(*shape, DIM, seed=1, dtype=torch.float64)
    for found, other in zip(gradients(y, tuned, g), gradients(expected, tuned, g), strict=True):
        torch.testing.assert_close(found, other)
    torch.testing.assert_close(layer(x.int()), y)


@each_spec
def test_a_table_of_one_row(spec: sl.AdapterSpec) -> None:
    """RoBERTa's token types."""
    if spec in (SPECS["notation"], SPECS["in first"]):
        pytest.skip("declared for more rows")
    layer, _, delta = attached(nn.Embedding(1, DIM), spec)
    x = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(layer(x), F.embedding(x, layer.weight + delta.T))


@each_spec
@pytest.mark.parametrize(
    "options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}, {"padding_idx": -1, "scale_grad_by_freq": True}]
)
def test_gradients_are_weighted_as_the_tables_own(spec: sl.AdapterSpec, options: dict[str, Any]) -> None:
    layer, tuned, delta = attached(nn.Embedding(NUM, DIM, **options), spec)
    x, g = torch.tensor([[2, 5, 5], [11, 2, 5]]), noise(2, 3, DIM, dtype=torch.float64)
    table = layer.weight + delta.T
    expected = F.embedding(x, table, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    for found, other in zip(gradients(y, tuned, g), gradients(expected, tuned, g), strict=True):
        torch.testing.assert_close(found, other)


BAGS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "sum": ({"mode": "sum"}, (torch.tensor([1, 5, 5, 0, 11]), torch.tensor([0, 2, 2, 4]))),
    "mean": ({"mode": "mean"}, (torch.tensor([1, 5, 5, 0, 11]), torch.tensor([0, 2]))),
    "mean of equal bags": ({"mode": "mean"}, (torch.tensor([[1, 5], [5, 0]]),)),
    "weighted": ({"mode": "sum"}, (torch.tensor([[1, 5], [5, 0]]), None, torch.tensor([[0.5, 2.0], [1.0, -1.0]]).double())),
    "padding": ({"mode": "mean", "padding_idx": 5}, (torch.tensor([[1, 5, 3], [5, 5, 5], [0, 2, 4]]),)),
    "last offset": ({"mode": "sum", "include_last_offset": True}, (torch.tensor([1, 5, 2]), torch.tensor([0, 1, 3]))),
    "by frequency": ({"mode": "sum", "scale_grad_by_freq": True}, (torch.tensor([[1, 5], [5, 5]]),)),
}


def bagged(layer: nn.EmbeddingBag, table: Tensor, x: Tensor, offsets: Tensor | None = None, weights: Any = None) -> Tensor:
    """What torch's own function gives for a table (num, dim), with the options of a layer."""
    return F.embedding_bag(
        x,
        table,
        offsets,
        scale_grad_by_freq=layer.scale_grad_by_freq,
        mode=layer.mode,
        per_sample_weights=weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=layer.padding_idx,
    )


@each_spec
@pytest.mark.parametrize("case", BAGS.values(), ids=BAGS)
def test_bags_of_rows(spec: sl.AdapterSpec, case: tuple[dict[str, Any], tuple[Any, ...]]) -> None:
    options, (x, *rest) = case
    layer, tuned, delta = attached(nn.EmbeddingBag(NUM, DIM, **options), spec)
    weights = rest[1] if len(rest) > 1 else None
    weights = None if weights is None else weights.requires_grad_()
    expected = bagged(layer, layer.weight + delta.T, x, *rest)
    y = layer(x, *rest)
    torch.testing.assert_close(y, expected)
    g = noise(*y.shape, dtype=torch.float64)
    for found, other in zip(gradients(y, tuned, g), gradients(expected, tuned, g), strict=True):
        torch.testing.assert_close(found, other)
    if weights is not None:
        torch.testing.assert_close(*(torch.autograd.grad(out, weights, g)[0] for out in (y, expected)))
    named = dict(zip(("offsets", "per_sample_weights"), rest, strict=False))
    torch.testing.assert_close(layer(input=x, **named), expected)


JOINS: dict[str, Join] = {
    "magnitude": sl.Magnitude(),
    "differentiated": sl.Magnitude(detached=False),
    "left": sl.Multiply("left"),
    "left, scaled": sl.Multiply("left", scaled=True),
    "left, alone": sl.Multiply("left", residual=False, scaled=True),
}


def joined(tuned: sl.Tuned, weight: Tensor) -> Tensor:
    """W' (out, in) of the one weight of a `lora` with a join, of the nodes' stored numbers."""
    named, join = dict(tuned.named_parameters()), tuned.spec.join
    up, down = (named[f"adapters.0.node_factor_{side}"] for side in ("out", "in"))
    network, magnitude = up @ down.T * tuned.spec.scale * tuned.strength, named.get("adapters.0.magnitude")
    if isinstance(join, sl.Magnitude):
        whole = weight + network
        norms = whole.square().sum(1).sqrt()
        whole = whole / (norms.detach() if join.detached else norms)[:, None]
    else:
        assert isinstance(join, sl.Multiply)
        one = torch.eye(len(network), dtype=network.dtype) * (1 if join.residual else 1 - tuned.strength)
        whole = (one + network) @ weight
    return whole if magnitude is None else magnitude[:, None] * whole


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    "options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}, {"padding_idx": -1, "scale_grad_by_freq": True}]
)
def test_what_joins_is_weighted_as_the_tables_own(join: str, trains: bool, options: dict[str, Any]) -> None:
    """Magnitudes and a network that multiplies, too, get none from padding, and the table's own is not weighted twice."""
    spec = replace(sl.lora(2), join=JOINS[join])
    model = nn.ModuleDict({"layer": nn.Embedding(NUM, DIM, **options).double()})
    with torch.no_grad():
        model["layer"].weight.add_(1)  # padding too
    tuned = sl.attach(model, spec, ["layer"], seed=0, dtype=torch.float64, also=["layer"] if trains else [])
    perturb(tuned)
    tuned.strength = 0.75
    layer, x, g = model["layer"], torch.tensor([[2, 5, 5], [11, 2, 5]]), noise(2, 3, DIM, dtype=torch.float64)
    assert not tuned.held
    table = joined(tuned, layer.weight.T).T
    expected = F.embedding(x, table, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    own = [*tuned.parameters(), *([layer.weight] if trains else [])]
    for found, other in zip(torch.autograd.grad(y, own, g), torch.autograd.grad(expected, own, g), strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("case", BAGS.values(), ids=BAGS)
def test_what_joins_in_bags_is_weighted_as_the_tables_own(join: str, case: tuple[dict[str, Any], tuple[Any, ...]]) -> None:
    """A bag that weighs its rows by frequency is adapted where it is read, as its sum does not tell them apart."""
    options, (x, *rest) = case
    model = nn.ModuleDict({"layer": nn.EmbeddingBag(NUM, DIM, **options).double()})
    tuned = sl.attach(model, replace(sl.lora(2), join=JOINS[join]), ["layer"], seed=0, dtype=torch.float64)
    perturb(tuned)
    layer = model["layer"]
    assert tuned.held == (["layer"] if layer.scale_grad_by_freq else [])
    expected = bagged(layer, joined(tuned, layer._parameters["weight"].T).T, x, *rest)
    y = layer(x, *rest)
    torch.testing.assert_close(y, expected)
    g = noise(*y.shape, dtype=torch.float64)
    for found, other in zip(gradients(y, tuned, g), gradients(expected, tuned, g), strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("join", ["magnitude", "differentiated"])
@pytest.mark.parametrize("names", [["table", "head"], [sl.Rows("table", ("old", "new"), use=("new",), sizes=(9, 3))]])
def test_magnitudes_of_tied_tables_and_of_some_rows_get_nothing_from_padding(join: str, names: list[Any]) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(NUM, DIM, padding_idx=10), "head": nn.Linear(DIM, NUM)}).double()
    with torch.no_grad():
        model["table"].weight.add_(1)
    if len(names) > 1:
        model["head"].weight = model["table"].weight
    tuned = sl.attach(model, replace(sl.lora(2), join=JOINS[join]), names, seed=0, dtype=torch.float64)
    perturb(tuned)
    weight, x = model["table"].weight, torch.tensor([[0, 9, 10], [11, 10, 9]])
    table = joined(tuned, weight) if len(names) > 1 else torch.cat([weight[:9], joined(tuned, weight[9:].T).T])
    y, expected, g = model["table"](x), F.embedding(x, table, 10), noise(2, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(y, expected)
    for found, other in zip(gradients(y, tuned, g), gradients(expected, tuned, g), strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize(
    "layer", [nn.EmbeddingBag(NUM, DIM, mode="max"), nn.Embedding(NUM, DIM, max_norm=0.5)], ids=["max", "max_norm"]
)
def test_what_is_not_linear_in_the_table_is_adapted_where_it_is_read(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    table = layer.weight.detach().clone().double()
    model, tuned, delta = attached(layer, SPECS["lora"])
    assert "adapted where the weight is read (layer)" in str(tuned)
    x = torch.tensor([[1, 5, 3], [2, 2, 0]])
    plain = copy.deepcopy(layer)
    expected = (
        nn.EmbeddingBag(NUM, DIM, mode="max") if isinstance(plain, nn.EmbeddingBag) else nn.Embedding(NUM, DIM, max_norm=0.5)
    )
    expected.weight = nn.Parameter((table + delta.T).detach())
    torch.testing.assert_close(model(x), expected(x))


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "lotr", "vera", "notation"])
def test_the_table_is_never_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, tuned, _ = attached(nn.Embedding(NUM, DIM), SPECS[name])

    def fail(*given: object) -> None:
        raise AssertionError("dW was built")

    monkeypatch.setattr(type(tuned.adapters[0]), "delta_of", fail)
    monkeypatch.setattr(type(tuned.adapters[0]), "current", fail)
    layer(torch.tensor([3, 1])).sum().backward()


def test_members_of_one_network_take_their_own_rows() -> None:
    for spec in (sl.lotr(2), sl.vera(3), sl.AdapterSpec(sl.CP(3), sl.PhysicalFold("layer type out in"))):
        model = nn.ModuleDict({f"layer_{k}": nn.ModuleDict({n: nn.Embedding(NUM, DIM) for n in "ab"}) for k in range(2)})
        tuned = sl.attach(model, spec, ["a", "b"], seed=0)
        perturb(tuned)
        for name in tuned.targets:
            layer, x = model.get_submodule(name), torch.tensor([3, 0, 11])
            torch.testing.assert_close(layer(x), F.embedding(x, layer.weight + tuned.delta(name).T))


@each_spec
def test_merge_unmerge_save_and_load(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    layer, tuned, delta = attached(nn.Embedding(NUM, DIM, padding_idx=1), spec)
    before, x = copy.deepcopy(layer.state_dict()), torch.arange(NUM)
    adapted = layer(x)
    tuned.save(tmp_path)
    other = nn.ModuleDict({"layer": nn.Embedding(NUM, DIM, padding_idx=1).double()})
    other["layer"].load_state_dict(before)
    sl.load(other, tmp_path)
    torch.testing.assert_close(other["layer"](x), adapted)
    tuned.merge()
    torch.testing.assert_close(layer.weight, before["weight"] + delta.T)
    torch.testing.assert_close(layer(x), adapted)
    tuned.unmerge()
    assert same_state(before, {k: v for k, v in layer.state_dict().items() if k in before})
    assert tuned.num_parameters == spec.count({"layer": (DIM, NUM)}) == sum(p.numel() for p in tuned.parameters())


def test_first_values_are_for_rows_that_one_number_looks_up() -> None:
    """At LoRA's start A x has the spread that it has in a linear layer of inputs of unit size: x is one 1 here."""
    model = nn.ModuleDict({"layer": nn.Embedding(4096, 8)})
    tuned = sl.attach(model, sl.lora(8), ["layer"], seed=0)
    up, down = (p.detach() for p in tuned.parameters())
    assert not up.any()
    assert 0.5 < float(down.std()) * 3**0.5 < 2


def test_dropout_drops_tokens() -> None:
    layer, _, delta = attached(nn.Embedding(NUM, DIM), sl.lora(2, dropout=0.5))
    x = torch.arange(NUM).repeat(20)
    update = layer.train()(x) - F.embedding(x, layer.weight)
    kept = update.abs().sum(1) > 0
    torch.testing.assert_close(update[kept], 2 * delta.T[x[kept]])
    assert 0.3 < float(kept.double().mean()) < 0.7
    torch.testing.assert_close(layer.eval()(x), F.embedding(x, layer.weight + delta.T))


class Scaled(nn.Embedding):
    """As Gemma's and BART's: rows times the root of dim."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embedding_dim**0.5


class Shifted(nn.Embedding):
    """As BART's positions: other rows than those asked for."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_embeddings_with_a_forward_of_their_own(kind: type[nn.Embedding]) -> None:
    layer, tuned, delta = attached(kind(NUM, DIM), SPECS["lora"])
    assert ("weight is read" in str(tuned)) == (kind is Shifted)
    x = torch.tensor([[1, 4], [5, 0]])
    stored = layer.state_dict()["weight"]
    expected = F.embedding(x, stored + delta.T) * DIM**0.5 if kind is Scaled else F.embedding(x + 2, stored + delta.T)
    torch.testing.assert_close(layer(x), expected)
    tuned.merge()
    torch.testing.assert_close(layer(x), expected)
    tuned.detach()
    assert type(layer) is kind


def test_a_packed_table_is_adapted_at_its_output_and_not_merged() -> None:
    class Packed(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(NUM, DIM)
            self.weight = nn.Parameter(torch.randint(-127, 127, (NUM, DIM), dtype=torch.int8), requires_grad=False)

        def forward(self, input: Tensor) -> Tensor:
            return F.embedding(input, self.weight).float() / 127

    model = nn.ModuleDict({"layer": Packed()})
    tuned = sl.attach(model, sl.lora(2), ["layer"], seed=0)
    perturb(tuned)
    x = torch.tensor([3, 0])
    expected = F.embedding(x, model["layer"].weight).float() / 127 + F.embedding(x, tuned.delta("layer").T)
    torch.testing.assert_close(model["layer"](x), expected)
    with pytest.raises(sl.AttachError, match=r"'layer' \(Packed\) is quantised or packed"):
        tuned.merge()


@each_spec
def test_it_compiles_in_one_graph(spec: sl.AdapterSpec) -> None:
    torch._dynamo.reset()
    torch._dynamo.reset()
    layer, _, _ = attached(nn.Embedding(NUM, DIM, padding_idx=1), spec)
    for x in (torch.tensor([[1, 4], [5, 0]]), torch.arange(NUM)):
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# --- some rows alone ------------------------------------------------------------------------------------------------

NEW = sl.Rows("layer", ("old", "new"), use=("new",), sizes=(9, 3))


@each_spec
@pytest.mark.parametrize("options", [{}, {"padding_idx": 10}])
def test_new_tokens_alone(spec: sl.AdapterSpec, options: dict[str, Any], tmp_path: Path) -> None:
    if spec is SPECS["in first"]:
        pytest.skip("declared for more rows")
    model = nn.ModuleDict({"layer": nn.Embedding(NUM, DIM, **options).double()})
    tuned = sl.attach(model, spec, [NEW], seed=0, dtype=torch.float64)
    perturb(tuned)
    delta, layer, before = tuned.delta("layer.new"), model["layer"], model.state_dict()["layer.weight"].clone()
    assert tuned.targets == {"layer.new": (DIM, 3)}
    table = torch.cat([before[:9], before[9:] + delta.T])
    x = torch.tensor([[0, 9, 10], [11, 8, 9]])
    y, expected = layer(x), F.embedding(x, table, layer.padding_idx)
    torch.testing.assert_close(y, expected)
    g = noise(2, 3, DIM, dtype=torch.float64)
    for found, other in zip(gradients(y, tuned, g), gradients(expected, tuned, g), strict=True):
        torch.testing.assert_close(found, other)
    tuned.save(tmp_path)
    other = nn.ModuleDict({"layer": nn.Embedding(NUM, DIM, **options).double()})
    other["layer"].weight.data.copy_(before)
    sl.load(other, tmp_path)
    torch.testing.assert_close(other["layer"](x), y)
    tuned.merge()
    stored = model.state_dict()["layer.weight"]
    torch.testing.assert_close(stored, table)
    assert torch.equal(stored[:9], before[:9])
    tuned.detach()
    assert torch.equal(model.state_dict()["layer.weight"], before)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    ("spec", "at"), [(sl.lora(2), "weight"), (sl.oft(4), None), (sl.boft(2), None), (sl.hra(2), None)], ids=str
)
def test_a_sparse_gradient_of_what_is_computed_is_refused_with_the_remedy(make: Any, spec: sl.AdapterSpec, at: Any) -> None:
    model, numbers = nn.Sequential(make(12, 8, sparse=True)), torch.tensor([[1, 2, 1]])
    before = model(numbers)
    with pytest.raises(sl.AttachError, match=r"'0' is an Embedding(Bag)? with sparse=True.*Set its sparse to False"):
        sl.attach(model, spec, ["0"], at=at)
    assert torch.equal(model(numbers), before)
    model[0].sparse = False
    tuned = sl.attach(model, spec, ["0"], at=at)
    model(numbers).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in tuned.parameters())


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_table_is_adapted_at_its_output_and_trains_beside(make: Any) -> None:
    """The table's own gradient stays sparse; that of the nodes is that of a dense table."""
    grads = []
    for sparse in (True, False):
        torch.manual_seed(2)
        model = nn.Sequential(make(12, 8, sparse=sparse)).double()
        tuned = sl.attach(model, sl.lora(2), ["0"], also=["0.weight"], dtype=torch.float64, seed=0)
        with torch.no_grad():
            for p in tuned.adapters.parameters():
                p.add_(torch.ones_like(p))
        model(torch.tensor([[1, 2, 1]])).square().sum().backward()
        assert model[0].weight.grad.is_sparse == sparse
        grads.append([model[0].weight.grad.to_dense(), *(p.grad for p in tuned.adapters.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_some_rows_of_what_is_no_plain_table_are_refused_by_name() -> None:
    for layer in (nn.Embedding(NUM, DIM, max_norm=1.0), Shifted(NUM, DIM)):
        with pytest.raises(
            sl.AttachError, match=r"'layer.new' is a block of the rows of a \w+, which works for plain embeddings"
        ):
            sl.attach(nn.ModuleDict({"layer": layer}), sl.lora(1), [NEW])
    with pytest.raises(sl.AttachError, match=r"'layer.new' is a block of the rows"):
        sl.attach(nn.ModuleDict({"layer": nn.Embedding(NUM, DIM)}), sl.lora(1), [NEW], at="weight")


# --- tied to an output layer ---------------------------------------------------------------------------------------


def tied(spec: sl.AdapterSpec, **options: Any) -> tuple[nn.Module, sl.Tuned, Tensor]:
    if spec is SPECS["train heads"]:
        spec = sl.AdapterSpec(sl.TensorTrain(2), sl.PhysicalFold("in head out", heads=3))
    model = seeded(0, Tied).double()
    tuned = sl.attach(model, spec, ["embed", "lm_head"], seed=0, dtype=torch.float64, **options)
    perturb(tuned)
    return model, tuned, tuned.delta("embed+lm_head")


def with_table(model: nn.Module, x: Tensor, table: Tensor) -> Tensor:
    return F.linear(torch.tanh(model.body(F.embedding(x, table))), table)


@each_spec
@pytest.mark.parametrize("at", [None, "weight"])
def test_a_tied_table_is_adapted_once_in_both_places(spec: sl.AdapterSpec, at: str | None, tmp_path: Path) -> None:
    if spec is SPECS["notation"]:
        spec = sl.AdapterSpec(sl.Network("(o1 o2) (i1 i2)", {"r": 2, "o1": 3}, a="i1 o2 r", b=sl.Node("r i2 o1", init="zeros")))
    model, tuned, delta = tied(spec, at=at)
    assert tuned.targets == {"embed+lm_head": (9, 12)}
    x, table = torch.tensor([[1, 4, 8], [5, 0, 1]]), model.state_dict()["embed.weight"].clone()
    y, expected = model(x), with_table(model, x, table + delta)
    torch.testing.assert_close(y, expected)
    g = noise(2, 3, 9, dtype=torch.float64)
    for found, other in zip(gradients(y, tuned, g), gradients(expected, tuned, g), strict=True):
        torch.testing.assert_close(found, other)
    tuned.save(tmp_path)
    other = seeded(0, Tied).double()
    sl.load(other, tmp_path, at=at)
    torch.testing.assert_close(other(x), y)
    tuned.merge()
    assert model.lm_head.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight, table + delta)
    torch.testing.assert_close(model(x), y)
    tuned.unmerge()
    torch.testing.assert_close(model(x), y)
    tuned.detach()
    assert not model.embed._forward_hooks
    assert type(model.embed) is nn.Embedding
    assert torch.equal(model.state_dict()["embed.weight"], table)


def test_one_name_of_a_tied_table_adapts_that_place_alone() -> None:
    for name in ("embed", "lm_head"):
        model = seeded(0, Tied)
        tuned = sl.attach(model, sl.lora(2), [name], seed=0)
        perturb(tuned)
        assert list(tuned.targets) == [name]
        with pytest.raises(
            sl.AttachError, match=f"'{name}' is shared with '(embed|lm_head).weight', which merging would change"
        ):
            tuned.merge()


@pytest.mark.parametrize("order", [1, -1])
def test_a_tied_table_shows_an_adapter_of_its_own_beside_one_of_both_places(order: int) -> None:
    model = seeded(0, Tied).double()
    table = model.embed.weight.detach().clone()
    for name, names in [("own", ["embed"]), ("both", ["embed", "lm_head"])][::order]:
        perturb(sl.attach(model, sl.lora(2), names, name=name, seed=0, dtype=torch.float64, at="weight"))
    own, both = sl.tuned(model, "own").delta("embed").T, sl.tuned(model, "both").delta("embed+lm_head")
    torch.testing.assert_close(model.embed.weight, table + own + both)
    torch.testing.assert_close(model.lm_head.weight, table + both)


ROWS = sl.Rows("embed", ("old", "new"), use=("new",), sizes=(6, 3))


@pytest.mark.parametrize(
    "names", [("embed", "both"), ("lm_head", "both"), ("both", "embed"), ("both", "lm_head"), ("both", ROWS)]
)
@pytest.mark.parametrize("first", [True, False], ids=["joins", "adds"])
def test_what_does_not_add_is_alone_at_every_place_of_a_tied_table(names: tuple[Any, Any], first: bool) -> None:
    """Whichever comes first; and once that has left, the other fits, and merging both of a kind that adds changes no output."""
    specs, model, x = (
        [sl.dora(sl.lora(2)), sl.lora(2)][:: 1 if first else -1],
        seeded(0, Tied).double(),
        torch.tensor([[1, 4, 8]]),
    )
    plain, before = model(x), dict(model.embed.__dict__)
    targets = [["embed", "lm_head"] if name == "both" else [name] for name in names]
    one = sl.attach(model, specs[0], targets[0], seed=0, dtype=torch.float64, name="one")
    with pytest.raises(sl.AttachError, match="has the adapter 'one', and adapters share a weight only where all are added"):
        sl.attach(model, specs[1], targets[1], seed=0, dtype=torch.float64, name="two")
    one.detach()
    other = sl.attach(model, specs[1], targets[1], seed=0, dtype=torch.float64, name="two")
    other.detach()
    handles = [sl.attach(model, sl.lora(2), own, seed=0, dtype=torch.float64, name=f"n{k}") for k, own in enumerate(targets)]
    for k, handle in enumerate(handles):
        perturb(handle, seed=k)
    y = model(x)
    whole = handles[names.index("both")]
    whole.merge()
    torch.testing.assert_close(model(x), y)
    for handle in handles:
        handle.detach()
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    assert model.embed.__dict__.keys() == before.keys()


def test_one_adapter_meets_no_place_of_a_tied_table_twice() -> None:
    for name in ("embed", "lm_head"):
        with pytest.raises(sl.AttachError, match=f"'(embed|lm_head).*' and '.*{name}.*' have rows of one weight in common"):
            sl.attach(seeded(0, Tied), sl.lora(2), ["embed+lm_head", name])


def test_patterns_and_the_joined_name_mean_the_tied_table() -> None:
    for targets in (["embed+lm_head"], r"embed|lm_head", ["lm_head", "embed", "body"]):
        assert "embed+lm_head" in sl.match(seeded(0, Tied), targets)
    assert sl.match(seeded(0, Tied), r".*(embed|body)") == ["embed", "body"]
    assert sl.match(seeded(0, Tied), ["embed", "lm_head"], exclude=["lm_head"]) == ["embed"]
    assert sl.match(seeded(0, Tied), "all-linear") == ["body", "lm_head"]


def test_untied_tables_of_one_shape_stay_two() -> None:
    model = seeded(0, Tied)
    model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    assert sl.match(model, ["embed", "lm_head"]) == ["embed", "lm_head"]


def test_a_transformers_model_with_a_tied_head(tmp_path: Path) -> None:
    transformers = library("transformers")
    config = transformers.GemmaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(config).eval()
    tuned = sl.attach(model, sl.lora(2), ["embed_tokens", "lm_head", "q_proj"], seed=0)
    assert next(iter(tuned.targets)) == "model.embed_tokens+lm_head"
    perturb(tuned)
    assert not tuned.held
    x = torch.arange(3, 12)[None]
    y = model(input_ids=x).logits
    tuned.save(tmp_path)
    tuned.bake()
    torch.testing.assert_close(model(input_ids=x).logits, y, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    other = transformers.GemmaForCausalLM(config).eval()
    sl.load(other, tmp_path)
    torch.testing.assert_close(other(input_ids=x).logits, y)


# --- PEFT's files ---------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding and a layer on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(NUM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embed(x))


def test_pefts_adapters_of_embeddings_are_read_and_written(tmp_path: Path) -> None:
    peft = library("peft")
    x = torch.tensor([[1, 4, 11], [5, 0, 1]])
    model = seeded(0, Words)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed", "body"]))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(noise(*p.shape, seed=len(name)))
    theirs.save_pretrained(tmp_path / "peft")
    tuned = sl.load(model, tmp_path / "peft")
    assert tuned.targets == {"embed": (DIM, NUM), "body": (DIM, DIM)}
    torch.testing.assert_close(model(x), theirs.eval()(x))
    tuned.save(tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(seeded(0, Words), tmp_path / "ours")
    torch.testing.assert_close(again(x), model(x))


def test_embeddings_are_named_among_what_is_supported() -> None:
    assert {"Embedding", "EmbeddingBag"} <= set(recognise.supported())
