"""`verify` holds where it should, fails where it should, and its failing lines reproduce when they are pasted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import strategies as st

import superlora_tn as sl
from superlora_tn.declare.parts import SpecError
from superlora_tn.declare.source import source
from superlora_tn.model import joins as model_joins
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.update import base, based, node_maps
from superlora_tn.update.physical import PhysicalAdapter
from superlora_tn.verification import (
    Certificate,
    Row,
    VerifyError,
    cases,
    check,
    checks,
    draws,
    engine,
    run,
    verify,
    verify_peers,
    verify_reductions,
)
from superlora_tn.verification.claims import counts, gauge, identities, reductions
from superlora_tn.verification.references import carry, differs, papers, peers

FEW = 6
PRESETS = ["lora", "loha", "lokr", "lotr", "lorta", "vera"]
PAPERS = ["adalora", "fact_tt", "fact_tk", "tenslora"]
MAPPED = [sl.c3a(2), sl.fourier_ft(5), sl.shira(3), sl.oft(2), sl.waveft(3)]
PEERS = [name for name in ("peft", "lycoris") if peers.is_installed(name)]
CUT = identities._cut
NETWORK = sl.AdapterSpec(sl.Network("(o1 o2) (i1 i2)", {"r": 2}, w1="o1 i1", up="o2 r", down="r i2"), alpha=3)


def delta(params: dict[str, np.ndarray]) -> np.ndarray:
    return np.kron(params["w1"], params["up"] @ params["down"])


def wrong_delta(params: dict[str, np.ndarray]) -> np.ndarray:
    return np.kron(params["up"] @ params["down"], params["w1"])


def failing(certificate: Certificate) -> set[tuple[str, str]]:
    return {(row.claim, row.reference.split()[0]) for row in certificate.failures}


def against_only(spec: sl.AdapterSpec | str, reference: Any, examples: int, shapes: Any = None) -> Certificate:
    """`verify` without the properties that need no reference."""
    specs, given = engine.preset(spec) if isinstance(spec, str) else st.just(spec), draws.named(shapes)
    claims = checks.select([reference])
    return Certificate(
        tuple(engine.examine("x", c, draws.cases(specs.filter(c.applies), given), examples, 0, True) for c in claims),
        examples,
        0,
    )


def assert_reproduces(row: Row, scope: dict[str, Any] | None = None) -> None:
    assert "\n" not in row.line
    with pytest.raises(AssertionError, match="times the rounding bound"):
        exec(row.line, dict(scope or {}))


# --- what holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PRESETS, *PAPERS])
def test_a_preset_holds_against_everything_that_has_it(name: str) -> None:
    certificate = verify(name, examples=FEW if name in PRESETS else 3)
    assert certificate, str(certificate)
    tried = {row.reference.split()[0] for row in certificate.rows if row.status == "held"}
    assert {"-", "formula"} <= tried
    named = {"lora": set(PEERS), "lokr": set(PEERS), "adalora": {"peft"}, "vera": {"peft"}}
    assert not set(PEERS) & (named.get(name, set()) - tried)
    assert ("paper" in tried) == (name in {"lotr", "vera", "adalora", "fact_tt", "fact_tk", "tenslora"})
    assert all(row.tried >= 1 and row.worst <= 1 for row in certificate.rows if row.status == "held")


@pytest.mark.parametrize("name", sorted({*VARIANTS, "dora"} - {*PRESETS, *PAPERS}))
def test_no_variant_of_the_catalogue_is_without_proof(name: str) -> None:
    """Whatever is entered there is drawn, run, saved and compared with its formula: settings come from the arguments' names."""
    certificate = verify(name, "formula", examples=1)
    assert certificate, str(certificate)
    held = {(row.claim, row.reference) for row in certificate.rows if row.status == "held"}
    assert {(claim, "formula") for claim in ("dW", "forward", "gradients", "count")} <= held
    assert {("count = all that trains", "-"), ("files: bit for bit", "-"), ("routes agree", "-")} <= held
    if name in ("dora", "boft", "goft", "hra", "oft"):
        assert ("W' = the join's formula", "formula") in held
    if name in ("delora", "hira", "lora_xs", "psoft", "svft"):
        assert ("nodes of the base are its own", "-") in held


@pytest.mark.parametrize("spec", MAPPED, ids=lambda spec: type(spec.network.nodes[0][1].map).__name__)
def test_a_map_that_is_off_is_noticed(spec: sl.AdapterSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    right = node_maps.value
    monkeypatch.setattr(node_maps, "value", lambda *a: right(*a) * (1 + 1e-6))
    assert {("dW", "formula"), ("gradients", "formula")} <= failing(verify(spec, "formula", 4))


def test_a_vector_of_the_base_that_is_another_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = based._singular
    monkeypatch.setattr(based, "_singular", lambda weight: tuple(part.flip(0) for part in right(weight)))
    assert ("nodes of the base are its own", "-") in failing(verify(sl.lora_xs(1), "-", 4, shapes=[(6, 8)]))


def test_a_count_or_a_start_that_is_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sl.AdapterSpec.count
    monkeypatch.setattr(sl.AdapterSpec, "count", lambda self, shapes: right(self, shapes) + 1)
    assert ("count = all that trains", "-") in failing(verify(sl.lora(1), "-", 2))
    first = base.first_values
    monkeypatch.setattr(base, "first_values", lambda *a: [value + 1e-3 for value in first(*a)])
    assert ("W' = W at the start", "-") in failing(verify(sl.dora(sl.lora(1)), "-", 2, shapes=[(6, 8)]))


def test_scales_of_the_outputs_hold_and_one_that_is_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (sl.boft(2, 1, scaled=True), sl.AdapterSpec(sl.CP(1), join=sl.Multiply("left", scaled=True))):
        certificate = verify(spec, "formula", examples=2)
        assert certificate, str(certificate)
        assert ("W' = the join's formula", "formula") in {
            (r.claim, r.reference) for r in certificate.rows if r.status == "held"
        }
    monkeypatch.setattr(
        model_joins.Rescaled, "__call__", lambda self, layer, member, x, y, b: self.plain(layer, member, x, y, b)
    )
    assert ("W' = the join's formula", "formula") in failing(verify(sl.boft(2, 1, scaled=True), "formula", 2))


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


def test_a_declared_split_and_heads_are_fitted() -> None:
    """Sizes are drawn as multiples of what the declaration fixes."""
    split = sl.AdapterSpec(sl.Network("(o1 o2) i", {"r": 2, "o1": 5}, a="o1 r", b="r o2 i"))
    heads = papers.tenslora(2, "layer head out in", heads=7)
    for spec in (split, heads):
        certificate = against_only(spec, "formula", 3)
        assert certificate, str(certificate)


def test_reductions_hold() -> None:
    certificate = verify_reductions(examples=FEW)
    assert certificate, str(certificate)
    assert certificate.count("held") == len(certificate.rows) == len(engine.reduction_checks())


@pytest.mark.parametrize("one", reductions.REDUCTIONS, ids=lambda one: f"{one.claim} = {one.reference}")
def test_a_reduction_with_one_value_off_fails(one: reductions.Reduction) -> None:
    def off(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        carried = {n: np.array(v, copy=True) for n, v in one.carry(values).items()}
        largest = max(carried, key=lambda n: carried[n].size)
        carried[largest].flat[0] += 1e-3
        return carried

    check = engine.reduction_check(replace(one, carry=off))
    assert engine.search(check, one.cases(), 1, 0).error


def test_a_sum_or_a_reach_that_is_off_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PhysicalAdapter.delta
    monkeypatch.setattr(PhysicalAdapter, "delta", lambda self, t: right(self, t) + 1e-9)
    monkeypatch.setattr(identities, "_cut", lambda sized, whole: {t: w + 1e-9 for t, w in CUT(sized, whole).items()})
    for one in (identities.IDENTITIES[0], identities.IDENTITIES[-1]):
        assert engine.search(engine.reduction_check(one), one.cases(), 3, 0).error, one.claim


def test_a_rank_that_does_not_multiply_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PhysicalAdapter.delta
    monkeypatch.setattr(PhysicalAdapter, "delta", lambda self, t: right(self, t) + torch.eye(*right(self, t).shape))
    for one in identities.IDENTITIES[1:3]:
        assert engine.search(engine.reduction_check(one), one.cases(), 5, 0).error, one.claim


def test_a_gauge_that_is_none_turns_the_tangent_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(sized: cases.Sized, bond: str, places: Any, start: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        node = places[0][0]
        return {**start, node: np.roll(start[node], 1, axis=0)}, {n: np.abs(v) for n, v in start.items()}

    case = cases.Case(papers.adalora(2), (("w", (6, 5)),))
    assert gauge.tangent_space(case) <= 1
    monkeypatch.setattr(gauge, "_insert_gauge", another)
    assert gauge.tangent_space(case) > 1e6


def test_a_singular_gauge_loses_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(sized: cases.Sized, bond: str, places: Any, start: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        node, axis = places[0]
        dropped = np.arange(start[node].shape[axis]) > 0
        return {**start, node: np.moveaxis(np.moveaxis(start[node], axis, -1) * dropped, -1, axis)}, dict(start)

    monkeypatch.setattr(gauge, "_insert_gauge", singular)
    assert gauge.tangent_space(cases.Case(sl.lora(2), (("w", (6, 5)),))) == float("inf")


def test_equal_seeds_give_equal_certificates() -> None:
    assert verify("lokr", "formula", 3, seed=3) == verify("lokr", "formula", 3, seed=3)


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


def test_the_failing_case_is_the_smallest() -> None:
    """Wrong from three rows of w1 and five columns on, by little: one weight, and of the sizes drawn the least of these."""

    def seldom(params: dict[str, np.ndarray]) -> np.ndarray:
        found = delta(params)
        found[-1, -1] += 1e-9 if len(params["w1"]) >= 3 and found.shape[1] >= 5 else 0.0
        return found

    [row] = against_only(NETWORK, seldom, 40).failures
    assert "{'model.layer.0.attention.q_proj': (9, 6)}" in row.line
    assert_reproduces(row, {"seldom": seldom})


def test_a_function_without_a_name_is_pasted_as_reference() -> None:
    wrong = partial(wrong_delta)
    [row] = against_only(NETWORK, wrong, 20).failures
    assert_reproduces(row, {"reference": wrong})


def test_a_function_that_gives_nan_or_raises_fails() -> None:
    assert not against_only(NETWORK, lambda params: np.nan * delta(params), 2)
    [row] = against_only(NETWORK, lambda params: params["w3"], 2).failures
    assert row.detail == "KeyError: 'w3'"


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
    assert against_only(spec, peer, 3, shapes=[(12, 18)])
    monkeypatch.setattr(peers, "to_peft", one_entry_off(carry.to_peft))
    certificate = against_only(spec, peer, 3, shapes=[(12, 18)])
    assert len(failing(certificate)) == 2  # dW and the layer's output
    assert {reference for _, reference in failing(certificate)} == {peer}


def test_veras_frozen_matrices_reach_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(peers, "to_peft", one_entry_off(carry.to_peft))
    assert len(failing(against_only(sl.vera(2), "peft", 3))) == 2


def test_tensorlys_own_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorly import cp_tensor

    right = cp_tensor.cp_to_tensor
    monkeypatch.setattr(cp_tensor, "cp_to_tensor", lambda *a: right(*a) * 1.0001)
    assert failing(against_only(sl.lora(2), "tensorly", 3)) == {("dW", "tensorly")}


@pytest.mark.parametrize("name", ["adalora", "fact_tk", "tenslora", "vera", "lotr"])
def test_the_papers_formula_is_consulted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = papers.delta
    monkeypatch.setattr(papers, "delta", lambda *a: {t: w * 1.0001 for t, w in right(*a).items()})
    assert failing(against_only(name, "paper", 3)) == {("dW", "paper")}


TENSLORA = {  # published trainable parameters of ViT-B's q, k, v at equal ranks 4, 8, 16 (Marmoret et al. 2025)
    "layer out in": (18_768, 38_688, 86_592),
    "layer type out in": (6_460, 16_504, 90_352),
    "layer type head out in": (4_460, 39_640, 1_062_320),
}


@pytest.mark.parametrize("modes", TENSLORA)
def test_tenslora_has_its_published_counts(modes: str) -> None:
    shapes = {f"layer.{k}.{name}": (768, 768) for k in range(12) for name in ("q", "k", "v")}
    for rank, published in zip((4, 8, 16), TENSLORA[modes], strict=True):
        spec = papers.tenslora(rank, modes, 12 if "head" in modes else None)
        groups = [{n: shapes[n] for n in group.members} for group, _ in spec.lay_out(shapes)]
        assert spec.count(shapes) == counts.totals(groups, spec) == published


def test_the_formula_is_consulted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.Sized.formula
    altered: Callable[..., Any] = lambda self, v=None: {t: w * 1.0001 for t, w in right(self, v).items()}  # noqa: E731
    monkeypatch.setattr(cases.Sized, "formula", altered)
    assert {("dW", "formula"), ("forward", "formula"), ("gradients", "formula")} <= failing(against_only("lotr", "formula", 4))


# --- exchange -------------------------------------------------------------------------------------------------------

SHAPE = (12, 18)
CARRIED = {
    "lora": sl.lora(2, alpha=3),
    "lora-rslora": sl.lora(3, alpha=3, rslora=True),
    "lora-no-alpha": sl.lora(2),
    "loha": sl.loha(2, alpha=1),
    "lokr": sl.lokr(1, alpha=3),
    "lokr-4": sl.lokr(1, factor=4, alpha=3),
    "lokr-2-both": sl.lokr(1, factor=2, decompose_both=True),
    "lokr-dense": sl.lokr(8),
    "adalora": papers.adalora(3, alpha=2),
    "vera": sl.vera(2),
}


def values_of(spec: sl.AdapterSpec, members: int = 1) -> dict[str, np.ndarray]:
    [sized] = cases.Case(spec, tuple((f"layer.{k}.q", SHAPE) for k in range(members)), seed=4).groups()
    return sized.values


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], strict=True)


def assert_comes_back(spec: sl.AdapterSpec, values: dict[str, np.ndarray], *carried: carry.Carried) -> None:
    back, nodes = carry.from_peft(*carried)
    assert_same_bits(values, nodes)
    shapes = {f"layer.{k}.q": SHAPE for k in range(len(carried))}
    assert [graph for _, graph in back.lay_out(shapes)] == [graph for _, graph in spec.lay_out(shapes)]
    # alpha goes to and fro by a product and a quotient each: at most four roundings.
    np.testing.assert_allclose(back.scale, spec.scale, rtol=4 * 2.0**-53, atol=0)


@pytest.mark.parametrize("name", CARRIED)
def test_our_parameters_come_back_from_peft_bit_for_bit(name: str) -> None:
    pytest.importorskip("peft")
    spec, members = CARRIED[name], 3 if name == "vera" else 1
    values = values_of(spec, members)
    base = [cases.linear(torch.zeros(SHAPE), torch.float64) for _ in range(members)]
    layers = [peers.peft_layer(carry.to_peft(spec, values, k), base[k]) for k in range(members)]
    assert_comes_back(spec, values, *map(peers.read_peft, layers))


# LyCORIS has no AdaLoRA and VeRA, and would split 12 by a factor of 4 into 3 x 4 where PEFT and we take 4 x 3.
@pytest.mark.parametrize("name", [name for name in CARRIED if name not in ("adalora", "vera", "lokr-4")])
def test_our_parameters_come_back_from_lycoris_bit_for_bit(name: str) -> None:
    pytest.importorskip("lycoris")
    spec = CARRIED[name]
    module = peers.lycoris_module(carry.to_peft(spec, values_of(spec)), cases.linear(torch.zeros(SHAPE), torch.float64))
    assert_comes_back(spec, values_of(spec), peers.read_lycoris(module))


@pytest.mark.parametrize("name", CARRIED)
def test_pefts_own_parameters_come_back_to_peft_bit_for_bit(name: str) -> None:
    """A layer that PEFT made and trained goes to ours, computes the same dW there, and goes back."""
    pytest.importorskip("peft")
    base = cases.linear(torch.zeros(SHAPE), torch.float64)
    theirs: Any = peers.peft_layer(carry.to_peft(CARRIED[name], values_of(CARRIED[name])), base)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "ranknum" not in n and "base" not in n:
                p.add_(torch.randn(p.shape, dtype=p.dtype))  # what training would do
    spec, nodes = carry.from_peft(peers.read_peft(theirs))
    [sized] = cases.Case(spec, (("layer.0.q", SHAPE),)).groups()
    expected = theirs.get_delta_weight("default").detach().numpy()
    assert (abs(sized.delta(nodes)["layer.0.q"] - expected) <= sized.allowed("layer.0.q", nodes, more=8)).all()
    back: Any = peers.peft_layer(carry.to_peft(spec, nodes), cases.linear(torch.zeros(SHAPE), torch.float64))
    assert_same_bits(*({n: t.numpy() for n, t in layer.state_dict().items()} for layer in (theirs, back)))


def test_what_has_no_map_says_what_has() -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="it has lora, adalora, loha, lokr and vera"):
        carry.to_peft(sl.lotr(2), values_of(sl.lotr(2)))
    with pytest.raises(peers.Misfit, match="Linear holds no lora, adalora"):
        peers.read_peft(torch.nn.Linear(2, 2))
    with pytest.raises(peers.Misfit, match="Linear with"):
        peers.read_lycoris(torch.nn.Linear(2, 2))
    lora = carry.to_peft(sl.lora(2), values_of(sl.lora(2)))
    for wrong in ((), (lora, lora)):
        with pytest.raises(ValueError, match=f"given {len(wrong)} weights; give one"):
            carry.from_peft(*wrong)
    vera = carry.to_peft(sl.vera(2), values_of(sl.vera(2)))
    other = replace(vera, tensors={**vera.tensors, "vera_A": vera.tensors["vera_A"] + 1})
    with pytest.raises(ValueError, match="equal B and A"):
        carry.from_peft(vera, other)


# --- peers ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(PEERS) < 2, reason="needs PEFT and LyCORIS")
def test_the_known_differences_of_peers_are_shown_with_the_oracles_value() -> None:
    factor = {"merge_to": 3.0, "get_diff_weight": 3.0, "both splits dense": 4 / 3, "out_proj": 2.0, "r + 1e-5": 2 / (2 + 1e-5)}
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
    for seed in ("a", 1.5, True, 1 << 64):
        with pytest.raises(SpecError, match=rf"verify was given seed={seed!r}; a seed is a whole number"):
            verify("lora", examples=1, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="verify_reductions was given seed='a'"):
        sl.verify_reductions(1, seed="a")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"no reference 3.*peft"):
        verify("lora", against=3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no property 'dV'"):
        check(NETWORK, {"w": (4, 4)}, "dV")
    with pytest.raises(SpecError, match=r"give an AdapterSpec\(\.\.\.\), or the name"):
        verify(NETWORK.network)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"found no weights that .* fits; give shapes"):
        verify(sl.AdapterSpec(sl.CP(5000)))
    with pytest.raises(SpecError, match=r"splits the mode 'out' of size 7"):
        verify(sl.AdapterSpec(sl.Network("(o p) i", {"o": 5}, a="o i", b="p i")), shapes=[(7, 7)])


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
    sl.AdapterSpec(sl.Network("o i", {"r": 2}, **{"lambda": sl.Node("r i", trainable=False), "b": "o r"})),
    sl.quan_ta(2),
    sl.delora(3),
    NETWORK,
    sl.AdapterSpec(sl.CP(2), sl.FlatFold(2), sl.Compose(sl.Shuffle(1), sl.Fastfood(0.5, tanh=True))),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_source_of_a_declaration_makes_it(spec: sl.AdapterSpec) -> None:
    assert eval(source(spec, "sl."), {"sl": sl}) == spec
    assert eval(repr(spec), vars(sl)) == spec


def test_the_scale_is_computed_apart_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sl.AdapterSpec, "scale", property(lambda self: (self.alpha or 1.0) / 2))
    assert ("dW", "formula") in failing(against_only(sl.lora(3, alpha=6.0, rslora=True), "formula", 6))


@pytest.mark.skipif("peft" not in PEERS, reason="needs PEFT")
def test_a_split_that_peft_does_not_make_fails() -> None:
    spec = sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.CP(1, dense_if_large=True), factor=3))
    assert against_only(spec, "peft", 3, [(12, 18)])
    carried = carry.to_peft(spec, cases.Case(spec, (("w", (12, 18)),)).groups()[0].values)
    carried.settings["factor"] = 2
    with pytest.raises(peers.Misfit, match=r"lacks lokr_w1\.default of shape"):
        peers.peft_layer(carried, cases.linear(torch.zeros(12, 18), torch.float64))


def test_gradients_through_a_bounded_map_are_checked_whatever_divides_alpha() -> None:
    """The truncation of central differences is bounded by the network without scale, also of a rank's root."""
    spec = sl.AdapterSpec(sl.CP(2), sl.FlatFold(2, "weight"), sl.Fastfood(ratio=1.0, tanh=True), alpha=2.0, rslora=True)
    check(spec, {"model.layer.0.attention.q_proj": (3, 2)}, "gradients = central differences", "-", seed=0, dtype="float64")
