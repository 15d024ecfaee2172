"""Training that ends by itself: when it ends, what it keeps, and that neither looking nor going on changes it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

from rich.console import Console
from superlora_tn_paper import converged, report
from superlora_tn_paper.stopping import Stop, calibrated_loss, descend_until
from superlora_tn_paper.task import Memory, Subset, Task
from test_reproduce import SHORT, few, noise_task

QUICK = Stop(every=2, patience=6, most=20, better=0.1, memory=0.9, warmup=3)


def linear_task() -> Task:
    """Sixty random images of 4 x 4 points in three classes, a linear map."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(60, 1, 4, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    whole = Subset.whole(Memory(images, labels))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    return Task("a linear map", model, "1", (), whole, whole, "linear")


def run(stop: Stop, losses, longer=(), steps=200):
    """A run whose looks give these losses one after another, and the parameters after each step."""
    task, raw, looks = linear_task(), [], iter(losses)
    layer = task.model[1]

    def show(step, end, loss):
        raw.append(layer.weight.detach().clone())

    groups = [([layer.weight], 0.05), ([layer.bias], 0.01)]
    ends = descend_until(task, groups, task.train.drawn(steps, 8, seed=0), stop, lambda: next(looks), show, longer)
    return ends, raw


def expected(stop: Stop, losses, longer):
    """By the words of `Stop`: (best step, steps) of each end."""
    looks = {0: losses[0]} | {stop.every * k: loss for k, loss in enumerate(losses[1:], 1)}

    def best_until(step):
        best = 0
        for at in sorted(looks):
            if at <= step and looks[at] < looks[best] * (1 - stop.better):
                best = at
        return best

    end = next(n for n in itertools.count(1) if n >= best_until(n) + stop.patience or n == stop.most)
    return [(best_until(n), n) for n in (end, *(times * end for times in longer))]


@given(
    st.lists(st.sampled_from([0.5, 0.7, 0.75, 0.9, 1.0, math.nan]), min_size=41, max_size=41),
    st.sampled_from([(), (2,), (2, 4)]),
)
def test_a_run_ends_when_nothing_better_was_seen_for_as_long_as_its_patience(losses, longer):
    losses = [1.0, *losses]
    ends, _ = run(QUICK, losses, longer)
    assert [(one.best, one.steps) for one in ends] == expected(QUICK, losses, longer)


def test_what_is_kept_is_the_average_of_the_parameters_at_the_best_look():
    losses = [1.0, 0.9, 0.8, 0.5, *[0.6] * 20]
    [end], raw = run(QUICK, losses)
    assert (end.best, end.steps, end.loss) == (6, 12, 0.5)
    average = torch.zeros(3, 16, dtype=torch.float64)
    for step, weight in enumerate(raw[:6], 1):
        keep = min(0.9, step / (step + 10))
        average = keep * average + (1 - keep) * weight.double()
    torch.testing.assert_close(end.values[0].double(), average, rtol=1e-5, atol=1e-7)  # six steps in float32
    assert not torch.allclose(end.values[0], raw[5], atol=1e-4)


def test_rates_rise_and_are_then_constant_whatever_the_most_steps():
    """Adam's first step moves each number by the rate."""
    _, raw = run(QUICK, [1.0] * 20)
    torch.testing.assert_close(raw[0].abs(), torch.full_like(raw[0], 0.05 / 3), rtol=1e-3, atol=0)  # Adam's eps
    for most in (5, 50):
        _, other = run(dataclasses.replace(QUICK, most=most), [1.0] * 20)
        assert all(map(torch.equal, other, raw))


def test_looking_changes_nothing_and_sees_the_average():
    task = linear_task()
    layer, seen = task.model[1], []

    def judge():
        task.model.eval()  # as who scores it does
        seen.append(layer.weight.detach().clone())
        return 1.0

    stop = dataclasses.replace(QUICK, every=1)
    [end] = descend_until(
        task, [([layer.weight], 0.05), ([layer.bias], 0.01)], task.train.drawn(9, 8, seed=0), stop, judge, lambda *_: None
    )
    assert (end.best, end.steps) == (0, 6)
    assert torch.equal(end.values[0], torch.zeros(3, 16))
    _, raw = run(QUICK, [1.0] * 20)
    assert torch.equal(layer.weight, raw[-1])
    average = raw[0] * (10 / 11)
    torch.testing.assert_close(seen[1], average, rtol=1e-5, atol=1e-8)


def test_a_run_that_goes_on_has_what_it_would_have_had_without():
    losses = [1.0, 0.9, 0.8, 0.5, *[0.6] * 6, 0.1, *[0.2] * 30]
    [alone], _ = run(QUICK, losses)
    first, later = run(QUICK, losses, (2,))[0]
    assert all(map(torch.equal, alone.values, first.values))
    assert (alone.best, alone.steps, alone.train_loss) == (first.best, first.steps, first.train_loss)
    assert (later.best, later.steps) == (20, 24)
    assert not torch.equal(later.values[0], first.values[0])


def test_the_runs_that_end_by_themselves_are_reported_with_their_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(converged, "settings", few)
    recipe = dataclasses.replace(SHORT, rates=(1e-2, 4e-2, 0.16), extensions=1, stop=QUICK)
    result = converged.run(tmp_path, recipe, noise_task, Console(quiet=True))
    assert not result["unfinished"]
    sample = [row for row in result["rows"] if row["longer"]]
    assert [row["variant"] for row in sample] == ["dense", "LoRA", "LoRTA M=3"]
    for row in result["rows"]:
        assert len(row["best"]) == len(row["steps"]) == len(row["accuracies"])
        assert all(n == min(b + QUICK.patience, QUICK.most) for b, n in zip(row["best"], row["steps"], strict=True))
        tried = {rate: one["loss"] for rate, one in row["tried"].items()}
        assert tried[f"{row['rate']:g}"] == min(tried.values())
    told = report.text(tmp_path)
    assert told.startswith("# Image classification to convergence by early stopping\n")
    assert "the steps until the stop | twice as many | best, mean | steps, mean |" in told
    pairs = [(b, c) for row in sample for b, c in zip(row["best"], row["best_later"]["2"], strict=False)]
    assert f"Of {len(pairs)} runs that went on, {sum(b == c for b, c in pairs)} found nothing better" in told
    assert len(pairs) == 3 * len(recipe.seeds)
    for row in sample:
        for k, (b, c) in enumerate(zip(row["best"], row["best_later"]["2"], strict=False)):
            assert b == c or c > row["steps"][k]
            assert b != c or row["accuracies"][k] == row["longer"]["2"][k]
    jobs = {path.name for path in tmp_path.glob("classification_jobs/*/*.json")}
    assert not any("_x2" in name for name in jobs)  # one run goes on to both
    assert converged.run(tmp_path, recipe, noise_task, Console(quiet=True))["rows"] == result["rows"]


@given(
    st.integers(0, 2**31),
    st.floats(0.01, 100.0),
    st.sampled_from([-3.0, -0.5, 0.0, 0.5, 3.0]),
    st.integers(2, 10),
)
def test_the_calibrated_loss_is_the_lowest_of_all_temperatures(seed, size, knows, classes):
    """`knows` is how far the right class's logit is raised: below 0 every temperature is worse than knowing nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (50,), generator=generator)
    scores = torch.randn(50, classes, generator=generator, dtype=torch.float64)
    scores[torch.arange(50), labels] += knows
    inverses = torch.logspace(-9, 6, 3001, dtype=torch.float64)[:, None, None] / size
    of_each = torch.logsumexp(inverses * scores * size, -1) - (inverses * scores * size)[:, torch.arange(50), labels]
    least = float(of_each.mean(-1).min())
    found = calibrated_loss((scores * size).float(), labels)
    assert found == pytest.approx(least, abs=1e-4)  # the grid's steps of 1.2 % in temperature, and float32 logits


def test_the_calibrated_loss_of_a_perfect_order_is_nothing_and_of_what_is_not_finite_not_a_number():
    labels = torch.tensor([0, 1, 2])
    assert calibrated_loss(torch.eye(3), labels) == pytest.approx(0.0, abs=1e-9)
    assert calibrated_loss(torch.zeros(3, 4), labels) == pytest.approx(math.log(4))
    assert math.isnan(calibrated_loss(torch.full((3, 4), math.nan), labels))
    assert math.isnan(calibrated_loss(torch.tensor([[math.inf, 0.0, 0.0]] * 3), labels))
