"""`verify` of sums and cropped splits: it holds for what the library does, and notices each part of it that is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import superlora_tn as sl
from superlora_tn import cli
from superlora_tn.update import summed
from superlora_tn.verification import cases, check, checks, draws, engine, verify
from superlora_tn.verification.claims import counts

SHAPES = [(7, 11), (12, 18)]
SPECS = {
    "weighted": sl.AdapterSpec(sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.Dense()), weights=(1, -0.5)), alpha=3),
    "in a product": sl.AdapterSpec(sl.Kronecker(sl.Sum(sl.CP(1), sl.Dense()), sl.CP(1))),
    "departed": sl.AdapterSpec(sl.Sum(sl.CP(3), sl.Dense(), sl.Frozen(sl.CP(3)), weights=(2, 1, -2))),
    "cropped": sl.AdapterSpec(sl.Network("(o1 o2) (i1 i2)", {"o1": 5, "r": 2}, crop=True, a="o1 i1 r", b="r o2 i2"), alpha=3),
    "cropped in a sum": sl.AdapterSpec(sl.Sum(sl.CP(2), sl.Kronecker(sl.Dense(), sl.CP(1), crop=True))),
    "of all weights": sl.AdapterSpec(sl.Sum(sl.Tucker(2, over="cap"), sl.CP(1)), sl.PhysicalFold("member out in")),
    "in a flat fold": sl.AdapterSpec(sl.Sum(sl.CP(2), sl.Dense(), weights=(1, -2)), sl.FlatFold(2, 2), sl.Shuffle(3)),
    "joined": sl.AdapterSpec(sl.Sum(sl.CP(1), sl.Dense()), join=sl.Magnitude()),
    "gralora": sl.gralora(2, 3, hybrid=1),
}


@pytest.mark.parametrize("name", SPECS)
def test_it_holds_with_the_laws_of_one_network(name: str) -> None:
    shapes = [(12, 18)] if name in ("gralora", "in a flat fold") else SHAPES
    certificate = verify(SPECS[name], ["-", "formula"], examples=2, shapes=shapes)
    assert certificate, str(certificate)
    held = {(row.claim, row.reference) for row in certificate.rows if row.status == "held"}
    assert {(claim, "formula") for claim in ("dW", "forward", "gradients", "count")} <= held
    laws = {"routes agree", "backends agree", "linear in each node", "gradients = central differences", "deterministic"}
    laws |= (
        {"merge = forward, unmerge restores", "merge in bf16: one rounding"}
        if name != "joined"
        else {"count = all that trains"}
    )
    assert laws | {"files: bit for bit", "W' = W at the start", "finite at extreme scales"} <= {claim for claim, _ in held}


@pytest.mark.parametrize("name", ["sum", "crop"])
def test_random_ones_are_drawn_from_the_language(name: str) -> None:
    """dW, gradients and counts of random sums and crops; what is drawn has what it is drawn for."""
    seen: list[sl.AdapterSpec] = []

    def spied(measure: Any) -> Any:
        return lambda case: (seen.append(case.spec), measure(case))[1]

    drawn = draws.cases(engine.preset(name), draws.POOL)
    for one in checks.reference_checks("formula"):
        trial = engine.search(checks.Check(one.claim, one.reference, spied(one.measure)), drawn, 12, 1)
        assert trial.tried == 12
        assert not trial.error, (one.claim, trial.error, trial.last)
    graphs = [spec.lay_out(dict(shapes))[0][1] for spec in seen for shapes in draws.POOL if draws.fits(spec, shapes)]
    assert any(graph.terms for graph in graphs)
    assert any(draws.is_cropped(spec.network) for spec in seen) == (name == "crop")


def failing(name: str, examples: int = 3) -> set[tuple[str, str]]:
    certificate = verify(SPECS[name], "formula", examples=examples, shapes=SHAPES[:1])
    return {(row.claim, row.reference) for row in certificate.failures}


def test_a_weight_that_is_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(self: summed.TermAdapter, strength: float) -> None:
        self._scale = self.spec.scale * strength

    monkeypatch.setattr(summed.TermAdapter, "strengthen", dropped)
    assert {("dW", "formula"), ("forward", "formula"), ("gradients", "formula")} <= failing("weighted")


def test_a_surplus_that_is_cut_at_the_wrong_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = summed._Crop.cut
    monkeypatch.setattr(summed._Crop, "cut", lambda self, x: right(self, x.flip(-1)).flip(-1))
    assert {("dW", "formula"), ("forward", "formula")} <= failing("cropped")


def test_a_term_at_the_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = summed.SumAdapter.delta_of
    monkeypatch.setattr(summed.SumAdapter, "delta_of", lambda self, member: right(self, member) + 1e-9)
    assert ("zero at start, one zero node", "-") in failing("weighted")


def test_counts_of_sums_and_crops_are_consulted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = counts.sides_of
    monkeypatch.setattr(counts, "sides_of", lambda *a: tuple(side + 1 for side in right(*a)))
    assert ("count", "formula") in failing("cropped in a sum")


def test_sides_of_a_crop_by_hand() -> None:
    """50 in 7 x 8, 769 in 27 x 29, 30 in 5 x 6; with a first side of 4, 50 in 4 x 13; three sides of 50 in 3 x 4 x 5."""
    assert [counts.sides_of(n, 2) for n in (50, 769, 30, 1)] == [(7, 8), (27, 29), (5, 6), (1, 1)]
    assert counts.sides_of(50, 2, 4) == (4, 13)
    assert counts.sides_of(50, 3) == (3, 4, 5)


def test_the_textbook_adds_and_cuts_by_hand() -> None:
    """``u v^T`` less half of 5 x 3 from ``[[1 .. ]] (x) ones``, of which one row and one column are above."""
    spec = sl.AdapterSpec(sl.Sum(sl.CP(1), sl.Kronecker(sl.Dense(), sl.Dense(), crop=True), weights=(1, -0.5)))
    [sized] = cases.Case(spec, (("w", (5, 3)),)).groups()
    values = {"t1_factor_out": np.ones((5, 1)), "t1_factor_in": np.arange(3.0)[:, None]}
    values |= {"t2_k1_weight": np.array([[1.0], [10.0]]), "t2_k2_weight": np.arange(9.0).reshape(3, 3)}
    assert [values[n.name].shape for n in sized.graph.nodes] == [n.shape for n in sized.graph.nodes]
    blocks = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 10, 20], [30, 40, 50]])
    np.testing.assert_array_equal(sized.formula(values)["w"], np.arange(3.0) - blocks / 2)
    terms = sized.magnitude({name: -value for name, value in values.items()})["w"]
    np.testing.assert_array_equal(terms, np.arange(3.0) + blocks / 2)


def test_a_failing_case_is_a_line_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    right = summed.SumAdapter.delta_of
    monkeypatch.setattr(summed.SumAdapter, "delta_of", lambda self, member: right(self, member) * (1 + 1e-5))
    certificate = verify(SPECS["departed"], "formula", examples=2, shapes=SHAPES)
    line = next(row.line for row in certificate.failures if row.claim == "dW")
    assert "sl.Frozen(part=sl.CP(rank=3))" in line
    with pytest.raises(AssertionError, match="times the rounding bound"):
        exec(line, {})
    monkeypatch.undo()
    exec(line, {})
    assert check(SPECS["departed"], {"w": (7, 11)}, "dW", "formula") <= 1


def test_the_command_takes_a_file_and_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "mine.json"
    place.write_text(json.dumps(SPECS["cropped in a sum"].to_dict()), encoding="utf-8-sig")  # a mark in front is no matter
    assert cli.main(["verify", str(place), "--examples", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {row["subject"] for row in made["rows"]} == {str(place)}
    shapes = {"up": (7, 11)}
    tuned = sl.attach(cases.linear_model(shapes, torch.float32, 0), SPECS["weighted"], ["up"])
    tuned.save(tmp_path / "adapter")
    assert cli.main(["verify", str(tmp_path / "adapter"), "--examples", "1"]) == 0
    assert "HOLDS" in capsys.readouterr().out
    for text, words in (
        ("[1]", "a spec is a dict"),
        ("{", "holds no declaration"),
        ("[" * 100_000, "holds no declaration"),
        ('{"alpha": 1}', "a spec needs"),
    ):
        place.write_text(text)
        assert cli.main(["verify", str(place)]) == 2
        assert words in (said := capsys.readouterr().err)
        assert "to_dict()" in said
