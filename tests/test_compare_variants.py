"""The comparison of all variants at the same counts: which settings it takes, rows that are kept, and what its page says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")
pytest.importorskip("matplotlib", reason="the demo extra is not installed")

from superlora_tn.demo.base import DigitsRecipe
from superlora_tn.network.catalogue import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {f"layer.{k}.{name}_proj": (64, 64) for k in range(4) for name in "qv"}
SHORT = DigitsRecipe(pool=64, base_steps=2, base_batch=8, steps=2, batch=8, seeds=(0, 1))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare_variants

    return compare_variants


def test_every_variant_is_at_a_level_with_a_count_near_it(compare: Any) -> None:
    seen = set()
    for level in compare.LEVELS:
        for variant in VARIANTS:
            found = compare.nearest(variant, level, SHAPES, 1.5)
            if found is None:
                continue
            seen.add(variant)
            count, spec = found
            assert count == spec.count(SHAPES)
            assert level / 1.5 <= count <= level * 1.5
            # No rank that is a divisor of the width comes nearer: an independent search.
            for maker in compare.settings(variant):
                for other, _ in compare._divisors(maker, SHAPES):
                    assert abs(math.log(count / level)) <= abs(math.log(other / level)) + 1e-12, (variant, level)
    assert seen == set(VARIANTS) - {"dense"}


def test_rows_are_kept_and_the_base_is_left_as_it_was(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol, place = compare.Protocol(rates=(1e-2, 3e-2), extensions=0, tried=1, demo=SHORT), tmp_path / "rows.json"
    states: list[dict[str, torch.Tensor]] = []
    genuine = compare.measure

    def measure(task: Any, *arguments: Any) -> Any:
        states.append({name: value.clone() for name, value in task.model.state_dict().items()})
        row = genuine(task, *arguments)
        states.append({name: value.clone() for name, value in task.model.state_dict().items()})
        if arguments[0] == "vera":
            raise KeyboardInterrupt
        return row

    def run() -> Any:
        return compare.run(protocol, place, ("lotr", "vera", "lorta"), (500,), tmp_path)

    monkeypatch.setattr(compare, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [row["variant"] for row in json.loads(place.read_text())["rows"]] == ["dense", "lotr"]
    monkeypatch.setattr(compare, "measure", genuine)
    result = run()
    assert [row["variant"] for row in result["rows"]] == ["dense", "lotr", "vera", "lorta"]
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    dense, lotr = result["rows"][:2]
    assert list(dense["tried"]) == ["0.001", "0.003"]
    assert list(lotr["tried"]) == ["0.01", "0.03"]
    assert len(lotr["accuracies"]) == 2
    assert f"{lotr['rate']:g}" == min(lotr["tried"], key=lotr["tried"].get)
    monkeypatch.setattr(compare, "measure", None)  # nothing is left to measure
    assert run()["rows"] == result["rows"]


def test_the_page_is_what_was_found(compare: Any) -> None:
    result = json.loads(compare.RESULT.read_text())
    assert compare.PAGE.read_text() == compare.page(result)
    assert compare.FIGURE.read_bytes().startswith(b"\x89PNG")
    # Every setting that belongs there was measured.
    wanted = {(v, n) for n in compare.LEVELS for v in VARIANTS if v != "dense" and compare.nearest(v, n, SHAPES, 1.5)}
    assert {(row["variant"], row["level"]) for row in result["rows"]} == wanted | {("dense", None)}


def test_what_lies_within_chance_follows_the_rows(compare: Any) -> None:
    def row(variant: str, level: int | None, *accuracies: float) -> dict[str, Any]:
        return {"variant": variant, "level": level, "accuracies": accuracies, "rate": 1, "tried": {"1": 0, "2": 0, "0.5": 0}}

    rows = [row(v, n, m - 0.01, m, m + 0.01) for n in compare.LEVELS for v, m in (("a", 0.9), ("b", 0.89), ("c", 0.8))]
    first, *_, rates = compare.answers({"rows": [row("dense", None, 0.9), *rows]})
    # The spread is 1 point in all: two standard deviations of a difference of means of 3 are 2 sqrt(2 / 3) = 1.6 points.
    assert "`a` has the highest mean, 90.0 %; 1 of the 2 others lie within 1.6 points" in first
    assert "`c` with 80.0 %" in first
    assert rates == "0 of 9 settings chose the smallest or the largest rate that was tried."
    rows[0] |= {"rate": 2, "parameters": 1234}
    *_, rates = compare.answers({"rows": [row("dense", None, 0.9), *rows]})
    assert rates.startswith("1 of 9 settings")
    assert rates.endswith("may lie outside: `a` (1,234).")
