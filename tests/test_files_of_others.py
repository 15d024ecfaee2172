"""sl.load takes the files of other libraries and tuned.save writes them: outputs equal PEFT's own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TARGETS, Tied, Tiny, assert_untouched, noise, perturb, seeded, snapshot

import superlora_tn as sl

ROOT = Path(__file__).resolve().parents[1]
X = noise(2, 3, 12)


@pytest.mark.parametrize("method", ["LoraConfig", "LoKrConfig", "LoHaConfig"])
def test_a_folder_of_pefts_loads_and_computes_what_peft_does(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": TARGETS, "init_weights": False, "r": 2}
    if method == "LoraConfig":
        options["init_lora_weights"] = options.pop("init_weights")
    wrapped = peft.get_peft_model(seeded(0, Tiny), getattr(peft, method)(**options)).eval()
    wrapped.save_pretrained(tmp_path)
    model = seeded(0, Tiny)
    tuned = sl.load(model, tmp_path)
    # float32 sums of at most 20 terms, in another order.
    torch.testing.assert_close(model(X), wrapped(X), rtol=1e-4, atol=1e-5)
    tuned.merge()
    torch.testing.assert_close(model(X), wrapped(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec", [sl.lora(2, alpha=3), sl.lokr(1, alpha=2), sl.loha(2), sl.lotr(2)], ids=["lora", "lokr", "loha", "lotr"]
)
def test_what_is_written_for_peft_peft_reads(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = seeded(0, Tiny)
    tuned = sl.attach(model, spec, TARGETS, seed=0)
    perturb(tuned)
    report = tuned.save(tmp_path, format="peft")
    assert set(report.errors) == set(tuned.targets)
    assert max(report.errors.values()) < 1e-5  # exact methods, or ranks that suffice, in float32
    wrapped = peft.PeftModel.from_pretrained(seeded(0, Tiny), tmp_path).eval()
    torch.testing.assert_close(wrapped(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("also", ["embed", "lm_head"])
def test_a_tied_parameter_that_trains_is_written_for_peft_by_all_its_names(also: str, tmp_path: Path) -> None:
    """PEFT gives each module a copy of its own; here they are one again, unless a file gives them different values."""
    peft = pytest.importorskip("peft")
    model, x = seeded(0, Tied), torch.tensor([[1, 4, 8], [5, 0, 1]])
    tuned = sl.attach(model, sl.lora(2), ["body"], seed=0, also=[also])
    perturb(tuned)
    with torch.no_grad():
        model.embed.weight.add_(noise(*model.embed.weight.shape))
    tuned.save(tmp_path, format="peft")
    wrapped = peft.PeftModel.from_pretrained(seeded(0, Tied), tmp_path).eval()
    # float32 sums of at most 20 terms, in another order.
    torch.testing.assert_close(wrapped(x), model(x), rtol=1e-4, atol=1e-5)
    other = seeded(0, Tied)
    sl.load(other, tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    assert other.lm_head.weight is other.embed.weight
    untied = seeded(0, Tied)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    sl.attach(untied, sl.lora(2), ["body"], also=["embed", "lm_head"])
    with torch.no_grad():
        untied.embed.weight.add_(1)
    sl.tuned(untied).save(tmp_path / "untied", format="peft")
    fresh = seeded(0, Tied)
    before = snapshot(fresh)
    with pytest.raises(sl.CheckpointError, match=r"this base has no 'lm_head.weight'"):
        sl.load(fresh, tmp_path / "untied")
    assert_untouched(fresh, before)


def test_no_other_format_is_written_beside_another_adapter_of_ones_own(tmp_path: Path) -> None:
    """Which reading the folder would give; beside the same adapter it may stand."""
    model = seeded(0, Tiny)
    tuned = sl.attach(model, sl.lora(2), TARGETS, seed=0)
    tuned.save(tmp_path)
    tuned.save(tmp_path, format="peft")
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    perturb(tuned)
    for format in ("peft", "kohya"):
        with pytest.raises(sl.CheckpointError, match=r"another adapter in this library's own format \(adapter.json\)"):
            tuned.save(tmp_path, format=format)  # type: ignore[arg-type]
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    tuned.save(tmp_path)
    tuned.save(tmp_path, format="peft")
    tuned.detach()
    other = sl.attach(model, sl.lora(2), TARGETS[:1], seed=0)
    with pytest.raises(sl.CheckpointError, match="another adapter"):
        other.save(tmp_path, format="peft")


def test_what_trains_beside_an_adapter_is_part_of_it_where_another_format_would_stand_beside_it(tmp_path: Path) -> None:
    model = seeded(0, Tiny)
    tuned = sl.attach(model, sl.lora(2), TARGETS, seed=0, also=["head"])
    tuned.save(tmp_path)
    tuned.save(tmp_path, format="peft")
    with torch.no_grad():
        model.get_parameter("head.weight").add_(1)
    with pytest.raises(sl.CheckpointError, match="another adapter"):
        tuned.save(tmp_path, format="peft")


def test_a_foreign_file_that_does_not_fit_leaves_the_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(seeded(0, Tiny), peft.LoraConfig(target_modules=["up"], r=2)).save_pretrained(tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    before = snapshot(other)
    with pytest.raises(sl.CheckpointError):
        sl.load(other, tmp_path)
    assert_untouched(other, before)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that tries all formats."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tried_formats")


def test_formats_that_are_tried_are_right(tried: Any) -> None:
    """The short version of `docs/formats_tried.md`: every library, few methods."""
    for name in ("peft", "lycoris", "diffusers", "gguf"):
        pytest.importorskip(name)
    found = list(tried.cells(["LoRA", "LoKr", "IA3", "a declared network"]))
    refused = {(r["format"], r["method"]) for r in found if r["outcome"] == "refused"}
    assert refused == {("PEFT", "IA3"), ("LyCORIS", "IA3"), ("kohya", "IA3")}
    assert {r["format"] for r in found} == {"PEFT", "LyCORIS", "kohya", "diffusers", "GGUF"}
    assert {r["direction"] for r in found} == {"read", "written"}
    assert [r for r in found if r["outcome"] not in ("right", "refused")] == []


def test_the_page_of_tried_formats_is_what_was_found(tried: Any) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "formats.json").read_text())
    page = tried.page(found["rows"], found["machine"], found["versions"])
    assert (ROOT / "docs" / "formats_tried.md").read_text() == page
    assert "**differs**" not in page
