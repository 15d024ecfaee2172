"""The page on scale: its figures are the benchmark's, which are the layouts'; its table names every test; its recipes run."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_distributed
import torch
from launched import launched
from optional import library
from ranks import SCENARIOS

import superlora_tn as sl

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text()
SAVED = ("ddp", "fsdp2", "resumed", "ignored", "fsdp1", "parallel", "accelerate")


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}-cpu-warm.json").read_text())
    return found


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return __import__("scale")


def test_the_tables_are_the_results() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "summary.py"))["table"]
    for name in ("scale_base", "scale"):
        assert table(kept(name)["rows"]) in PAGE
    machine = kept("scale")["machine"]
    assert f"of {machine['date']}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}" in PAGE


def test_the_base_has_the_published_number_of_parameters(scale: ModuleType) -> None:
    model = scale.base()
    assert sum(p.numel() for p in model.parameters()) == 405_853_388_800
    assert kept("scale_base")["rows"] == scale.base_rows(model)


@pytest.mark.parametrize("name", ["lora", "lokr", "lotr", "cp", "lorta"])
def test_the_counts_are_the_layouts(scale: ModuleType, name: str) -> None:
    expected = next(row for row in kept("scale")["rows"] if row["variant"] == name)
    found = scale.row(name, scale.SPECS[name])
    times = {"attach, s", "plan both routes, s"}
    assert {k: v for k, v in found.items() if k not in times} == {k: v for k, v in expected.items() if k not in times}


def test_loras_counts_are_its_formulas(scale: ModuleType) -> None:
    row = next(row for row in kept("scale")["rows"] if row["variant"] == "lora")
    shapes = scale.attach_large.SHAPES.values()
    parameters = 126 * sum(8 * (d_in + d_out) for d_in, d_out in shapes)
    assert row["parameters"] == parameters
    assert row["gradients all-reduced a step, MB"] == 4 * parameters / 1e6
    assert row["FLOPs over the frozen layers'"] == parameters / (126 * sum(d_in * d_out for d_in, d_out in shapes))


def test_the_table_names_every_test() -> None:
    rows = re.findall(r"(?m)^\|.*\| ([^|]*) \|$", PAGE.partition("## Recipes")[0])[1:]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted([*SCENARIOS, "accelerate_under_torchrun", "deepspeed"])
    assert all(f"test_{name}" in vars(test_distributed) for name in named)


def test_the_recipes_run_as_one_process(tmp_path: Path) -> None:
    """All in one file on two processes; what each saves is what one process trains."""
    library("accelerate")
    recipes = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    launched("\n".join(recipes), tmp_path)
    scope: dict[str, Any] = {}
    exec("import torch\nimport superlora_tn as sl\n" + recipes[0].partition("mine = ")[2].partition("\n")[2], scope)
    model, tuned = scope["adapted"]()
    scope["train"](model, torch.linspace(-1, 1, 8 * 16, dtype=torch.float64).reshape(8, 16).sin())
    assert {folder.parent.name for folder in tmp_path.rglob("adapter.json")} == set(SAVED)
    for name in SAVED:
        base, _ = scope["adapted"]()
        again = sl.load(sl.tuned(base).detach(), tmp_path / name)
        for target in tuned.targets:  # as in test_distributed: sums in another order, through three steps of AdamW
            torch.testing.assert_close(
                again.delta(target), tuned.delta(target), rtol=test_distributed.BOUND, atol=test_distributed.BOUND
            )
