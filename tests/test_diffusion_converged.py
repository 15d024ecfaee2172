"""Image generation to convergence in little: jobs that are taken up again, rows over seeds, and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

from rich.console import Console
from superlora_tn_paper import diffusion, diffusion_converged, diffusion_report, report
from superlora_tn_paper.denoising import Schedule, Training
from superlora_tn_paper.diffusion_settings import settings
from superlora_tn_paper.rates import best, lowest_level, searched
from superlora_tn_paper.store import Elsewhere, Store, alone, packed, unpacked
from superlora_tn_paper.unet import UNet, UNetShape, attention_shapes, build

import superlora_tn as sl
from superlora_tn.cli import main

LONG = diffusion_converged.LongRecipe(
    diffusion.Recipe(
        unet=UNetShape(size=8, channels=16, multipliers=(1, 2), halvings=1),
        schedule=Schedule("cosine", 50),
        home="printed digits",
        drawn=64,
        base=Training(steps=8, batch=8, lr=3e-3, decay=0.9),
        adapt=Training(steps=4, batch=8, lr=0.0, decay=0.9),
        rates=(1e-3, 4e-3),
        tried=2,
        held=16,
        generated=24,
        asked=4,
        batch=16,
        judge_steps=10,
    ),
    extensions=1,
)
FEW = [s for s in settings() if (s.level, s.variant) in {("high", "LoRA"), ("low", "LoRA"), ("low", "LoRTA")}][:3]


def run(out: Path) -> dict[str, Any]:
    return diffusion_converged.run(out, LONG, None, "cpu", Console(quiet=True), pause=0.01)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of all adaptations from now on; few settings are worked off."""
    found: list[str] = []
    genuine = diffusion._train

    def train(experiment: Any, training: Any, words: str, *more: Any) -> list[float]:
        found.append(f"{words}, {training.steps} steps")
        return genuine(experiment, training, words, *more)

    monkeypatch.setattr(diffusion, "_train", train)
    monkeypatch.setattr(diffusion_converged, "settings", lambda: FEW)
    return found


def steady(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its clock."""
    kept = {key: value for key, value in result.items() if key not in ("machine", "base", "judge")}
    return json.loads(json.dumps(kept | {"rows": [{k: v for k, v in r.items() if k != "seconds"} for r in result["rows"]]}))


def test_a_stopped_run_goes_on_and_judges_only_what_is_finished(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine: Callable[..., Any] = diffusion_converged.adapted

    def stops(*arguments: Any) -> Any:
        if arguments[1].startswith("high_LoRA") and arguments[1].endswith("seed_1"):
            raise KeyboardInterrupt
        return genuine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(diffusion_converged, "adapted", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken")
    part = json.loads((tmp_path / "broken" / "diffusion.json").read_text())
    assert [row["variant"] for row in part["rows"] if "frechet" in row][2:] == ["dense fine-tuning"]
    assert part["unfinished"]
    told = report.text(tmp_path / "broken")
    assert "**Unfinished**" in told
    assert "Are dense fine-tuning's samples digits?" in told
    assert "Best at the level" not in told
    # Results are kept without the weights, which are then made again.
    (weights,) = (tmp_path / "broken").rglob("base.safetensors")
    weights.unlink()
    again, done = run(tmp_path / "broken"), len(trained)
    trained.clear()
    whole = run(tmp_path / "whole")
    assert len(trained) == done  # nothing was adapted twice
    assert steady(again) == steady(whole)
    assert not whole["unfinished"]
    for picture in (diffusion_report.SAMPLES, diffusion_report.SCORES):
        assert (tmp_path / "whole" / picture).read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "whole" / "locks").iterdir())
    trained.clear()
    assert steady(run(tmp_path / "whole")) == steady(whole)
    assert not trained

    rows = {row["job"]: row for row in whole["rows"]}
    assert list(rows) == ["real", "none", "dense", *(s.job for s in FEW)]
    assert "skipped" in rows["low_LoRA"]  # too many parameters even with rank 1
    for name in ("dense", "high_LoRA"):
        row = rows[name]
        assert len(row["frechets"]) == len(row["confidences"]) == len(LONG.seeds)
        assert len(set(row["frechets"])) == len(LONG.seeds)
        assert row["frechet"] == pytest.approx(sum(row["frechets"]) / 2)
        level = [float(rate) for rate, loss in row["tried"].items() if loss <= 1.01 * min(row["tried"].values())]
        assert row["rate"] == min(level)
        assert 2 <= len(row["tried"]) <= 3
    text = report.text(tmp_path / "whole")
    for words in (
        "from printed digits to handwritten digits",
        "2 seeds, which draw",
        "the root of the number of seeds",
        "Best at the level high",
        "others a factor apart",
    ):
        assert words in text


def test_a_job_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    bare: Any = None
    own = diffusion.Experiment(LONG.recipe, Store(tmp_path, {}), bare, bare, bare, bare, bare, bare, bare)
    shared = diffusion_converged.Converged(LONG, own, tmp_path)
    with alone(tmp_path / "a.lock"), pytest.raises(Elsewhere):
        shared.job("a", dict)
    assert shared.job("a", lambda: {"loss": 1.0})["loss"] == 1.0
    with alone(tmp_path / "a.lock"):  # what is finished needs no lock
        assert shared.job("a", dict)["loss"] == 1.0


def test_seeds_of_one_setting_are_shared_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def adapted(experiment: Any, job: str, *_: Any) -> dict[str, Any]:
        made.append(job)
        return {"frechet": 1.0, "spread": 1.0, "confidence": 1.0, "loss": 1.0, "shown": ""}

    monkeypatch.setattr(diffusion_converged, "tried_loss", lambda experiment, spec, rate, words: rate)
    monkeypatch.setattr(diffusion_converged, "adapted", adapted)
    bare: Any = None
    own = diffusion.Experiment(LONG.recipe, Store(tmp_path, {}), bare, bare, bare, bare, bare, bare, bare)
    shared = diffusion_converged.Converged(LONG, own, tmp_path)
    setting = diffusion_converged.Setting("dense", {"variant": "dense", "setting": ""}, sl.dense())
    with alone(tmp_path / "dense_0.00025_seed_0.lock"), pytest.raises(Elsewhere):
        shared.row(setting)
    assert made == ["dense_0.00025_seed_1"]
    assert shared.row(setting)["rate"] == 2.5e-4
    assert made == ["dense_0.00025_seed_1", "dense_0.00025_seed_0"]


def test_a_row_over_seeds_is_no_surer_than_its_images() -> None:
    runs = [
        {"frechet": f, "spread": 3.0, "confidence": c, "loss": 0.5, "shown": s}
        for f, c, s in ((9.0, 0.8, "a"), (9.2, 0.9, "b"))
    ]
    row = diffusion_converged.over_seeds(runs)
    assert row["frechet"] == pytest.approx(9.1)
    assert row["confidence"] == pytest.approx(0.85)
    assert row["spread"] == pytest.approx(3.0 / math.sqrt(2))  # the seeds differ by 0.14 alone
    runs[1]["frechet"] = 29.0
    assert diffusion_converged.over_seeds(runs)["spread"] == pytest.approx(10.0)  # 20 / sqrt(2), over sqrt(2)


def test_rates_are_searched_to_the_side_of_the_best() -> None:
    def asked(optimum: float) -> list[float]:
        return sorted(map(float, searched((1e-2, 4e-2), 4.0, 2, lambda rate: abs(math.log(rate / optimum)), best)))

    assert asked(1e-2) == pytest.approx([2.5e-3, 1e-2, 4e-2])
    assert asked(1.0) == pytest.approx([1e-2, 4e-2, 0.16, 0.64])


def test_of_rates_that_are_level_the_lowest_is_taken() -> None:
    assert lowest_level({"0.0025": 0.2012, "0.01": 0.19074, "0.04": 0.19068, "0.16": 0.397}) == 0.01
    assert lowest_level({"0.0025": 0.2012, "0.01": 0.1927, "0.04": 0.1906}) == 0.04
    assert lowest_level({"0.01": math.nan, "0.04": math.inf, "0.0025": 0.5}) == 0.0025
    assert lowest_level({"0.01": math.nan, "0.04": math.nan}) == 0.01


def test_images_are_kept_as_plain_data() -> None:
    images = torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8).transpose(2, 3)
    assert torch.equal(unpacked(json.loads(json.dumps(packed(images)))), images)


@pytest.mark.parametrize(
    ("confidence", "distance", "verdict"),
    [(0.85, 50.0, "**Yes**"), (0.84, 50.0, "**No**"), (0.99, 50.1, "**No**")],
)
def test_whether_samples_are_digits_follows_the_rows(confidence: float, distance: float, verdict: str) -> None:
    real = {"variant": "real test images", "frechet": 10.0, "confidence": 0.97}
    tuned = {"variant": "dense fine-tuning", "frechet": distance, "confidence": confidence}
    assert verdict in diffusion_report.digits_answer({"rows": [real, tuned]})


def test_the_recipe_reaches_all_four_levels() -> None:
    """On the net of the converged scale, and with scikit-learn's 900 scans some are left to adapt to."""
    shapes = attention_shapes(build(diffusion_converged.LONG.recipe.unet, 0))
    assert sum(o * i for o, i in shapes.values()) == 88_064
    made = [one for one in diffusion_converged.wanted(shapes) if isinstance(one, diffusion_converged.Setting)]
    assert {one.about.get("level") for one in made} == {None, "high", "middle", "low", "extremely low"}
    assert len(made) == 19
    assert len({one.job for one in made}) == len(made)
    assert diffusion_converged.LONG.recipe.held < 900 / 2
    assert diffusion_converged.LONG.choice_seed not in diffusion_converged.LONG.seeds
    assert UNet(diffusion_converged.LONG.recipe.unet).shape.size == 16


def test_the_command_knows_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(diffusion_converged, "run", lambda *arguments: asked.append(arguments) or {"rows": []})
    monkeypatch.delenv("SUPERLORA_DATA", raising=False)
    assert main(["reproduce", "diffusion", "--scale", "converged", "--out", str(tmp_path)]) == 0
    assert asked[0][:4] == (tmp_path, diffusion_converged.LONG, None, "cpu")
    assert main(["reproduce", "geometry", "--scale", "converged", "--out", str(tmp_path)]) == 2
    assert "--scale converged goes with diffusion" in capsys.readouterr().err
