"""`verify` holds where it should, fails where it should, and its failing lines reproduce when they are pasted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorly as tl
import torch

import superlora_tn as sl
from superlora_tn.adapter import PhysicalAdapter
from superlora_tn.nodes import SpecError
from superlora_tn.verification import (
    Certificate,
    Row,
    VerifyError,
    carry,
    cases,
    check,
    differs,
    peers,
    run,
    verify,
    verify_peers,
    verify_reductions,
)
from superlora_tn.verification.source import source

FEW = 6
PEERS = [name for name in ("peft", "lycoris") if peers.is_installed(name)]
NETWORK = sl.AdapterSpec(sl.Network("(o1 o2) (i1 i2)", {"r": 2}, w1="o1 i1", up="o2 r", down="r i2"), alpha=3)


def delta(params: dict[str, np.ndarray]) -> np.ndarray:
    return np.kron(params["w1"], params["up"] @ params["down"])


def wrong_delta(params: dict[str, np.ndarray]) -> np.ndarray:
    return np.kron(params["up"] @ params["down"], params["w1"])


def failing(certificate: Certificate) -> set[tuple[str, str]]:
    return {(row.claim, row.reference.split()[0]) for row in certificate.failures}


def assert_reproduces(row: Row, scope: dict[str, Any] | None = None) -> None:
    assert "\n" not in row.line
    with pytest.raises(AssertionError, match="times the rounding bound"):
        exec(row.line, dict(scope or {}))


# --- what holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "lotr", "lorta", "vera"])
def test_a_preset_holds_against_everything_that_has_it(name: str) -> None:
    certificate = verify(name, examples=FEW)
    assert certificate, str(certificate)
    tried = {row.reference.split()[0] for row in certificate.rows if row.status == "held"}
    assert {"-", "formula"} <= tried
    assert not set(PEERS) & ({"lora": set(PEERS), "lokr": set(PEERS)}.get(name, set()) - tried)
    assert all(row.tried >= 1 and row.worst <= 1 for row in certificate.rows if row.status == "held")


def test_a_network_of_ones_own_holds_with_a_function_of_ones_own() -> None:
    certificate = verify(NETWORK, against=["formula", delta], examples=FEW)
    assert certificate, str(certificate)
    assert ("dW", "delta") in {(row.claim, row.reference) for row in certificate.rows}


def test_a_function_sees_the_nodes_of_a_group_and_gives_all_its_weights() -> None:
    def lotr(params: dict[str, np.ndarray]) -> np.ndarray:
        return np.einsum("or,mrs,is->moi", params["factor_out"], params["core"], params["factor_in"])

    assert verify(sl.lotr(2, alpha=4), against=lotr, examples=FEW)


def test_given_shapes_are_the_ones_tried() -> None:
    seen = set()

    def spy(params: dict[str, np.ndarray]) -> np.ndarray:
        seen.add((params["w1"].size, params["up"].shape[0]))
        return delta(params)

    assert verify(NETWORK, against=spy, examples=FEW, shapes=[(20, 28)])
    assert seen == {(16, 5)}


def test_reductions_hold() -> None:
    certificate = verify_reductions(examples=FEW)
    assert certificate, str(certificate)
    assert len(certificate.rows) >= 16
    assert certificate.count("held") == len(certificate.rows)


def test_equal_seeds_give_equal_certificates() -> None:
    assert verify("lonkr", "formula", 4, seed=3) == verify("lonkr", "formula", 4, seed=3)


def test_verifying_leaves_global_state_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), tl.get_backend(), torch.is_grad_enabled()
    verify("lora", examples=3)
    verify_peers()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), tl.get_backend(), torch.is_grad_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- what does not hold ---------------------------------------------------------------------------------------------


def test_a_wrong_function_fails_with_a_line_that_reproduces() -> None:
    certificate = verify(NETWORK, against=wrong_delta, examples=20)
    assert not certificate
    [row] = certificate.failures
    assert (row.claim, row.reference) == ("dW", "wrong_delta")
    assert row.line in str(certificate)
    assert "DOES NOT HOLD" in str(certificate)
    assert_reproduces(row, {"wrong_delta": wrong_delta})
    fixed = row.line.replace("wrong_delta", "delta")
    exec(fixed, {"delta": delta})  # the same case holds against the right function


def test_a_function_of_a_wrong_shape_is_reported_not_raised() -> None:
    certificate = verify(NETWORK, against=lambda params: params["w1"], examples=4, shapes=[(6, 8)])
    assert not certificate
    assert "the reference gave the shape" in certificate.failures[0].detail


def test_a_dropped_scale_in_the_library_is_caught_by_each_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PhysicalAdapter.delta
    monkeypatch.setattr(PhysicalAdapter, "delta", lambda self, t: right(self, t) / self.scale)
    certificate = verify(sl.lora(2, alpha=6.0), examples=FEW)
    assert not certificate
    assert {"routes agree", "dW"} <= {claim for claim, _ in failing(certificate)}
    assert {reference for claim, reference in failing(certificate)} >= {"formula", "tensorly", *PEERS}
    for row in certificate.failures:
        if row.claim == "dW":
            assert_reproduces(row)


def test_a_library_that_raises_fails_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, target: str) -> torch.Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(PhysicalAdapter, "delta", broken)
    row = next(r for r in verify("dense", "formula", 3).failures if r.claim == "dW")
    assert row.detail == "RuntimeError: no memory"
    assert "check(" in row.line


def test_a_node_that_never_learns_is_caught() -> None:
    still = sl.AdapterSpec(sl.Network("o i", {"r": 2}, b="o r", a="r i"), alpha=0.0)
    certificate = verify(still, against="-", examples=8)
    assert ("every node learns in two steps", "-") in failing(certificate)


# --- each reference is consulted ------------------------------------------------------------------------------------


def one_entry_off(original: Callable[..., Any]) -> Callable[..., Any]:
    def altered(*arguments: Any, **options: Any) -> Any:
        carried = original(*arguments, **options)
        name = next(iter(carried.tensors))
        carried.tensors[name] = carried.tensors[name].copy()
        carried.tensors[name].flat[0] += 0.5
        return carried

    return altered


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "spec", [sl.lora(2, alpha=3, rslora=True), sl.loha(2), sl.lokr(1, decompose_both=True)], ids=["lora", "loha", "lokr"]
)
def test_one_entry_of_a_peers_parameters_off_fails(spec: sl.AdapterSpec, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(spec, peer, 3, shapes=[(12, 18)])
    monkeypatch.setattr(peers, "to_peft", one_entry_off(carry.to_peft))
    certificate = verify(spec, peer, 3, shapes=[(12, 18)])
    assert len(failing(certificate)) == 2  # dW and the layer's output
    assert {reference for _, reference in failing(certificate)} == {peer}


def test_veras_frozen_matrices_reach_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(peers, "to_peft", one_entry_off(carry.to_peft))
    assert len(failing(verify(sl.vera(2), "peft", 3))) == 2


def test_tensorlys_own_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorly import cp_tensor

    right = cp_tensor.cp_to_tensor
    monkeypatch.setattr(cp_tensor, "cp_to_tensor", lambda *a: right(*a) * 1.0001)
    assert failing(verify(sl.lora(2), "tensorly", 3)) == {("dW", "tensorly")}


def test_the_formula_is_consulted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.Sized.formula
    altered: Callable[..., Any] = lambda self, v=None: {t: w * 1.0001 for t, w in right(self, v).items()}  # noqa: E731
    monkeypatch.setattr(cases.Sized, "formula", altered)
    assert {("dW", "formula"), ("forward", "formula"), ("gradients", "formula")} <= failing(verify("lotr", "formula", 4))


# --- peers ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(PEERS) < 2, reason="needs PEFT and LyCORIS")
def test_the_known_differences_of_peers_are_shown_with_the_oracles_value() -> None:
    factor = {"merge_to": 3.0, "get_diff_weight": 3.0, "both splits dense": 4 / 3, "out_proj": 2.0}
    for one in differs.DIFFERENCES:
        theirs, formula = one.show()
        expected = [value for word, value in factor.items() if word in one.property]
        for value in expected:
            np.testing.assert_allclose(theirs, value * formula, rtol=1e-9, err_msg=one.property)
        assert expected or not np.array_equal(theirs, formula)
    certificate = verify_peers()
    assert certificate.count("peer differs") == len(differs.DIFFERENCES)
    assert not certificate.failures
    assert "oracle" in str(certificate)


def test_what_is_not_installed_is_skipped_and_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: name == "tensorly")
    certificate = verify("lora", examples=3)
    assert certificate
    skipped = {row.reference for row in certificate.rows if row.status == "skipped"}
    assert skipped == {"peft", "lycoris"}
    assert not verify("lora", against="peft", examples=3)


def test_a_named_reference_without_the_method_does_not_hold() -> None:
    certificate = verify(sl.lotr(2), against="tensorly", examples=3)
    assert certificate
    assert not verify(NETWORK, against="tensorly", examples=3)


# --- the certificate, the command, the messages ---------------------------------------------------------------------


def test_a_certificate_without_a_row_that_held_is_false() -> None:
    skipped = Row("x", "dW", "peft", "skipped")
    assert not Certificate((), 1, 0)
    assert not Certificate((skipped,), 1, 0)
    assert Certificate((skipped, Row("x", "dW", "formula", "held", 1)), 1, 0)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dense"], 2) == 0
    printed = capsys.readouterr()
    assert "HOLDS" in printed.out
    assert "[1/1] dense" in printed.err
    assert run(["dense"], 2, as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["holds"] is True
    assert {"subject", "claim", "reference", "status", "tried", "worst", "line"} <= set(data["rows"][0])


def test_the_command_fails_where_something_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = PhysicalAdapter.delta
    monkeypatch.setattr(PhysicalAdapter, "delta", lambda self, t: right(self, t) + 1)
    assert run(["dense"], 2) == 1
    assert "FAILED" in capsys.readouterr().err


def test_wrong_requests_say_what_would_be_right() -> None:
    with pytest.raises(SpecError, match=r"no variant 'lorra'.*lora"):
        verify("lorra")
    with pytest.raises(SpecError, match=r"no reference 'petf'.*peft"):
        verify("lora", against="petf")
    with pytest.raises(SpecError, match="examples=0"):
        verify("lora", examples=0)
    with pytest.raises(SpecError, match="no property 'dV'"):
        check(NETWORK, {"w": (4, 4)}, "dV")


def test_a_missing_hypothesis_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(VerifyError, match=r"superlora_tn\[verify\]"):
        verify("lora")


SPECS = [
    sl.lokr(2, factor=4, decompose_both=True, alpha=3, rslora=True),
    sl.lorta(2, 3, 2, sl.Fastfood(0.3, 5, True)),
    sl.superlora(2, groups="weight"),
    sl.AdapterSpec(sl.Hadamard(sl.TensorTrain((2, 3)), sl.Tucker((1, 2), "out in")), sl.PhysicalFold("layer head out in", 2)),
    sl.AdapterSpec(sl.Network("o i", {"r": 2}, b=sl.Node("o r", init="zeros"), **{"lambda": sl.Node("r i", trainable=False)})),
    NETWORK,
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_source_of_a_declaration_makes_it(spec: sl.AdapterSpec) -> None:
    assert eval(source(spec), {"sl": sl}) == spec


def test_the_scale_is_computed_apart_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sl.AdapterSpec, "scale", property(lambda self: (self.alpha or 1.0) / 2))
    assert ("dW", "formula") in failing(verify(sl.lora(3, alpha=6.0, rslora=True), "formula", 6))


@pytest.mark.skipif("peft" not in PEERS, reason="needs PEFT")
def test_a_split_that_peft_does_not_make_fails() -> None:
    spec = sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.CP(1, dense_if_large=True), factor=3))
    assert verify(spec, "peft", 3, shapes=[(12, 18)])
    carried = carry.to_peft(spec, cases.Case(spec, (("w", (12, 18)),)).groups()[0].values)
    carried.settings["factor"] = 2
    with pytest.raises(peers.Misfit, match=r"lacks lokr_w1\.default of shape"):
        peers.peft_layer(spec, carried, cases.linear(torch.zeros(12, 18), torch.float64))
