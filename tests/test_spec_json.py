"""A spec is a value: it survives JSON, pickle and copy unchanged, and reads nothing it does not know."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from strategies import SHAPES, Case, cases
from test_equals_dense import VARIANTS

from superlora_tn.declare.codec import LATER
from superlora_tn.declare.maps import Fastfood, Shuffle
from superlora_tn.declare.parts import CP, Hadamard, Kronecker, Part, SpecError, TensorTrain, Tucker
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import lokr, lora, lorta, vera


def by_json(spec: AdapterSpec) -> AdapterSpec:
    return AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False)))


@given(cases())
def test_a_random_spec_survives_json(case: Case) -> None:
    back = by_json(case.spec)
    assert back == case.spec
    assert hash(back) == hash(case.spec)
    assert repr(back) == repr(case.spec)
    assert back.lay_out(case.shapes) == case.spec.lay_out(case.shapes)


@pytest.mark.parametrize("spec", VARIANTS, ids=repr)
def test_every_variant_survives_json_pickle_and_copy(spec: AdapterSpec) -> None:
    for back in (by_json(spec), pickle.loads(pickle.dumps(spec)), copy.copy(spec), copy.deepcopy(spec)):
        assert back == spec
        assert hash(back) == hash(spec)
        assert back.count(SHAPES) == spec.count(SHAPES)


def test_specs_that_differ_are_unequal() -> None:
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert lora(4) != lora(4, alpha=1) != lora(4, alpha=1, rslora=True)
    assert AdapterSpec(CP(4)) != AdapterSpec(CP(4, dense_if_large=True))
    assert lorta(2, projection=Shuffle(1)) != lorta(2, projection=Shuffle(2)) != lorta(2, projection=Fastfood(1.0, 2))


@pytest.mark.parametrize(
    "part", [CP(9), Tucker((9, 2)), TensorTrain(9), Kronecker(CP(2), Hadamard(CP(9), Tucker(2)))], ids=repr
)
def test_a_part_saved_before_ranks_were_capped_refuses_them_still(part: Part) -> None:
    data = json.loads(json.dumps(AdapterSpec(part).to_dict()))
    for path in places(data):
        at(data, path).pop("over", None)
    assert AdapterSpec.from_dict(data) == AdapterSpec(part)


def test_a_spec_is_frozen() -> None:
    spec = lora(4)
    for field in fields(spec):
        with pytest.raises(FrozenInstanceError):
            setattr(spec, field.name, None)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every dict inside, by its path."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    own = [path] if isinstance(data, dict) else []
    return own + [p for key, value in inner for p in places(value, (*path, key))]


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


NESTED = [lokr(2, alpha=3), vera(3), lorta(2, 3, 2, Fastfood(0.5, 7, True))]


@pytest.mark.parametrize("spec", NESTED, ids=repr)
def test_an_unknown_key_anywhere_is_refused(spec: AdapterSpec) -> None:
    for path in places(spec.to_dict()):
        data = json.loads(json.dumps(spec.to_dict()))
        at(data, path)["surprise"] = 1
        with pytest.raises(SpecError, match="surprise"):
            AdapterSpec.from_dict(data)


@pytest.mark.parametrize("spec", NESTED, ids=repr)
def test_a_missing_key_anywhere_is_refused(spec: AdapterSpec) -> None:
    for path in places(spec.to_dict()):
        for key in at(spec.to_dict(), path):
            data = json.loads(json.dumps(spec.to_dict()))
            holder = at(data, path)
            value = holder.pop(key)
            if key in LATER.get(holder.get("kind"), ()):
                # Saved before the field was there: its default is what was meant.
                default = {"multiple": 1, "order": "BHPGH", "scaling": "variance", "over": "refuse", "kernel": None}[key]
                assert (AdapterSpec.from_dict(data) == spec) == (value == default)
                continue
            with pytest.raises(SpecError):
                AdapterSpec.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "lora", {}, {"kind": "CP", "rank": 2}])
def test_what_is_no_spec_is_refused(data: Any) -> None:
    with pytest.raises(SpecError):
        AdapterSpec.from_dict(data)


@pytest.mark.parametrize("value", [True, "4", -1, 0, 1.5, None, [], {"kind": "os.system"}])
def test_a_wrong_value_is_refused(value: Any) -> None:
    data = json.loads(json.dumps(lora(4).to_dict()))
    data["network"]["rank"] = value
    with pytest.raises(SpecError):
        AdapterSpec.from_dict(data)


def test_the_scale_is_alpha_over_rank_or_over_its_root() -> None:
    assert lora(4, alpha=8).scale == 2.0
    assert lora(4, alpha=8, rslora=True).scale == 4.0
    assert lora(4).scale == 1.0
