"""`verify` on folds with kernels, experts and rounded sides, and on weights in another order than a model has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import superlora_tn as sl
from superlora_tn.declare.parts import SpecError
from superlora_tn.verification import verify
from superlora_tn.verification.claims import counts
from superlora_tn.verification.references import textbook

NETWORK = sl.Network("(a b) i k", {"r": 2}, A="a r", B="r b k", C="r i")
KERNELS = {
    "LoRA, open": sl.conv_lora(2),
    "LoKr, open": sl.conv_lokr(1, tucker=True),
    "LoKr, given": sl.AdapterSpec(sl.conv_lokr(2, decompose_both=True).network, sl.PhysicalFold("out in kernel", kernel=(3,))),
    "kernel within in": sl.AdapterSpec(sl.lokr(2).network, sl.PhysicalFold(kernel=(3, 3))),
    "three dense parts within in": sl.AdapterSpec(sl.lonkr(1).network, sl.PhysicalFold(kernel=(2, 2))),
    "no small divisor": sl.AdapterSpec(sl.TensorTrain(1, over="cap"), sl.PhysicalFold("out in kd kh kw", kernel=(5, 5))),
    "kernel first": sl.AdapterSpec(sl.TensorTrain(1, over="cap"), sl.PhysicalFold("in kh kw out")),
    "DoRA": sl.dora(sl.conv_lora(1)),
    "notation": sl.AdapterSpec(NETWORK, sl.PhysicalFold("out in kernel")),
}
EXPERTS = {f"l.{j}.experts.{k}.{t}": (4, 6) for k in range(3) for j in range(2) for t in ("up", "down")}


@pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS)
def test_a_declaration_with_a_kernel_holds(spec: sl.AdapterSpec) -> None:
    certificate = verify(spec, "formula", examples=4)
    assert certificate, str(certificate)


def test_given_weights_choose_among_the_kernels_of_an_open_declaration() -> None:
    certificate = verify(sl.conv_lora(2), "formula", examples=4, shapes=[(4, 6)])
    assert certificate, str(certificate)
    assert all(row.tried for row in certificate.rows if row.status == "held")


def test_a_kernel_is_not_split_and_stays_with_the_last_part() -> None:
    """By hand: channels 4 = 2 x 2 and outputs 6 = 2 x 3, the kernel of 3 with the second factor."""
    fold, shapes = sl.PhysicalFold("out in kernel", kernel=(3,)), {"w": (6, 12)}
    spec = sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense()), fold)
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 2)), generator.standard_normal((3, 2, 3))
    whole = np.einsum("ab,cdk->acbdk", first, second).reshape(6, 12)
    np.testing.assert_allclose(textbook.delta(spec, shapes, {"k1_weight": first, "k2_weight": second})["w"], whole, rtol=1e-13)
    assert counts.group_count(spec, shapes) == 2 * 2 + 3 * 2 * 3 == spec.count(shapes)


@pytest.mark.parametrize("modes", ["expert out in", "layer expert type out in", "in expert out"])
def test_weights_of_experts_hold_drawn_and_given(modes: str) -> None:
    spec = sl.AdapterSpec(sl.CP(1), sl.PhysicalFold(modes))
    for shapes in (None, EXPERTS):
        certificate = verify(spec, None, examples=3, shapes=shapes)
        assert certificate, str(certificate)


def test_weights_need_not_come_in_the_models_order() -> None:
    shapes = {"b.0": (4, 6), "a": (4, 6), "b.1": (4, 6)}
    for spec in (sl.lotr(2), sl.dora(sl.lotr(1))):
        certificate = verify(spec, "formula", examples=3, shapes=shapes)
        assert certificate, str(certificate)


def test_rounded_sides_are_counted() -> None:
    spec = sl.AdapterSpec(sl.CP(2), sl.FlatFold(2, multiple=4))
    assert verify(spec, "formula", examples=4)
    assert counts.group_count(spec, {"w": (5, 5)}) == 2 * (8 + 8) == spec.count([(5, 5)])


def test_a_fault_behind_a_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula does not follow the library: where its columns are turned, the two differ."""
    whole = textbook.physical_weight

    def turned(*arguments: Any) -> Any:
        found = whole(*arguments)
        return found[:, ::-1] if found.shape[1] > 1 else found

    monkeypatch.setattr(textbook, "physical_weight", turned)
    certificate = verify(sl.conv_lora(1), "formula", examples=6)
    assert ("dW", "formula") in {(row.claim, row.reference) for row in certificate.failures}


@pytest.mark.parametrize("shapes", [[], {}])
def test_no_weights_are_not_taken_for_any(shapes: Any) -> None:
    with pytest.raises(SpecError, match="verify was given no weight"):
        verify(sl.lora(1), "formula", examples=1, shapes=shapes)


def test_sizes_are_whole_numbers() -> None:
    """A size that is none was cut to one, and a count said of another weight."""
    for wrong in ([(3.9, 4)], [("3", "4")]):
        with pytest.raises(SpecError, match="the weights' shapes were given as"):
            sl.lora(1).count(wrong)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="the weights' shapes were given as"):
            verify(sl.lora(1), examples=1, shapes=wrong)  # type: ignore[arg-type]
    for odd in ({"w": 3}, {"w": (3.5, 4)}, {"w": None}):
        for ask in (sl.lora(1).count, lambda shapes: sl.suggest(shapes, 100, variants=["lora"])):
            with pytest.raises(SpecError, match=r"target 'w' has the shape .*whole numbers"):
                ask(odd)  # type: ignore[arg-type, operator]
    assert sl.lora(1).count([(np.int64(3), np.int64(4))]) == 3 + 4
