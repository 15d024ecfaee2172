"""A budget in place of a rank: `superlora(..., budget=...)`, by itself and where a model is adapted."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import TARGETS, Tiny, noise, perturb

import superlora_tn as sl


def test_superlora_with_a_budget_is_a_value_that_shapes_turn_into_a_spec() -> None:
    choice = sl.superlora(order=3, groups=4, budget=10_000).choose([(768, 768)] * 24)
    assert choice.count == choice.spec.count([(768, 768)] * 24) <= 10_000
    assert choice.next_count is not None
    assert choice.next_count > 10_000


def test_attach_buys_the_largest_adapter_for_its_targets() -> None:
    tuned = sl.attach(Tiny(), sl.superlora(order=None, budget=300), TARGETS)
    dearer = sl.superlora(order=None, budget=300).choose(tuned.targets).next_count
    assert tuned.num_parameters <= 300 < (dearer or 0)


def test_an_impossible_budget_says_the_smallest_count() -> None:
    with pytest.raises(sl.SpecError, match="smallest possible count"):
        sl.attach(Tiny(), sl.superlora(budget=3), TARGETS)


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "order": None}, {"rank": 2, "groups": None}, {"rank": 2, "ratio": 0.5}])
def test_without_a_budget_every_setting_is_needed(settings: dict[str, object]) -> None:
    with pytest.raises(sl.SpecError, match=r"only with budget=\.\.\. may a setting be left free"):
        sl.superlora(**settings)


def test_a_flat_fold_takes_its_splits_from_the_kronecker() -> None:
    spec = sl.AdapterSpec(sl.Kronecker(sl.Tucker(2), sl.CP(2)), sl.FlatFold(order=3, groups=2))
    assert spec.fold.splits == 2
    assert spec == sl.AdapterSpec(sl.Kronecker(sl.Tucker(2), sl.CP(2)), sl.FlatFold(order=3, groups=2, splits=2))
    assert sl.AdapterSpec(sl.Tucker(2), sl.FlatFold()).fold.splits == 1


PRESETS = sorted(
    name
    for name, value in vars(sl).items()
    if inspect.isfunction(value)
    and value.__module__
    in ("superlora_tn.network.variants", "superlora_tn.network.relatives", "superlora_tn.network.convolved")
)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_drops_the_adapters_input_while_it_trains(name: str) -> None:
    """With nearly all dropped, the rest is scaled up to the same mean: two calls differ, none does in evaluation."""
    assert len(PRESETS) >= 30
    make = getattr(sl, name)
    known = inspect.signature(make).parameters
    settings = {"rank": 2} if "rank" in known else {}
    settings |= {"heads": 2} if name == "cara" else {}
    assert make(**settings).dropout == 0.0
    model = Tiny()
    tuned = sl.attach(model, make(**settings, dropout=0.5), ["q_proj", "k_proj"], seed=0)
    perturb(tuned)
    x = noise(2, 3, 12)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_budget_buys_with_dropout_and_rslora() -> None:
    bought = sl.superlora(order=3, budget=500, alpha=2.0, rslora=True, dropout=0.1).choose([(16, 16)] * 4).spec
    assert (bought.dropout, bought.rslora) == (0.1, True)
