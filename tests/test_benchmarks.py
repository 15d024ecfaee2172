"""The benchmarks run; what they find is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from optional import library

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str) -> str:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True, timeout=240).stdout


@pytest.mark.parametrize("name", ["dispatch", "attach_large", "memory"])
def test_a_benchmark_starts(name: str) -> None:
    library("peft")
    library("lycoris")
    assert "usage" in run(f"{name}.py", "--help")


def test_the_accelerators_benchmark_runs_on_the_cpu(tmp_path: Path) -> None:
    """A few of its rows; the rest is left by the clock and named."""
    library("peft")
    library("lycoris")
    out = tmp_path / "gpu.json"
    printed = run("gpu.py", "--device", "cpu", "--quick", "--minutes", "0.03", "--out", str(out))
    found = json.loads(out.read_text())
    names = [row["measured"] for row in found["rows"]]
    assert names[0] == "rates"
    assert found["rows"][0]["copy GB/s"] > 0
    assert not [row for row in found["rows"] if "failed" in row]
    assert all(f"{name} " in printed for name in names)
    assert found["quick"]


@pytest.mark.parametrize("library_name", ["torch", "transformers", "diffusers"])
def test_models_that_are_tried_are_all_right(library_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short version of `docs/models_tried.md`: some models of each library, two declarations."""
    library(library_name)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tried_models as tried

    short = {"Sequential, Conv1d", "LSTM", "GPT2LMHeadModel", "Qwen2MoeForCausalLM", "SwinModel", "DiTTransformer2DModel"}
    found = [one for one in tried.models([library_name]) if one.name in short]
    assert found
    for one in found:
        for name in ("lokr", "lotr"):
            cells = tried.cell(one, tried.SPECS[name])
            assert cells.pop("attach").endswith(" weights"), (one.name, name, cells)
            assert set(cells.values()) == {"ok"}, (one.name, name, cells)


def test_the_page_of_tried_models_is_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tried_models as tried

    found = json.loads((ROOT / "benchmarks" / "results" / "models.json").read_text())
    assert (ROOT / "docs" / "models_tried.md").read_text() == tried.page(found["rows"], found["machine"])
