"""Nodes that hold the base's weight or its singular vectors: values, gradients, files, resets, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from optional import library
from torch import nn

import superlora_tn as sl
from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.model.targets import Target
from superlora_tn.tools.decompose import FitError

OUT, IN, R = 12, 10, 3
COUNTS = {"hira": R * (OUT + IN), "lora_xs": R * R, "svft": R}


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, OUT)).double()


def attached(spec: sl.AdapterSpec, seed: int = 0) -> tuple[nn.Sequential, sl.Tuned]:
    model = layers(seed)
    tuned = sl.attach(model, spec, ["0"], dtype=torch.float64, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for node in tuned.parameters():
            node.copy_(torch.randn(node.shape, generator=generator, dtype=torch.float64))
    return model, tuned


def oracle(name: str, weight: np.ndarray, nodes: dict[str, np.ndarray]) -> np.ndarray:
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    u, s, v = u[:, :R], s[:R], v[:R]
    if name == "hira":
        return weight * (nodes["B"] @ nodes["A"])
    middle = np.diag(s) @ nodes["R"] if name == "lora_xs" else np.diag(nodes["m"])
    # The signs of singular vectors are free, and the library's own may differ: compare with its pairs turned alike.
    turn = np.diag(np.sign((u * nodes["U"]).sum(0)))
    return u @ turn @ middle @ turn @ v


@pytest.mark.parametrize("name", COUNTS)
def test_dw_is_made_of_the_layers_own_weight(name: str) -> None:
    model, tuned = attached(getattr(sl, name)(R))
    assert sum(p.numel() for p in tuned.parameters()) == COUNTS[name]
    adapter = next(iter(tuned._adapters()))
    nodes = {n.name: t.detach().numpy() for n, t in zip(adapter.graph.nodes, adapter.tensors(), strict=True)}
    expected = oracle(name, model[0].weight.detach().numpy(), nodes)
    # Singular vectors of gaps near 1 are exact to about 1e-14 in float64.
    np.testing.assert_allclose(tuned.delta("0").detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("route", ["apply", "delta"])
def test_hira_equals_pefts_layer(route: str) -> None:
    peft = library("peft")
    model = layers()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.HiraConfig(r=R, target_modules=["0"]))
    tuned = sl.attach(model, sl.hira(R), ["0"], dtype=torch.float64, route=route)
    layer = theirs.base_model.model[0]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((R, IN), (OUT, R)))
    own = {name.rpartition("node_")[2]: p for name, p in tuned.named_parameters()}
    assert set(own) == {"A", "B"}
    with torch.no_grad():
        for value, ours, his in ((a, own["A"], layer.hira_A["default"]), (b, own["B"], layer.hira_B["default"])):
            his.data = value.clone()
            ours.copy_(value)
    assert tuned.num_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    x = torch.randn(5, IN, generator=generator, dtype=torch.float64)
    y, expected = model(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)  # the same float64 sums in another order
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(own["A"].grad, layer.hira_A["default"].grad, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(own["B"].grad, layer.hira_B["default"].grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", COUNTS)
def test_a_saved_adapter_keeps_what_it_rests_on(name: str, tmp_path) -> None:
    model, tuned = attached(getattr(sl, name)(R))
    delta = tuned.delta("0").detach().clone()
    tuned.save(tmp_path)
    other = layers(seed=5)
    loaded = sl.load(other, tmp_path)
    assert torch.equal(loaded.delta("0"), delta)  # of the weight it was trained on
    tuned.merge()
    assert torch.equal(tuned.delta("0"), delta)
    tuned.unmerge()
    tuned.reset_parameters()
    assert not tuned.delta("0").any()
    assert model[0].weight.equal(layers()[0].weight)


def test_loading_looks_at_no_weight(tmp_path, monkeypatch) -> None:
    _, tuned = attached(sl.lora_xs(R))
    tuned.save(tmp_path)

    def refuse(self: Target) -> torch.Tensor:
        raise AssertionError(self.name)

    monkeypatch.setattr(Target, "weight", refuse)
    assert torch.equal(sl.load(layers(), tmp_path).delta("0"), tuned.delta("0"))
    with pytest.raises(AssertionError):
        sl.attach(layers(), sl.lora_xs(R), ["0"])


def test_reset_writes_the_weight_again() -> None:
    model, tuned = attached(sl.hira(R))
    adapter = next(iter(tuned._adapters()))
    assert torch.equal(adapter.tensors()[0], model[0].weight)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.equal(adapter.tensors()[0], model[0].weight)
    tuned.reset_parameters()
    assert torch.equal(adapter.tensors()[0], model[0].weight)


def test_weights_that_share_a_network_keep_their_own_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(IN, OUT) for _ in range(3))).double()
    nodes = {
        "W": sl.Node("m o i", init="base", trainable=False),
        "B": sl.Node("o r", init="zeros"),
        "A": sl.Node("m r i"),
    }
    spec = sl.AdapterSpec(sl.Network("m o i", {"r": 2}, **nodes), PhysicalFold("member out in"))
    tuned = sl.attach(model, spec, ["0", "1", "2"], dtype=torch.float64, seed=0)
    own = {name.rpartition("node_")[2]: p for name, p in tuned.named_parameters()}
    with torch.no_grad():
        own["B"].normal_()
    for k in range(3):
        torch.testing.assert_close(tuned.delta(str(k)), model[k].weight * (own["B"] @ own["A"][k]), rtol=1e-12, atol=1e-13)


def test_split_modes_hold_the_weight_too() -> None:
    nodes = {"W": sl.Node("i1 o i2", init="base", trainable=False), "c": sl.Node("i1 o", init="zeros")}
    model = layers()
    tuned = sl.attach(model, sl.AdapterSpec(sl.Network("o (i1 i2)", {"i1": 2, "i2": 5}, **nodes)), ["0"], dtype=torch.float64)
    with torch.no_grad():
        (c,) = tuned.parameters()
        c.normal_()
    torch.testing.assert_close(tuned.delta("0"), model[0].weight * c.t().repeat_interleave(5, 1), rtol=1e-12, atol=0)


def test_a_declaration_survives_json() -> None:
    for name in COUNTS:
        spec = getattr(sl, name)(R)
        assert sl.AdapterSpec.from_dict(spec.to_dict()) == spec


def test_a_base_without_values_is_asked_for() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, OUT))
    tuned = sl.attach(model, sl.hira(R), ["0"])
    with pytest.raises(sl.AttachError, match="load the base first"):
        tuned.to_empty(device="cpu")
    model.to_empty(device="cpu")
    nn.init.ones_(model[0].weight)
    tuned.reset_parameters(seed=0)
    assert next(iter(tuned._adapters())).tensors()[0].eq(1).all()


def test_pefts_plugin_reads_the_base_too() -> None:
    peft = library("peft")
    from superlora_tn.peft import SuperLoraConfig

    model = layers()
    wrapped = peft.get_peft_model(model, SuperLoraConfig(spec=sl.hira(R), target_modules=["0"]))
    held = [buffer for name, buffer in wrapped.named_buffers() if name.endswith("node_W")]
    assert len(held) == 1
    assert torch.equal(held[0].double(), layers()[0].weight)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({"W": sl.Node("o r", init="base", trainable=False), "A": "r i"}, "holds each weight's 'base'"),
        ({"U": sl.Node("o i", init="left", trainable=False), "A": "r i", "B": "r o"}, "holds each weight's 'left'"),
        ({"U": sl.Node("o r", init="left", trainable=False), "A": "r i"}, "choose fewer"),
    ],
)
def test_nodes_that_do_not_fit_the_base_are_refused(nodes, words) -> None:
    spec = sl.AdapterSpec(sl.Network("o i", {"r": 11}, **nodes))
    with pytest.raises(sl.SpecError, match=words):
        spec.count({"w": (OUT, IN)})


def test_what_has_no_base_is_refused() -> None:
    with pytest.raises(sl.SpecError, match="trainable=False"):
        sl.Node("o i", init="base")
    with pytest.raises(FitError, match="give it by start="):
        sl.decompose({"w": torch.ones(OUT, IN)}, sl.hira(R))
    flat = sl.AdapterSpec(sl.Network("a b", W=sl.Node("a b", init="base", trainable=False), c="a"), sl.FlatFold(2))
    with pytest.raises(sl.SpecError, match="flat fold"):
        flat.count({"w": (OUT, IN)})


def test_a_given_base_is_fitted_on() -> None:
    weight, known = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).double(), torch.ones(OUT, 1).double()
    delta = weight * (known @ torch.arange(1.0, IN + 1, dtype=torch.float64)[None])
    found = sl.decompose({"w": delta}, sl.hira(1), start={"group0.W": weight})
    assert found.error < 1e-6  # alternating least squares of rank 1 on a dW that has it


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_base_is_a_part_anywhere_in_an_elementwise_product(order: int, tmp_path) -> None:
    parts = [(sl.Base(), sl.CP(R)), (sl.CP(R), sl.Base()), (sl.Base(), sl.Dense(), sl.Base())][order]
    spec = sl.AdapterSpec(sl.Hadamard(*parts))
    assert sl.AdapterSpec.from_dict(spec.to_dict()) == spec
    assert spec.count([(OUT, IN)]) == (OUT * IN if order == 2 else R * (OUT + IN))
    fresh = sl.attach(layers(), spec, ["0"], seed=1)
    assert not fresh.delta("0").any()  # a trained node starts at zero, not the base
    assert [name for name, node in fresh.named_parameters() if "base" in name] == []
    model, tuned = attached(spec)
    weight = model[0].weight.detach().numpy()
    adapter = next(iter(tuned._adapters()))
    values = {n.name: t.detach().numpy() for n, t in zip(adapter.graph.nodes, adapter.tensors(), strict=True)}
    own = [value for name, value in values.items() if "base" not in name]
    low = own[0] if order == 2 else own[0] @ own[1].T
    expected = low * weight ** (2 if order == 2 else 1)
    # Two or three products of float64 an element.
    np.testing.assert_allclose(tuned.delta("0").detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    tuned.save(tmp_path)
    again = layers()
    sl.load(again, tmp_path)
    x = torch.randn(5, IN, dtype=torch.float64)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (sl.AdapterSpec(sl.Base()), "no trainable node"),
        (sl.AdapterSpec(sl.Kronecker(sl.Base(), sl.CP(1))), "holds each weight's 'base'"),
        (sl.AdapterSpec(sl.Hadamard(sl.Base(), sl.CP(2)), sl.FlatFold(2)), "a flat fold knows no weights apart"),
    ],
)
def test_a_base_that_is_no_whole_weight_is_refused(spec: sl.AdapterSpec, words: str) -> None:
    with pytest.raises(sl.SpecError, match=words):
        spec.count([(OUT, IN)])
