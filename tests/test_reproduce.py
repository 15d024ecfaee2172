"""The paper's experiments in miniature: they run, go on where they were stopped, and say what their rows say."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

from rich.console import Console
from superlora_tn_paper import (
    classification,
    classification_report,
    converged,
    converged_report,
    geometry,
    geometry_report,
    report,
)
from superlora_tn_paper.classification import map_words
from superlora_tn_paper.classification_answers import (
    QUESTIONS,
    pairs,
    rank_answer,
    rank_pairs,
    reach_answer,
    reaching,
    summary,
    tenth_answer,
    tenths,
)
from superlora_tn_paper.classification_settings import settings
from superlora_tn_paper.classification_training import Recipe, adapted
from superlora_tn_paper.command import EXPERIMENTS, Request, reproduce
from superlora_tn_paper.converged_report import Steps
from superlora_tn_paper.differences import difference, within_by_chance
from superlora_tn_paper.markdown import percent
from superlora_tn_paper.rates import best_scored
from superlora_tn_paper.task import MEAN, STD, Memory, Subset, Task, TaskError, folder_task
from superlora_tn_paper.vit import Vit

from superlora_tn.cli import main, parser
from superlora_tn.demo import experiments
from superlora_tn.demo.base import DigitsRecipe

DATA = Path(os.environ.get("SUPERLORA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
VIT = {f"layers.{k}.self_attn.{part}": (128, 128) for k in range(6) for part in ("q_proj", "v_proj")}
TINY = Recipe(steps=4, batch=8, rates=(1e-3, 4e-3), head_rates=(1e-2,), seeds=(0, 1), apart=0.2, look=450)
DIGITS = DigitsRecipe(dim=16, layers=2, heads=2, pool=256, base_steps=8, base_batch=32)
VOLATILE = ("seconds", "step_seconds", "machine")


def few(shapes, _=()):
    """Enough settings to ask something, few enough to be quick."""
    every = settings(shapes)
    return [s for v in ("dense", "LoRA", "LoRTA M=3", "shuffled LoRTA") for s in [e for e in every if e.variant == v][:2]]


@pytest.fixture
def short(monkeypatch):
    """Both experiments with few settings; counts the trainings, and can break one off."""
    calls = {"made": 0, "stop": None}
    genuine = classification.descend

    def descend(*args):
        if calls["made"] == calls["stop"]:
            raise KeyboardInterrupt
        calls["made"] += 1
        return genuine(*args)

    monkeypatch.setattr(classification, "settings", few)
    monkeypatch.setattr(classification, "descend", descend)
    return calls


def go(out: Path, experiment: str = "classification", **more):
    return reproduce(Request(experiment, out, digits=DIGITS, **more), recipes={"digits": TINY, "full": TINY})


def steady(value):
    """Without what the clock wrote."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    return [steady(v) for v in value] if isinstance(value, list) else value


def test_the_experiments_are_found_in_the_checkout_where_they_are_not_installed():
    place = Path(experiments.CHECKOUT.parents[1])
    found = (
        f"import sys; sys.path[:0] = [{str(place)!r}, {str(place / 'backends')!r}]\n"
        "from superlora_tn.demo.experiments import find_experiments\n"
        "before = list(sys.path); find_experiments(); once = list(sys.path); find_experiments()\n"
        "import superlora_tn_paper\n"
        "print(once == sys.path, [p for p in sys.path if p not in before], superlora_tn_paper.__file__)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, env=environment, timeout=120)
    init = experiments.CHECKOUT / "superlora_tn_paper" / "__init__.py"
    installed = f"True [] {done.stdout.split()[-1]}\n"  # of whoever has installed them as well
    assert done.stdout in (f"True [{str(experiments.CHECKOUT)!r}] {init}\n", installed), done.stderr


def test_where_the_experiments_are_not_it_is_said_how_to_get_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(experiments, "CHECKOUT", tmp_path)
    assert main(["reproduce", "geometry", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(
        "superlora-tn reproduce: the paper's experiments are a package of their own, superlora_tn_paper,"
    )
    assert "pip install ./benchmarks/paper" in told.err
    assert told.err.count("\n") == 1


def test_a_stopped_command_says_that_it_goes_on(monkeypatch, tmp_path, capsys):
    def stop(request, as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr("superlora_tn_paper.command.reproduce", stop)
    assert main(["reproduce", "geometry", "--out", str(tmp_path)]) == 130
    assert "what is finished is kept, and the same command goes on from there" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(tmp_path, short):
    whole = go(tmp_path / "whole")
    trainings = short["made"]
    short.update(made=0, stop=trainings // 2)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "broken")
    short.update(made=0, stop=None)
    again = go(tmp_path / "broken")
    assert short["made"] == trainings - trainings // 2
    assert steady(again) == steady(whole)
    short.update(made=0)
    assert go(tmp_path / "broken") == again
    assert short["made"] == 0


def test_classification_and_geometry_share_their_runs_and_their_report(tmp_path, short):
    result = go(tmp_path)
    assert [len(row["accuracies"]) for row in result["rows"]] == [2] * len(few(VIT))
    assert all(0 <= a <= 1 for row in result["rows"] for a in row["accuracies"])
    assert result["head_parameters"] == 10 * (16 + 1)
    short.update(made=0)
    found = go(tmp_path, "geometry")
    assert short["made"] == 0  # every run was there, with its adapter
    by_name = {row["variant"]: row for row in found["rows"]}
    for weight in by_name["LoRA"]["weights"][0].values():
        assert weight["left"] > 0  # trained away from zero
        assert 0 < weight["scaled"] < 1
    for weight in by_name["dense"]["weights"][0].values():  # a dW of zero: no direction, and all of the distance
        assert weight["left"] == weight["right"] == 0
        assert weight["distance"] > 0
    text = (tmp_path / "report.md").read_text()
    for heading in ("# Image classification", "# Geometry", "Does dE fall", "What does shuffling give?"):
        assert heading in text
    for picture in (classification_report.PARETO, geometry_report.LAYERS, geometry_report.COUNTS):
        assert f"({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for name, data in (("classification", result), ("geometry", found)):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(data))


def test_rates_are_chosen_without_test_images(tmp_path, short, monkeypatch):
    """Labels of the test images change nothing but the accuracies that are reported."""
    first = go(tmp_path / "one")
    from superlora_tn_paper import command, task

    def shifted(*arguments):
        made = task.digits_task(*arguments)
        source = made.test.source
        return replace(made, test=task.Subset.whole(task.Memory(source.images, (source.labels + 1) % 10)))

    monkeypatch.setattr(command, "digits_task", shifted)
    second = go(tmp_path / "two")
    assert second["tried"] == first["tried"]
    assert [r["train_losses"] for r in second["rows"]] == [r["train_losses"] for r in first["rows"]]
    assert second["head_only"] != first["head_only"]


def test_the_settings_span_from_under_100_to_over_100_000_parameters_on_the_small_vit():
    every = settings(VIT)
    counts = [s.spec.count(VIT) for s in every]
    assert counts == [s.parameters for s in every]
    assert min(counts) < 100
    assert max(counts) > 100_000
    assert len({s.job for s in every}) == len(every) >= 25
    page = " ".join((RESULTS.parent / "reproduce.md").read_text().split())
    assert f"adapted by {len(every)} settings of all variants: from {min(counts):,} to {max(counts):,} parameters" in page
    kinds = {"dense", "LoRA", "2D", "2D reshape", "LoKr", "LoNKr", "LoTR", "LoRTA M=3", "LoRTA M=4", "LoRTA M=5"}
    assert {s.variant for s in every} > kinds


def made_up(gain):
    """Rows of the small ViT's settings: accuracies 0.3, 0.31, 0.32 over the seeds and a setting's own gain."""
    return [
        {
            "variant": s.variant,
            "words": s.words,
            "order": s.order,
            "groups": s.groups,
            "projection": map_words(s),
            "parameters": s.parameters,
            "accuracies": [0.3 + 0.01 * k + gain(s) * (1 + k / 100) for k in range(3)],
        }
        for s in settings(VIT)
    ]


@pytest.mark.parametrize(("title", "what", "test"), QUESTIONS, ids=[what for _, what, _ in QUESTIONS])
def test_every_question_has_a_pair_at_equal_counts_on_the_small_vit(title, what, test):
    found = list(pairs(made_up(lambda s: 0.0), test))
    if what == "more modes":
        assert {p.second["variant"] for p in found} == {"LoRTA M=4"}
    assert found
    assert summary(found, what).startswith("At equal parameters")
    seconds = {(p.second["variant"], p.second["words"]) for p in found}
    up = list(pairs(made_up(lambda s: 0.1 * ((s.variant, s.words) in seconds)), test))
    assert f"raised accuracy in {len(found)} and lowered it in 0; {len(found)} of these clearly" in summary(up, what)
    down = list(pairs(made_up(lambda s: -0.1 * ((s.variant, s.words) in seconds)), test))
    assert f"raised accuracy in 0 and lowered it in {len(found)}" in summary(down, what)


@pytest.mark.parametrize(("gain", "answer"), [(0.1, "**Yes**"), (0.0, "**Yes**"), (-0.1, "**No, this did not reproduce")])
def test_the_answer_about_a_tenth_follows_the_rows(gain, answer):
    found = tenths(made_up(lambda s: gain * s.variant.startswith("LoRTA")))
    assert len(found) == 5  # no LoRTA is near a tenth of the largest LoRA
    assert all(5 <= p.first["parameters"] / p.second["parameters"] <= 20 for p in found)
    assert tenth_answer(found).startswith(answer)


@pytest.mark.parametrize("enough", [0, 500, 10**9])
def test_the_count_from_which_lorta_reaches_lora_follows_the_rows(enough):
    rows = made_up(lambda s: -0.1 * (s.variant.startswith("LoRTA") and s.parameters < enough))
    told = reach_answer(reaching(rows))
    counts = sorted(r["parameters"] for r in rows if r["variant"].startswith("LoRTA"))
    reached = [count for count in counts if count >= enough]
    assert (f"**from {reached[0]:,} parameters on**" if reached else "at **no count**") in told
    assert reach_answer([]).startswith("Not answered")


def test_only_what_needs_a_missing_setting_is_left_open():
    rows = made_up(lambda s: 0.0)
    rows = [{**r, "tried": {}, "edge": False, "longer": {}} for r in rows]
    whole = converged_report._questions(rows, [], {})
    for variant, opened in (("LoRA", 1), ("SuperLoRA K=2", 1), ("shuffled LoRTA", 1), ("LoTR", 0)):
        missing = [r for r in rows if r["variant"] == variant]
        assert missing
        part = converged_report._questions([r for r in rows if r["variant"] != variant], missing, {})
        assert sum(one.startswith(converged_report.OPEN) for one in part) == opened, variant
        kept = [one for one in part if not one.startswith(converged_report.OPEN)]
        assert set(kept) <= set(whole)


def test_a_flat_ladder_of_ranks_is_said_to_prove_little():
    flat = rank_pairs(made_up(lambda s: 0.0))
    rising = rank_pairs(made_up(lambda s: 1e-6 * s.parameters))
    assert rank_answer(flat).startswith("**No**")
    assert rank_answer(rising).startswith("Yes: 32 times")


def test_a_difference_is_judged_by_its_spread_over_the_seeds():
    assert difference([0.1, 0.2, 0.3], [0.2, 0.1, 0.31]).verdict == "no difference seen"
    assert difference([0.1, 0.2, 0.3], [0.11, 0.24, 0.33]).verdict == "a hint: more"  # 0.027 +- 0.009, t = 3.02 < 4.303
    assert difference([0.1, 0.2, 0.3], [0.05, 0.151, 0.249]).verdict == "clear: less"
    assert difference([0.1], [0.9]).verdict == "one seed: not judged"
    for seeds in (2, 3, 5):  # one seed alone moves: mean and standard error are equal, and rounding does not decide
        for right in range(1100, 1400):
            first = [right / 1500] * seeds
            assert difference(first, [(right + 10) / 1500, *first[1:]]).sign == 0
    # Student's t between -1 and 1, in closed form for one and two degrees of freedom; for many the normal distribution.
    assert within_by_chance(2) == pytest.approx(0.5, abs=1e-6)
    assert within_by_chance(3) == pytest.approx(3**-0.5, abs=1e-6)
    assert within_by_chance(300) == pytest.approx(math.erf(0.5**0.5), abs=2e-3)  # apart by about 1 / (4 * 300)


@pytest.mark.parametrize("folder", sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_the_committed_reports_are_what_their_results_say(folder):
    assert report.text(folder) == (folder / "report.md").read_text()


def trends(rise):
    """A geometry result in which all measures of two LoRA settings differ by `rise`, and dense lies at distance 1."""

    def weights(value):
        return [
            {f"layers.0.{n}": dict.fromkeys(geometry_report.SHORT, value + 0.001 * k) for n in ("q", "v")} for k in range(3)
        ]

    rows = [("dense", 1000, 1.0), ("LoRA", 10, 0.5), ("LoRA", 100, 0.5 + rise)]
    return {
        "machine": {"date": "a day", "device": "a core", "threads": "1", "torch": "2"},
        "task": "a task",
        "directions": 5,
        "side": 64,
        "rows": [{"variant": v, "words": str(n), "parameters": n, "weights": weights(x)} for v, n, x in rows],
    }


def test_the_geometry_report_follows_the_rows():
    rising, falling = geometry_report.report(trends(0.1)), geometry_report.report(trends(-0.1))
    assert "dL rises: **yes**, in 2 of 2" in rising
    assert "dE falls: **no**, in 0 of 2" in rising
    assert "dL rises: **no**, in 0 of 2" in falling
    assert "dE falls: **yes**, in 2 of 2" in falling
    assert "q: dE is below that of no change (1.001) in 2 of 2 settings" in rising


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A tiny ViT and a tiny set of images on disk, as the hub would give them; the network is out of reach."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=7,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    columns = datasets.Features(
        {
            "img": datasets.Image(),
            "coarse_label": datasets.ClassLabel(names=["x", "y"]),
            "fine_label": datasets.ClassLabel(names=["a", "b", "c"]),
        }
    )
    noise = torch.randint(256, (40, 12, 12, 3), dtype=torch.uint8).numpy()
    (tmp_path / "images").mkdir()
    for split, rows in (("train", range(30)), ("test", range(30, 40))):
        data = {
            "img": [Image.fromarray(noise[k]) for k in rows],
            "coarse_label": [k % 2 for k in rows],
            "fine_label": [k % 3 for k in rows],
        }
        datasets.Dataset.from_dict(data, columns).to_parquet(tmp_path / "images" / f"{split}-00000-of-00001.parquet")
    return str(tmp_path / "model"), str(tmp_path / "images")


def test_the_full_scale_runs_on_local_files(tmp_path, local, short):
    model, data = local
    result = go(tmp_path / "out", scale="full", model=model, data=data)
    assert result["classes"] == 3  # the finer of the two labels
    assert result["images"] == {"train": 30, "apart": 6, "test": 10}
    assert result["weights"] == 4
    assert (tmp_path / "out" / "report.md").is_file()


def test_names_that_cannot_be_loaded_are_answered_with_what_to_do(tmp_path, local, capsys):
    model, data = local
    for arguments, expected in (
        (["--model", model, "--data", "no/such-images"], "the data set 'no/such-images' cannot be loaded"),
        (["--model", "no/such-model", "--data", data], "the model 'no/such-model' cannot be loaded"),
    ):
        assert main(["reproduce", "classification", "--scale", "full", "--out", str(tmp_path / "o"), *arguments]) == 2
        told = capsys.readouterr().err
        assert expected in told
        assert "and give its folder" in told


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "nowhere"], "the data folder nowhere has no weights_vit_cifar10/vit_cifar10.pth; give another --data"),
        (["--model", "some/vit"], "--model some/vit goes with --scale full"),
        (["--domain", "mnist"], "--domain mnist goes with a data folder, and not with --scale full"),
        (["--domain", "mnist", "--scale", "full"], "--domain mnist goes with a data folder, and not with --scale full"),
        (["--data", "nowhere", "--domain", "cats"], "there is no domain 'cats'; choose one of tinyimagenet30, mnist"),
        (["--scale", "converged"], "and with classification or geometry and a data folder: --data FOLDER"),
        (["--scale", "early-stopping", "--data", "nowhere"], "with a data folder (--data FOLDER, or SUPERLORA_DATA) and with"),
        (
            ["--scale", "early-stopping", "--domain", "mnist"],
            "early-stopping goes with classification or geometry, with a data",
        ),
        (["--device", "cuda"], "torch sees no GPU here; use --device cpu"),
    ],
)
def test_a_wrong_request_is_answered_in_words(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SUPERLORA_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["reproduce", "classification", "--out", str(tmp_path), *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_diffusion_does_not_fall_back_in_silence_where_a_data_folder_is_wrong(tmp_path, capsys):
    assert main(["reproduce", "diffusion", "--data", "nowhere", "--out", str(tmp_path)]) == 2
    assert "the data folder nowhere is not there" in capsys.readouterr().err
    for option in ("--model", "--domain"):
        assert main(["reproduce", "diffusion", option, "x", "--data", "nowhere", "--out", str(tmp_path)]) == 2
        assert f"{option} x goes with classification and geometry" in capsys.readouterr().err


def test_the_commands_grammar_names_the_experiments_that_there_are():
    commands = next(action for action in parser()._actions if action.dest == "command").choices
    words = next(action for action in commands["reproduce"]._actions if action.dest == "experiment")
    assert sorted(words.choices) == sorted(EXPERIMENTS)


def noise_task(bar=None):
    """A tiny ViT with weights that a seed fixes, and noise of three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Vit(dim=16, depth=2, heads=2, hidden=32, patch=16).eval()
        images, labels = torch.randn(80, 3, 32, 32), torch.arange(80) % 3
    own = Memory(images, labels)
    train, test = Subset(own, torch.arange(60)), Subset(own, torch.arange(60, 80))
    return Task("a tiny ViT on noise", model, "mlp_head.1", ("q_proj", "v_proj"), train, test, "noise")


SHORT = converged.ConvergedRecipe(images=32, steps=3, batch=8, extensions=2, seeds=(0, 1), more_seeds=(0, 1, 2), apart=0.2)


def test_rates_are_multiplied_so_that_every_setting_moves_equally_far_at_first():
    task = noise_task()
    batch = next(task.train.drawn(1, 16, 0))
    sizes = 4 * 16 * 16
    for setting in settings(task.shapes):
        with adapted(task, setting.spec, 0) as tuned:
            own = list(tuned.parameters())
            before = [p.detach().clone() for p in own]
            times = converged.rate_times(task, tuned, batch, stride=0.1)
            assert all(map(torch.equal, own, before))
            loss = torch.nn.functional.cross_entropy(task.logits(batch[0]), batch[1])
            with torch.no_grad():
                for p, slope in zip(own, torch.autograd.grad(loss, own), strict=True):
                    p.sub_(1e-5 * times * slope.sign())
            # The factors that are not zero move too, by up to a hundredth of themselves.
            assert converged.moved(tuned) == pytest.approx(1e-5 * 0.1 * sizes**0.5, rel=0.02), setting.job
            if setting.variant == "dense":
                assert times == pytest.approx(0.1, rel=1e-4)


def test_the_grid_of_rates_is_extended_while_the_best_is_at_its_edge(tmp_path, monkeypatch):
    def tried(optimum):
        asked = []

        def job(self, setting, rate, seed, judged, prefix="", times=1):
            asked.append(rate)
            return {"loss": abs(math.log(rate / optimum)), "accuracy": 0.5}

        monkeypatch.setattr(converged.Converged, "job", job)
        own = converged.Converged(noise_task(), SHORT, converged.Store(tmp_path, {}), None, tmp_path)
        found = own.rates(own.settings[0])
        assert len(asked) == len(found)
        return sorted(asked)

    assert tried(1e-2) == [2.5e-3, 1e-2, 4e-2]
    assert tried(0.16) == [2.5e-3, 1e-2, 4e-2, 0.16, 0.64]
    assert tried(1e-9) == pytest.approx([2.5e-3 / 16, 2.5e-3 / 4, 2.5e-3, 1e-2, 4e-2])  # it gives up, and says so


def test_the_lines_alone_are_dense_lora_and_lorta_without_groups(tmp_path):
    short = dataclasses.replace(SHORT, lines=True)
    own = converged.Converged(noise_task(), short, converged.Store(tmp_path, {}), None, tmp_path)
    assert [s.variant for s in own.settings] == ["dense"] + ["LoRA"] * 3 + ["LoRTA M=3"] * 4
    assert {s.groups for s in own.settings} == {0, 1}
    assert [s.rank for s in own.settings[1:4]] == [1, 4, 16]
    sample = converged.Converged(own.task, dataclasses.replace(short, sample=True), own.store, None, tmp_path)
    assert sample.settings == sample.checked() == own.checked()
    assert [s.variant for s in sample.settings] == ["dense", "LoRA", "LoRTA M=3"]
    assert sample.settings[1].rank == 4
    rows = [{**converged._about(s), "accuracies": [0.5, 0.6]} for s in own.settings]
    told = "\n".join(converged_report._questions(rows, [], {"lines": True}))
    assert "reach LoRA's accuracy" in told
    assert "grouping" not in told


def test_a_rate_is_chosen_by_accuracy_as_far_as_it_tells_and_then_by_loss():
    """On 400 images the standard error of 80 % is 2 points."""
    scores = {"0.01": (0.70, 0.5), "0.04": (0.785, 0.9), "0.16": (0.80, 1.0), "0.64": (0.10, math.nan)}
    found = {rate: dict(zip(("accuracy", "loss"), one, strict=True)) for rate, one in scores.items()}
    assert best_scored(found, 400) == 0.04
    assert best_scored(found, 4000) == 0.16
    assert best_scored(found, 10) == 0.01


def test_a_job_of_another_process_is_left_to_it(tmp_path):
    with converged.alone(tmp_path / "a.lock"):
        with pytest.raises(converged.Elsewhere), converged.alone(tmp_path / "a.lock"):
            pass
        with converged.alone(tmp_path / "b.lock"):
            pass
    with converged.alone(tmp_path / "a.lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_runs_to_convergence_go_on_where_they_were_stopped_and_judge_only_what_is_finished(tmp_path, monkeypatch):
    made = []
    genuine = converged.descend

    def descend(*arguments):
        if len(made) == 9:
            made.append(None)
            raise KeyboardInterrupt
        made.append(arguments[3])
        return genuine(*arguments)

    monkeypatch.setattr(converged, "settings", few)
    monkeypatch.setattr(converged, "descend", descend)

    def go_on(out):
        return converged.run(out, SHORT, noise_task, Console(quiet=True))

    with pytest.raises(KeyboardInterrupt):
        go_on(tmp_path / "broken")
    part = json.loads((tmp_path / "broken" / "classification.json").read_text())
    assert [(r["variant"], len(r["seeds"]), r["longer"]) for r in part["rows"]] == [("dense", 2, {})]  # more steps are last
    assert part["unfinished"]
    told = report.text(tmp_path / "broken")
    assert "**Unfinished**" in told
    assert f"## Has it converged?\n\n{converged_report.OPEN} LoRA" in told
    assert told.count(converged_report.OPEN) >= 2
    again, trained = go_on(tmp_path / "broken"), len(made) - 1
    whole = go_on(tmp_path / "whole")
    assert len(made) - 1 == 2 * trained  # nothing was trained twice
    assert steady(again) == steady(whole)
    assert not whole["unfinished"]
    assert 2 * SHORT.steps in made
    by_name = {r["variant"]: r for r in whole["rows"]}
    assert (len(by_name["dense"]["accuracies"]), len(by_name["LoRA"]["accuracies"])) == (2, 3)
    told = report.text(tmp_path / "whole")
    assert converged_report.OPEN not in told
    ran = by_name["dense"]["accuracies"], by_name["dense"]["longer"]["2"]
    assert "| variant | setting | 3 steps | 6 steps |" in told
    assert f"| dense |  | {' | '.join(map(percent, ran))} |" in told
    assert (tmp_path / "whole" / converged_report.PARETO).read_bytes().startswith(b"\x89PNG")

    def compared(out):
        return geometry.run_converged(out, SHORT, noise_task, Console(quiet=True))

    before = len(made)
    found = compared(tmp_path / "whole")
    assert len(made) == before  # from the adapters that the runs have kept
    assert found["rows"][0]["variant"] == "dense"
    assert all(len(r["weights"]) == len(SHORT.seeds) for r in found["rows"])
    for kept in tmp_path.glob("whole/classification_jobs/*/*_seed_0.adapter"):
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    assert steady(compared(tmp_path / "whole")) == steady(found)  # trained again to the same numbers
    assert len(made) == before + len(found["rows"])
    with pytest.raises(TaskError, match="until dense fine-tuning and others are finished"):
        compared(tmp_path / "nothing")


@pytest.mark.parametrize(("gain", "answer"), [(0.06, "**Yes**"), (0.04, "**No**")])
def test_dense_fine_tuning_is_compared_with_the_head_of_its_seeds(gain, answer):
    row = {"variant": "dense", "words": "", "heads": [0.7, 0.72], "accuracies": [0.7 + gain, 0.72 + gain]}
    assert answer in converged_report.head_answer([row])


@pytest.mark.parametrize(
    ("rises", "answers", "end"),
    [
        ((0.0, 0.0), ("**no**", "**no**"), "So 100 steps are enough for them."),
        ((0.1, 0.0), ("**yes**, 1 of 2 (1 clearly)", "**no**"), "So 200 steps are enough for them."),
        ((-0.1, 0.0), ("**yes**, 1 of 2 (1 clearly)", "**no**"), "So 200 steps are enough for them."),
        (
            (0.0, 0.1),
            ("**no**", "**yes**, 1 of 2 (1 clearly)"),
            "So none of the numbers of steps that were tried is enough for all.",
        ),
        ((0.1,), ("**yes**, 1 of 2 (1 clearly)",), "So none of the numbers of steps that were tried is enough for all."),
    ],
)
def test_from_how_many_steps_on_more_change_nothing_follows_the_rows(rises, answers, end):
    """Of two settings one is moved."""
    spread, at = (0.70, 0.72, 0.73, 0.9), [0.0, *itertools.accumulate(rises)]
    noise = [(0.0, 0.0, 0.0), (0.01, -0.01, 0.0), (0.0, 0.01, -0.01)]  # seed by seed: no mean, so that there is an error

    def run(times, moved):
        return [a + moved * at[times] + own for a, own in zip(spread, noise[times], strict=False)]

    def row(variant, moved):
        longer = {str(2**k): run(k, moved) for k in range(1, len(at))}
        return {"variant": variant, "words": "", "accuracies": list(spread), "longer": longer}

    told = converged_report.longer_answer([row("dense", 0.0), row("LoRA", 1.0)], Steps(100)).splitlines()
    steps = [f"- {100 * 2**k} steps to {200 * 2**k} steps: {answer}: " for k, answer in enumerate(answers)]
    assert [any(one.startswith(start) for one in told) for start in steps] == [True] * len(steps)
    assert sum(one.startswith("- ") for one in told) == len(steps)
    assert told[-1].startswith(end + " Where nothing changes")
    assert told[-1].endswith("in about 33% of such checks alone.")  # of two settings; Student's t of two degrees: 1 / sqrt(3)
    assert "not run" in converged_report.longer_answer([], Steps(100))


def test_the_largest_change_stands_beside_what_the_test_images_can_tell():
    rows = [
        {"accuracies": [0.5, 0.5], "longer": {"2": [0.52, 0.54], "4": [0.48, 0.48]}},
        {"accuracies": [0.9, 0.9, 0.9], "longer": {"2": [0.9, 0.9], "4": [0.9, 0.9]}},
    ]
    told = converged_report.size_answer(rows, 100)  # from 0.53 down to 0.48; sqrt(0.9 * 0.1 / 100) and sqrt(0.5 * 0.5 / 100)
    assert told.startswith("The largest change is 5.0 points; one accuracy on 100 test images has")
    assert "of 3.0 to 5.0 by the images alone" in told
    assert "not run" in converged_report.size_answer([], 100)


@pytest.mark.parametrize(
    ("gaps", "answer"),
    [
        ((0.1, 0.2, 0.1), ": **yes**."),
        ((0.1, 0.2, -0.1), ": **no**."),
        ((0.1, 0.0, 0.1), "**not seen to change**"),
        ((0.1, 0.0, -0.1), ": **no**."),
    ],
)
def test_the_order_after_more_steps_follows_the_rows(gaps, answer):
    def row(variant, lower):
        runs = [[0.8 - gap * lower + noise for noise in (0.0, 0.01, -0.01)] for gap in gaps]
        return {"variant": variant, "words": "", "accuracies": [*runs[0], 0.0], "longer": {"2": runs[1], "4": runs[2]}}

    def apart(gap):
        return f"{-100 * gap + 0:+.1f} (standard error 0.0)"

    told = converged_report.order_answer([row("dense", 0), row("LoRA", 1)], Steps(100))
    assert answer in told
    wanted = [f"{apart(gap)} after {steps} steps" for gap, steps in zip(gaps, (100, 200, 400), strict=True)]
    assert told.splitlines()[-1] == f"- LoRA less dense: {'; '.join(wanted)}."
    assert "not run" in converged_report.order_answer([], Steps(100))


@pytest.mark.skipif(not (DATA / "weights_vit_cifar10").is_dir(), reason=f"there is no data folder at {DATA}")
@pytest.mark.parametrize(("target", "classes"), [("tinyimagenet30", 30), ("mnist", 10)])
def test_the_data_folder_is_read_as_its_own_reader_reads_it(target, classes):
    own = importlib.util.spec_from_file_location("shared_data", DATA / "load.py")
    reader = importlib.util.module_from_spec(own)
    own.loader.exec_module(reader)
    task = folder_task(DATA, target, "cpu")
    assert task.classes == classes
    assert task.shapes == {f"transformer.{name}": shape for name, shape in VIT.items()}
    [(images, labels)] = task.test.in_order(len(task.test.rows))
    expected, own_labels = reader.tinyimagenet("val") if target == "tinyimagenet30" else reader.mnist("test")
    assert images.shape == (1500, 3, 32, 32)
    assert labels.tolist() == own_labels[:1500].tolist()
    if target == "tinyimagenet30":
        back = (images.permute(0, 2, 3, 1) * STD + MEAN) * 255
        torch.testing.assert_close(back, torch.tensor(expected).float(), rtol=0, atol=1e-2)  # of 255; float32 there and back
    train, apart = task.train.cut(0.04, seed=1)
    assert len(train.rows) + len(apart.rows) == 15_000
    assert not set(train.rows.tolist()) & set(apart.rows.tolist())
