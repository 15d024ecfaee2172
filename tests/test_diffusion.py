"""The diffusion experiment: the paper's U-Net and counts, schedules, training that resumes, and the whole run in little."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

from rich.console import Console
from superlora_tn_paper import diffusion, diffusion_report, domains
from superlora_tn_paper.denoising import Schedule, Training, TrainingState, held_out_loss, sample, train
from superlora_tn_paper.diffusion_report import compare
from superlora_tn_paper.diffusion_settings import LEVELS, PAPER_ELEMENTS, level_budget, settings
from superlora_tn_paper.unet import TARGETS, UNet, UNetShape, attention_shapes, build

import superlora_tn as sl

DATA = Path(os.environ.get("SUPERLORA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TINY = UNetShape(size=8, channels=16, multipliers=(1, 2), halvings=1)
RECIPE = diffusion.Recipe(
    unet=TINY,
    schedule=Schedule("cosine", 50),
    drawn=64,
    # Long enough that attention's output layer, which starts at zero, lets q and v through.
    base=Training(steps=40, batch=8, lr=3e-3, decay=0.9),
    adapt=Training(steps=6, batch=8, lr=0.0, decay=0.9),
    rates=(1e-2, 1e-1),
    tried=2,
    held=16,
    generated=24,
    asked=4,
    batch=16,
    judge_steps=10,
)
SHORT = Training(steps=12, batch=8, lr=1e-3, decay=0.9, every=5)
each_schedule = pytest.mark.parametrize("schedule", [Schedule("linear"), Schedule("cosine"), Schedule("linear", 250)], ids=str)


@pytest.fixture(scope="module")
def paper() -> dict[str, tuple[int, int]]:
    """Shapes of q and v as they are in the full-scale model."""
    return attention_shapes(UNet(diffusion.RECIPES["full"].unet))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return domains.abroad("train", 8).images[:64]


def test_the_unet_has_the_papers_q_and_v(paper: dict[str, tuple[int, int]]) -> None:
    assert sorted(paper.values()) == [(64, 64)] * 10 + [(128, 128)] * 32
    assert sum(o * i for o, i in paper.values()) == PAPER_ELEMENTS == 565_248


@pytest.mark.parametrize(("scale", "width"), [("small", 32), ("full", 64)])
def test_the_targets_are_attentions_q_and_v_alone(scale: str, width: int) -> None:
    model = UNet(diffusion.RECIPES[scale].unet)
    assert sl.match(model, TARGETS) == list(attention_shapes(model))
    assert sorted(attention_shapes(model).values()) == [(width, width)] * 10 + [(2 * width, 2 * width)] * 32


PUBLISHED = [
    (sl.lora(8), 75_776),
    (sl.AdapterSpec(sl.CP(13), sl.FlatFold(2, groups=8, stacked=True)), 70_720),
    (sl.superlora(4, order=2, groups=4, projection=sl.Fastfood(0.5)), 8_512),
    (sl.lorta(5, order=3, groups=12), 8_160),
    (sl.lorta(4, order=3), 1_060),
    (sl.lorta(4, order=3, groups=4, projection=sl.Fastfood(0.01)), 832),
    (sl.lorta(1, order=5), 76),
    (sl.dense(), 565_248),
]


@pytest.mark.parametrize(("spec", "count"), PUBLISHED, ids=[str(count) for _, count in PUBLISHED])
def test_the_published_counts_come_out_of_the_model(
    spec: sl.AdapterSpec, count: int, paper: dict[str, tuple[int, int]]
) -> None:
    assert spec.count(paper) == count


def test_the_rule_for_ranks_finds_the_papers_settings(paper: dict[str, tuple[int, int]]) -> None:
    """Each level's largest rank within its budget is the paper's own choice."""
    chosen = []
    for setting in settings():
        try:
            chosen.append(setting.choose(paper))
        except sl.SpecError:
            continue
    assert {spec for spec, count in PUBLISHED if count != PAPER_ELEMENTS} <= {choice.spec for choice in chosen}
    assert all(choice.count <= choice.budget for choice in chosen)


def test_a_level_out_of_reach_says_why(paper: dict[str, tuple[int, int]]) -> None:
    by_name = {(s.level, s.variant): s for s in settings()}
    with pytest.raises(sl.SpecError, match=r"below the smallest possible count, 9,472"):
        by_name["low", "LoRA"].choose(paper)
    with pytest.raises(sl.SpecError, match=r"75,776 parameters is far above the largest possible count, 1,764"):
        by_name["high", "LoNKr"].choose(paper)


def test_on_a_narrow_net_lora_takes_the_middle_levels_upper_part() -> None:
    """Its smallest count, 4,736, is above the budget of 2,368, but below a quarter of the paper's 20,000."""
    shapes = attention_shapes(UNet(diffusion.RECIPES["small"].unet))
    choice = next(s for s in settings() if (s.level, s.variant) == ("middle", "LoRA")).choose(shapes)
    assert (choice.spec, choice.count, choice.budget) == (sl.lora(1), 4_736, 5_000)


def test_budgets_keep_the_papers_proportions() -> None:
    assert [level_budget(level, PAPER_ELEMENTS) for level in LEVELS] == [75_776, 9_472, 1_060, 100]
    assert [level_budget(level, PAPER_ELEMENTS // 4) for level in LEVELS] == [18_944, 2_368, 265, 100]


def test_a_unet_that_does_not_fit_together_says_so() -> None:
    with pytest.raises(ValueError, match=r"multiple of patch \* 2\*\*halvings = 8"):
        UNetShape(size=12)


@each_schedule
def test_alpha_bar_falls_from_image_to_noise(schedule: Schedule) -> None:
    bars = schedule.alpha_bars()
    assert bars.shape == (schedule.times,)
    assert bool((bars[1:] < bars[:-1]).all())
    assert bars[0] > 0.999
    assert 0 < bars[-1] < 1e-4


@pytest.mark.parametrize("times", [1000, 250])
def test_the_schedules_are_the_published_ones(times: int) -> None:
    """Products written apart, in numpy; betas of 1e-4 .. 0.02 at T = 1000 and cos^2 with an offset of 0.008."""
    betas = np.linspace(0.1 / times, 20 / times, times)
    np.testing.assert_allclose(Schedule("linear", times).alpha_bars().numpy(), np.cumprod(1 - betas), rtol=1e-12)
    left = np.cos((np.arange(1, times) / times + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    # The last beta is cut at 0.999, so the last value is not the formula's.  1000 factors of float64 rounding.
    np.testing.assert_allclose(Schedule("cosine", times).alpha_bars().numpy()[:-1], left, rtol=1e-10)


@each_schedule
def test_noising_keeps_unit_variance_and_the_images_share(schedule: Schedule) -> None:
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(400, 3, 8, 8, generator=generator) for _ in range(2))
    for time in (0, schedule.times // 2, schedule.times - 1):
        noised = schedule.noised(images, noise, torch.full((400,), time))
        # 76,800 values: the variance's standard deviation is sqrt(2 / 76,800) = 0.005.
        assert abs(float(noised.var()) - 1) < 0.02
        share = float((noised * images).mean())
        assert abs(share - float(schedule.alpha_bars()[time]) ** 0.5) < 0.02


def test_the_average_follows_its_formula() -> None:
    model = build(TINY, 0)
    run = TrainingState(model, Training(steps=9, batch=1, lr=1e-3, decay=0.9), 0)
    expected = [p.detach().double() for p in run.parameters]
    for step in range(1, 30):
        with torch.no_grad():
            for p in run.parameters:
                p.add_(torch.randn_like(p))
        keep = min(0.9, (1 + step) / (10 + step))
        run.update_average(Training(steps=9, batch=1, lr=1e-3, decay=0.9).keep(step))
        expected = [keep * e + (1 - keep) * p.double() for e, p in zip(expected, run.parameters, strict=True)]
    for mine, other in zip(run.average, expected, strict=True):
        # float32 against float64 over 29 steps of values of a few units.
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-5)


class Killed(Exception):
    """What a test's call-back raises in the middle of a run."""


def _pretrained(images: Tensor, checkpoint: Path | None, stop: int | None = None) -> tuple[UNet, list[float]]:
    def on_step(step: int, steps: int, loss: float) -> None:
        if step == stop:
            raise Killed

    model = build(TINY, 0)
    return model, train(model, images, RECIPE.schedule, SHORT, 0, checkpoint, on_step)


@pytest.fixture(scope="module")
def uninterrupted(digits: Tensor) -> tuple[UNet, list[float]]:
    return _pretrained(digits, None)


@pytest.mark.parametrize("stop", [3, 5, 12])
def test_a_killed_run_goes_on_to_the_same_weights(
    stop: int, digits: Tensor, uninterrupted: tuple[UNet, list[float]], tmp_path: Path
) -> None:
    """Before a checkpoint, at one, and at the end: bit for bit."""
    expected, losses = uninterrupted
    place = tmp_path / "base.pt"
    with pytest.raises(Killed):
        _pretrained(digits, place, stop)
    assert place.is_file() == (stop >= SHORT.every)
    resumed, resumed_losses = _pretrained(digits, place)
    assert resumed_losses == losses
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert not list(tmp_path.iterdir())


def test_training_lowers_the_loss(digits: Tensor) -> None:
    model = build(TINY, 0)
    before = held_out_loss(model, digits, RECIPE.schedule, 0, 16)
    # A net that starts at zero predicts no noise at all: a mean square of 1, give or take sqrt(2 / 12,288).
    assert abs(before - 1) < 0.07
    train(model, digits, RECIPE.schedule, Training(steps=30, batch=16, lr=5e-3, decay=0.9), 0)
    assert held_out_loss(model, digits, RECIPE.schedule, 0, 16) < 0.9


def test_training_without_an_adapter_says_so(digits: Tensor) -> None:
    with pytest.raises(ValueError, match="attach an adapter"):
        train(build(TINY, 0).requires_grad_(False), digits, RECIPE.schedule, RECIPE.adapt, 0)


def test_sampling_is_deterministic_and_its_batches_do_not_matter(uninterrupted: tuple[UNet, list[float]]) -> None:
    model = uninterrupted[0]
    first, again = (sample(model, 6, RECIPE.schedule, 5, 0, 6) for _ in range(2))
    assert first.shape == (6, 3, 8, 8)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    # Other batch sizes sum in other orders: a grey level of rounding at most.
    assert (sample(model, 6, RECIPE.schedule, 5, 0, 4).int() - first.int()).abs().max() <= 1
    assert not torch.equal(sample(model, 6, RECIPE.schedule, 5, 1, 6), first)


def test_a_model_that_diverged_says_so() -> None:
    model = build(TINY, 0)
    with torch.no_grad():
        model.last.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="3 of 3 generated images are not finite"):
        sample(model, 3, RECIPE.schedule, 2, 0, 2)


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
def test_sampling_with_a_perfect_net_gives_the_image_back(predicts: Literal["noise", "velocity"]) -> None:
    """A net that knows the image, and so its noise, leads every start to that image, and has no loss on it."""
    schedule, image = Schedule("linear", 100, predicts), torch.linspace(-0.9, 0.9, 192).reshape(1, 3, 8, 8)
    bars = schedule.alpha_bars().float()

    class Oracle(UNet):
        def forward(self, images: Tensor, times: Tensor) -> Tensor:
            left = bars[times][:, None, None, None]
            noise = (images - left.sqrt() * image) / (1 - left).sqrt()
            return noise if predicts == "noise" else left.sqrt() * noise - (1 - left).sqrt() * image

    drawn = domains.to_bytes((image + 1) / 2).expand(4, -1, -1, -1)
    assert torch.equal(sample(Oracle(TINY), 4, schedule, 10, 0, 4), drawn)
    # The bytes are rounded, by at most 1/255 of [-1, 1]'s 2; so is the noise that is told from them, where little is noise.
    image = domains.to_unit(drawn[:1])
    assert held_out_loss(Oracle(TINY), drawn, schedule, 0, 4) < 1e-6


def test_the_source_is_digits_in_colour_and_the_target_is_grey() -> None:
    home, abroad = domains.home(40, 8, 0), domains.abroad("test", 8)
    assert home.images.shape == (40, 3, 8, 8)
    assert home.images.dtype == abroad.images.dtype == torch.uint8
    assert "no SVHN" in home.words
    assert "scikit-learn" in abroad.words
    assert torch.equal(abroad.images[:, 0], abroad.images[:, 2])
    assert not torch.equal(home.images[:, 0], home.images[:, 2])
    assert torch.equal(domains.home(40, 8, 0).images, home.images)
    assert not torch.equal(domains.home(40, 8, 1).images, home.images)


def test_grey_images_are_the_mean_of_the_colours() -> None:
    colour, grey = domains.home(40, 8, 0).images, domains.home(40, 8, 0, colours=1).images
    assert grey.shape == (40, 1, 8, 8)
    # Rounding to whole grey levels.
    assert (grey[:, 0].float() - colour.float().mean(1)).abs().max() <= 0.5 + 1e-3
    assert domains.abroad("test", 8, colours=1).images.shape == (897, 1, 8, 8)


@pytest.mark.skipif(not (DATA / "svhn_train1083").is_dir(), reason=f"the real digits are not at {DATA}")
def test_real_digits_are_used_where_they_are() -> None:
    home, abroad = domains.home(30, 16, 0, DATA, 1), domains.abroad("test", 16, DATA, 1)
    assert home.words == ("15 variations of the first 1,083 SVHN images and 15 printed digits composed on coloured grounds")
    assert abroad.words == "MNIST, test images"
    assert home.images.shape == (30, 1, 16, 16)
    assert abroad.images.shape == (10_000, 1, 16, 16)
    # Mean of MNIST's test images, 0.1325 of full ink at 28x28, spread over 32x32.
    assert abs(float(abroad.images.float().mean()) / 255 - 0.1325 * (28 / 32) ** 2) < 1e-3
    near = domains.abroad("test", 16, DATA, 1, close=True)
    assert near.images.shape == abroad.images.shape
    # Nearly all ink is in the middle 24x24 pixels; shrinking by 1.5 weighs the empty ones at the edge otherwise.
    assert abs(float(near.images.float().mean()) / 255 - 0.1325 * (28 / 24) ** 2) < 2e-3


def test_the_nearer_source_is_white_ink_on_black() -> None:
    drawn = domains.printed(40, 8, 0)
    assert drawn.images.shape == (40, 1, 8, 8)
    assert drawn.words == "40 printed digits, white ink on black"
    assert torch.equal(domains.printed(40, 8, 0, colours=3).images[:, 2:], drawn.images)
    # No grey paper and no noise, as behind the target's ink; a few are turned or shifted into the corner.
    assert float((drawn.images[:, 0, 0, 0] == 0).double().mean()) > 0.8
    assert int(drawn.images.amax()) > 200


def test_full_svhn_is_read_where_it_is(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    io.savemat(tmp_path / domains.FULL_SVHN, {"X": images, "y": np.array([[1], [10], [3], [9], [2]], np.uint8)})
    found = domains.home(9, 16, 0, tmp_path)
    assert found.words == "SVHN, all 5 training images"
    assert found.labels.tolist() == [1, 0, 3, 9, 2]
    means = images.astype(np.float64).reshape(16, 2, 16, 2, 3, 5).mean((1, 3)).transpose(3, 2, 0, 1)
    # Rounding to whole grey levels.
    assert np.abs(found.images.numpy() - means).max() <= 0.5 + 1e-3


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("diffusion")
    return folder, diffusion.run_recipe(folder, "tiny", RECIPE, None, "cpu", Console(quiet=True))


def test_the_run_writes_its_result_and_two_pictures(outcome: tuple[Path, dict[str, object]]) -> None:
    folder, result = outcome
    assert json.loads((folder / "diffusion.json").read_text()) == json.loads(json.dumps(result))
    for picture in ("diffusion_samples.png", "diffusion_scores.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_every_row_is_complete_or_says_why_not(outcome: tuple[Path, dict[str, object]]) -> None:
    rows = outcome[1]["rows"]
    assert [row["job"] for row in rows] == ["real", "none", "dense", *(s.job for s in settings())]
    shapes = attention_shapes(build(TINY, 0))
    by_job = {s.job: s for s in settings()}
    for row in rows:
        if "skipped" in row:
            with pytest.raises(sl.SpecError):
                by_job[row["job"]].choose(shapes)
            continue
        assert row["frechet"] > 0
        assert row["spread"] > 0
        assert 0.1 <= row["confidence"] <= 1
        if row["job"] in by_job:
            assert row["parameters"] == by_job[row["job"]].choose(shapes).count <= row["budget"]
            assert row["rate"] == min(RECIPE.rates, key=lambda rate: row["tried"][f"{rate:g}"])
    assert sum("rate" in row for row in rows) >= 5  # dense, LoRA, 2D, 2D reshape, LoRTA reach the high level here


def test_adaptation_moves_the_model_away_from_the_base(outcome: tuple[Path, dict[str, object]]) -> None:
    losses = {row["job"]: row["loss"] for row in outcome[1]["rows"] if "loss" in row}
    assert all(loss != losses["none"] for job, loss in losses.items() if job != "none")
    assert losses["dense"] < losses["none"]


def test_a_second_run_takes_up_every_finished_job(outcome: tuple[Path, dict[str, object]]) -> None:
    folder, result = outcome
    before = {path: path.stat().st_mtime_ns for path in (folder / "diffusion_jobs").rglob("*") if path.is_file()}
    again = diffusion.run_recipe(folder, "tiny", RECIPE, None, "cpu", Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in (folder / "diffusion_jobs").rglob("*") if path.is_file()} == before
    assert again["rows"] == result["rows"]


def test_the_report_has_every_row_and_says_what_was_used(outcome: tuple[Path, dict[str, object]]) -> None:
    result = outcome[1]
    text = diffusion_report.report(result)
    for words in ("no SVHN in the data folder", "scikit-learn's 8x8 scans", "It is not FID", "diffusion_scores.png"):
        assert words in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + sum("frechet" in row for row in result["rows"])


def _invented(**scores: float) -> dict[str, object]:
    """A result with these distances, for the answers."""
    rows = [{"job": "real", "variant": "real test images"}, {"job": "none", "variant": "no adaptation"}]
    rows += [{"job": "dense", "variant": "dense fine-tuning", "setting": "", "parameters": 565_248, "rate": 1e-3}]
    high = {"level": "high", "variant": "LoRA", "structure": "", "setting": "r=8", "parameters": 75_776, "rate": 1e-3}
    middle = {"level": "middle", "variant": "LoRTA", "structure": "M=3 G=12", "setting": "M=3 G=12 r=5", "rate": 1e-2}
    rows += [high | {"job": "lora"}, middle | {"job": "lorta", "parameters": 8_160}]
    for row in rows:
        row |= {"frechet": scores[row["job"]], "spread": 0.1}
    return {"rows": rows, "recipe": {"rates": [1e-3, 3e-3, 1e-2]}}


@pytest.mark.parametrize(
    ("lorta", "verdict"), [(3.0, "Yes, and it is better"), (5.1, "Yes: LoRTA"), (9.0, "No, not at this scale")]
)
def test_the_headline_is_computed_from_the_rows(lorta: float, verdict: str) -> None:
    found = diffusion_report.answers(_invented(real=1.0, none=50.0, dense=4.0, lora=5.0, lorta=lorta))
    assert any(verdict in answer and "9.3 times fewer" in answer for answer in found)
    assert "3 of 3 settings chose the smallest or the largest rate that was tried." in found


def test_the_headline_is_not_asked_where_lora_itself_does_not_help() -> None:
    found = diffusion_report.answers(_invented(real=1.0, none=5.0, dense=4.0, lora=5.0, lorta=5.0))
    assert any("Not asked: LoRA itself is not clearly better than no adaptation" in answer for answer in found)


@pytest.mark.parametrize(
    ("missing", "headline", "best"),
    [
        ("high LoRA r=3", False, {"middle"}),
        ("low LoRTA M=3 G=1 r=4", False, {"high", "middle"}),
        ("extremely low LoNKr K=3 G=1 r=1", True, {"high", "middle"}),
        ("middle 2D G=1 r=1", True, {"high"}),
    ],
)
def test_a_question_is_answered_once_its_rows_are_there(missing: str, headline: bool, best: set[str]) -> None:
    result = _invented(real=1.0, none=50.0, dense=4.0, lora=5.0, lorta=5.1) | {"unfinished": [missing]}
    found = diffusion_report.answers(result)
    assert any("Does LoRTA reach LoRA" in answer for answer in found) == headline
    assert {level for level in ("high", "middle") if any(f"Best at the level {level}:" in a for a in found)} == best


def test_without_dense_fine_tuning_nothing_is_judged_yet() -> None:
    result = _invented(real=1.0, none=50.0, dense=4.0, lora=5.0, lorta=5.1) | {"unfinished": ["dense fine-tuning"]}
    result["rows"] = [row for row in result["rows"] if row["job"] != "dense"]
    assert diffusion_report.answers(result) == []
    assert "It is not finished" in diffusion_report.digits_answer(result)


def test_compare_asks_for_two_standard_deviations() -> None:
    row = {"frechet": 5.0, "spread": 0.3}
    # 2 sqrt(0.3^2 + 0.4^2) = 1.
    assert compare(row, {"frechet": 5.9, "spread": 0.4}) == "no clear difference"
    assert compare(row, {"frechet": 6.1, "spread": 0.4}) == "better"
    assert compare(row, {"frechet": 3.9, "spread": 0.4}) == "worse"


def test_an_unknown_scale_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no scale 'huge'"):
        diffusion.run(tmp_path, "huge", None, "cpu", Console(quiet=True))
