"""The mutation check itself: no fault is stale, one is caught end to end, and one that changes nothing survives."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import mutations
import pytest
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
CHEAP = next(fault for fault in FAULTS if fault.name == "last-component-is-a-layer")


def test_there_are_faults_all_over_the_library() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 24
    assert len({fault.file for fault in FAULTS}) >= 16


@each_fault
def test_a_fault_is_there_once_and_changes_the_program(fault: Fault) -> None:
    before, after = ((ROOT / fault.file).read_text(), mutations.planted(fault))
    assert ast.dump(ast.parse(before)) != ast.dump(ast.parse(after))


@each_fault
def test_the_tests_that_are_tried_first_exist(fault: Fault) -> None:
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text(), test


def test_a_fault_is_caught_and_a_replacement_of_equal_value_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end, with a whole suite of one test."""
    same = replace(CHEAP, name="same", old="offset += d_out * d_in", new="offset += d_in * d_out")
    monkeypatch.setattr(mutations, "FAULTS", (CHEAP, same))
    monkeypatch.setattr(mutations, "WHOLE", CHEAP.tests)
    assert mutations.main(["--json", str(tmp_path / "verdicts.json")]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 faults caught" in printed
    assert "SURVIVED, so a test is missing: same" in printed
    data = json.loads((tmp_path / "verdicts.json").read_text())
    caught, survived = data["faults"]
    assert (caught["name"], survived["name"]) == (CHEAP.name, "same")
    assert caught["caught_by"].startswith(CHEAP.tests[0])
    assert survived["caught_by"] is None
    assert data["caught"] == 1
    assert {"date", "device"} <= set(data["machine"])


def test_a_fault_that_breaks_imports_shows_nothing(tmp_path: Path) -> None:
    with pytest.raises(mutations.NothingShown, match=CHEAP.name):
        mutations.examined(replace(CHEAP, new="enumerate(words))"), tmp_path, tmp_path)


@pytest.mark.parametrize("old", ["no such text", "def "], ids=["gone", "ambiguous"])
def test_a_stale_fault_is_named(old: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mutations, "FAULTS", (replace(CHEAP, old=old),))
    assert mutations.main([]) == 2
    said = capsys.readouterr().err
    assert f"'{CHEAP.name}' is stale" in said
    assert "expected once" in said
