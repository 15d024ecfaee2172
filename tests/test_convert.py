"""One adapter as another: exact wherever the other contains it, by the oracle, and else with the error it has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from strategies import SHAPES, Case, targets
from torch import Tensor

from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.maps import Fastfood
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, SpecError, TensorTrain, Tucker
from superlora_tn.files.own import Entry
from superlora_tn.network import relatives
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora, vera
from superlora_tn.tools.convert import convert
from superlora_tn.tools.decompose import Decomposition, FitError

Array = np.ndarray
# Sums of a few hundred products in float64 relative to the size of dW, made twice.
ROUNDING = 1e-13
STACKED = PhysicalFold("layer type out in")


def random_adapter(entry: Entry, first: int = 0) -> tuple[dict[str, Tensor], dict[str, Array]]:
    """Random nodes by the files' names, and dW of each weight by the oracle."""
    tensors, weights = {}, {}
    for k, bound in enumerate(Case(entry.spec, dict(entry.targets)).bound(), first):
        tensors |= {f"group{k}.{name}": torch.from_numpy(value) for name, value in bound.values.items()}
        weights |= bound.reference
    return tensors, weights


def by_oracle(found: Decomposition) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for k, bound in enumerate(Case(found.spec, dict(found.shapes)).bound()):
        weights |= bound.weights({n.name: found.tensors[f"group{k}.{n.name}"].numpy() for n in bound.graph.nodes})
    return weights


def apart(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """The relative distance of all weights together."""
    missed = sum(float(((found[n] - w) ** 2).sum()) for n, w in wanted.items())
    return float(np.sqrt(missed / sum(float((w**2).sum()) for w in wanted.values())))


CONTAINED = {
    "lora in a higher rank": (lora(2), lora(5)),
    "lora in another scale": (lora(2, alpha=4.0, rslora=True), lora(3, alpha=1.0)),
    "loha in lora of the product": (loha(2), lora(4)),
    "lokr in lora of the product": (lokr(1, factor=3), lora(3)),
    "lokr of both low in lora": (lokr(1, decompose_both=True), lora(1)),
    "lonkr in lora": (lonkr(1, 2), lora(1)),
    "krona in lora": (AdapterSpec(Kronecker(Dense(), Dense(), factor=2)), lora(12)),
    "lotr in a lora of each weight": (lotr(3), lora(3)),
    "lora of each weight in lotr": (lora(1), lotr(4)),
    "vera in lora": (vera(3), lora(3)),
    "vera in a higher rank": (vera(3), vera(5)),
    "lora in loha": (lora(2), loha(3)),
    "lora in abba": (lora(2), relatives.abba(2, 1)),
    "loha in a higher rank": (loha(2), loha(3)),
    "cp in a tucker": (AdapterSpec(CP(2), STACKED), AdapterSpec(Tucker(2), STACKED)),
    "cp in a higher rank": (AdapterSpec(CP(2), STACKED), AdapterSpec(CP(3), STACKED)),
    "tucker in a train": (AdapterSpec(Tucker(2), STACKED), AdapterSpec(TensorTrain((2, 4, 2)), STACKED)),
    "train in lora": (AdapterSpec(TensorTrain(2), STACKED), lora(2)),
    "lora of each weight in one cp": (lora(2), AdapterSpec(CP(8), STACKED)),
    "adalora's form in lora": (relatives.adalora(2), lora(2)),
    "lora in adalora's form": (lora(2), relatives.adalora(2)),
    "lora in blocks": (lora(2), relatives.gralora(2)),
    "share-lora in lora": (relatives.share_lora(2), lora(2)),
    "lorta in a higher rank": (lorta(2, 3, 2), lorta(3, 3, 2)),
    "lorta in dense": (lorta(2, 3, 5), dense(alpha=2.0)),
    "loha in dense": (loha(2), dense()),
    "a map with the same map": (lorta(2, 3, projection=Fastfood(0.5)), lorta(3, 3, projection=Fastfood(0.5))),
    "a map in dense": (lorta(2, 3, projection=Fastfood(0.5, tanh=True)), dense()),
    "lora in an elementwise product": (lora(1), AdapterSpec(Hadamard(Tucker(2), Kronecker(CP(1), Dense())))),
    "stacked lora by weight": (superlora(2, 2, "weight"), lora(2)),
    "flat fold in another number of groups": (AdapterSpec(CP(2), FlatFold(2, 4)), dense()),
}


@pytest.mark.parametrize("name", CONTAINED)
def test_what_contains_an_adapter_takes_it_in_exactly(name: str) -> None:
    source, to = CONTAINED[name]
    tensors, weights = random_adapter(Entry(source, SHAPES))
    found = convert(Entry(source, SHAPES), tensors, to)
    assert found.is_exact
    assert found.spec == to
    assert found.error < ROUNDING
    assert apart(by_oracle(found), weights) < ROUNDING


NOT_CONTAINED = {
    "lora in a lower rank": (lora(4), lora(2)),
    "loha in lora of its rank": (loha(2), lora(2)),
    "lora in lokr": (lora(2), lokr(2)),
    "loha in lotr": (loha(2), lotr(3)),
    "one map in another": (lorta(2, 3, projection=Fastfood(0.5)), lorta(2, 3, projection=Fastfood(0.5, seed=1))),
}


@pytest.mark.parametrize("name", NOT_CONTAINED)
def test_what_does_not_is_nearest_and_says_how_near(name: str) -> None:
    source, to = NOT_CONTAINED[name]
    tensors, weights = random_adapter(Entry(source, SHAPES))
    found = convert(Entry(source, SHAPES), tensors, to, steps=20, restarts=1)
    assert not found.is_exact
    assert 0 < found.error < 1
    assert found.error == pytest.approx(apart(by_oracle(found), weights), rel=1e-9)
    for weight, error in found.errors.items():
        assert error == pytest.approx(apart({weight: by_oracle(found)[weight]}, {weight: weights[weight]}), rel=1e-9)


GROWN = {
    "lora": (lora(2), lora(5)),
    "lora from rank 1": (lora(1), lora(3)),
    "loha": (loha(2), loha(4)),
    "lotr": (lotr(2), lotr(3)),
    "vera": (vera(2), vera(4)),
    "train": (AdapterSpec(TensorTrain((1, 2, 1)), STACKED), AdapterSpec(TensorTrain((2, 3, 2)), STACKED)),
    "lorta": (lorta(2, 3, 3), lorta(3, 3, 3)),
}


@pytest.mark.parametrize("name", GROWN)
def test_old_values_stay_and_what_is_new_can_train(name: str) -> None:
    small, large = GROWN[name]
    tensors, _ = random_adapter(Entry(small, SHAPES))
    found = convert(Entry(small, SHAPES), tensors, large)
    assert {f.start for f in found.fits} == {"the same network"}
    for key, value in tensors.items():
        assert torch.equal(found.tensors[key][tuple(slice(0, s) for s in value.shape)], value)
    for bound in Case(large, dict(SHAPES)).bound():
        # What is new beyond the old corner is zero on one node of each bond and not on the others, so that one has a gradient.
        nodes = {n.name: found.tensors[f"group0.{n.name}"] for n in bound.graph.nodes}
        moved = {n: float(v.abs().sum()) for n, v in nodes.items()}
        old = {n: float(tensors[f"group0.{n}"].abs().sum()) for n in nodes}
        assert any(moved[n] > old[n] for n in nodes)
        break


def test_several_declarations_become_one() -> None:
    shapes = targets(2, 2, (12, 18))
    first, second = dict(list(shapes.items())[:2]), dict(list(shapes.items())[2:])
    entries = [Entry(lora(2), first), Entry(loha(2, alpha=3.0), second)]
    tensors, weights = random_adapter(entries[0])
    more, other = random_adapter(entries[1], first=2)
    found = convert(entries, tensors | more, lora(4))
    assert list(found.shapes) == list(shapes)
    assert apart(by_oracle(found), weights | other) < ROUNDING
    assert [f.start for f in found.fits] == ["the same network"] * 2 + ["singular values"] * 2


def test_nodes_that_are_missing_or_of_another_shape_are_named() -> None:
    entry = Entry(lora(2), {"w": (3, 4)})
    with pytest.raises(FitError, match=r"no tensor 'group0.factor_in'.*\(4, 2\)"):
        convert(entry, {"group0.factor_out": torch.zeros(3, 2)}, lora(3))
    with pytest.raises(FitError, match=r"'group0.factor_out' is \(3, 1\); its declaration has \(3, 2\)"):
        convert(entry, {"group0.factor_out": torch.zeros(3, 1), "group0.factor_in": torch.zeros(4, 2)}, lora(3))


@pytest.mark.parametrize("to", ["lora", None, lora], ids=["a name", "None", "a maker"])
def test_what_is_no_declaration_is_refused(to: object) -> None:
    entry = Entry(lora(2), {"w": (3, 4)})
    nodes = {"group0.factor_out": torch.zeros(3, 2), "group0.factor_in": torch.zeros(4, 2)}
    with pytest.raises(SpecError, match=r"convert was given to=.*; give an AdapterSpec such as superlora_tn\.lora\(8\)"):
        convert(entry, nodes, to)  # type: ignore[arg-type]


def test_an_adapter_at_its_start_stays_there() -> None:
    entry = Entry(lora(2), SHAPES)
    tensors, _ = random_adapter(entry)
    zero = {k: torch.zeros_like(v) if "factor_out" in k else v for k, v in tensors.items()}
    for to in (lora(4), lotr(2), loha(2)):
        found = convert(entry, zero, to)
        assert found.error == 0.0
        assert not any(bool(d.any()) for d in found.deltas().values())
