"""What the runs to convergence say: a table of what is finished, and each verdict whose settings are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

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
from superlora_tn_paper.classification_report import PARETO, draw_points
from superlora_tn_paper.differences import RULE, Difference, difference, within_by_chance
from superlora_tn_paper.markdown import percent, table, where
from superlora_tn_paper.store import Data

OPEN = "Not judged yet, for want of"
CHECKED = ("dense", "LoRA", "LoRTA M=3")  # worked off first, in this order; one setting of each is run with more steps
LINES = ("LoRA", "LoRTA M=3", "LoRTA M=4", "LoRTA M=5")
ABOVE = 0.05  # dense fine-tuning is wanted so far above the head alone


@dataclass(frozen=True)
class Steps:
    """Words for so many times the steps of a run.

    Attributes:
        count: of every run; None where each ends by itself.
    """

    count: int | None

    def __call__(self, times: int) -> str:
        """Words for them."""
        if self.count is not None:
            return f"{times * self.count:,} steps"
        return "the steps until the stop" if times == 1 else "twice as many" if times == 2 else f"{times} times as many"


def report(result: Data) -> str:
    """The report in markdown."""
    rows, missing, stop = result["rows"], result["unfinished"], result["recipe"].get("stop")
    title = "# Image classification to convergence" + (" by early stopping" if stop else "")
    parts = [title, where(result) + " " + _setup(result)]
    if missing:
        parts.append(f"**Unfinished**: {len(missing)} settings are missing: {_named(missing)}. What needs them is not judged.")
    parts += ["## Results", f"![Accuracy against trainable parameters]({PARETO})", _results(rows), "## Has it converged?"]
    checked = [r for r in missing if r["variant"] in CHECKED]
    steps = Steps(None if stop else result["recipe"]["steps"])
    parts += [f"{OPEN} {_named(checked)}."] if checked else _converged(rows, steps, result["images"]["test"])
    ends = [RULE] if result["recipe"].get("sample") else _questions(rows, missing, result["recipe"])
    return "\n\n".join([*parts, *ends, ""])


def _converged(rows: list[Data], steps: Steps, images: int) -> list[str]:
    sample = [r for r in rows if r["longer"]]
    answers = [longer_answer(sample, steps), size_answer(sample, images), order_answer(sample, steps), edge_answer(rows)]
    return [head_answer(rows), *([_longer(sample, steps)] if sample else []), *answers]


def _longer(sample: list[Data], steps: Steps) -> str:
    seeds, every = _seeds(sample), _every(sample)
    stops = ("best", "steps") if steps.count is None else ()
    heading = ("variant", "setting", *map(steps, every), *(f"{name}, mean" for name in stops))
    lines = [
        (
            *(r["variant"], r["words"]),
            *(percent(after(r, times)[:seeds]) for times in every),
            *(f"{statistics.fmean(r[name][:seeds]):,.0f}" for name in stops),
        )
        for r in sample
    ]
    words = f"Accuracy of the sample after more steps at the same rate, %, over the first {seeds} seeds."
    if stops:
        words += " The step of the best look until the stop, and the steps until then."
    return table(heading, lines) + f"\n\n{words}"


def _named(rows: list[Data]) -> str:
    return ", ".join(f"{r['variant']} {r['words']}".strip() for r in rows)


def _setup(result: Data) -> str:
    recipe, apart = result["recipe"], f"{result['images']['apart']:,} others"
    return (
        f"{result['task'][0].upper()}{result['task'][1:]}: {result['classes']} classes; each seed draws {recipe['images']:,} "
        f"training images, {result['images']['test']:,} test. {_ends(recipe, apart)} The head starts at its "
        f"optimum on the frozen model for the same images, and goes on at {recipe['head_rate']:g}. Each setting multiplies "
        f"its rates by the number (rate x) with which the first step at rate r moves all dW by {recipe['stride']:g} r "
        "sqrt(elements), so that a rate means the same for all. Every LoRA and LoRTA setting chooses its own "
        "rate; other families take that of their setting of median count."
    )


def _ends(recipe: Data, apart: str) -> str:
    """How long runs are, and what the images held apart decide."""
    if not (stop := recipe.get("stop")):
        return (
            f"The rate is chosen on {apart}, with another seed: that of the lowest loss among those whose accuracy is within a "
            f"standard error of the highest. {recipe['steps']} steps of {recipe['batch']} images, AdamW, one-cycle, no "
            "augmentation."
        )
    return (
        f"AdamW, batches of {recipe['batch']} images, a constant rate after {stop['warmup']} steps of warm-up, no "
        f"augmentation. After every {stop['every']} steps the running average of the parameters (each step keeps "
        f"{stop['memory']:.0%}) is judged by its cross-entropy at the best temperature on {apart}. A run ends "
        f"{stop['patience']} steps after its best look, one that is lower than the best before by more than "
        f"{stop['better']:.0%}, or after {stop['most']:,} steps; that average is kept. By the same loss the rate is chosen, "
        "with another seed."
    )


def _results(rows: list[Data]) -> str:
    heading = ("variant", "setting", "parameters", "seeds", "accuracy, %", "head alone, %", "rate", "rate x")
    lines = [
        (
            r["variant"],
            r["words"],
            f"{r['parameters']:,}",
            str(len(r["seeds"])),
            percent(r["accuracies"]),
            percent(r["heads"]),
            f"{r['rate']:g}" + " (edge)" * r["edge"],
            f"{statistics.fmean(r['rate_times']):.3g}",
        )
        for r in sorted(rows, key=lambda r: -r["parameters"])
    ]
    return table(heading, lines) + "\n\nMean ± standard deviation over the seeds."


def head_answer(rows: list[Data]) -> str:
    """Whether dense fine-tuning lies well above the frozen model with its head alone."""
    dense = next(r for r in rows if r["variant"] == "dense")
    gain = difference(dense["heads"], dense["accuracies"])
    answer = "**Yes**" if gain.mean >= ABOVE else "**No**"
    return f"Dense fine-tuning at least {100 * ABOVE:.0f} points above the head alone: {answer}, {100 * gain.mean:+.1f} points."


def after(row: Data, times: int) -> list[float]:
    """The accuracies of a setting with so many times the steps, empty where it was not run with them."""
    return list(row["accuracies"] if times == 1 else row["longer"].get(str(times), ()))


def _seeds(rows: list[Data]) -> int:
    """Seeds of the runs of more steps."""
    return min((len(own) for r in rows for own in r["longer"].values()), default=0)


def _every(sample: list[Data]) -> list[int]:
    """How many times the steps the sample was run with, 1 among them."""
    return [1, *sorted(int(times) for times in sample[0]["longer"])] if sample else []


def longer_answer(sample: list[Data], steps: Steps) -> str:
    """Of each number of steps, whether twice as many move a setting of the sample by more than one standard error."""
    lines, enough, times = [], None, 1
    while found := list(_doubled(sample, times)):
        moved = sum(change.sign != 0 for _, change in found)
        clear = sum(change.sign != 0 and change.clear for _, change in found)
        answer = f"**yes**, {moved} of {len(found)} ({clear} clearly)" if moved else "**no**"
        told = "; ".join(f"{_named([r])} {_points(change)}" for r, change in found)
        lines.append(f"- {steps(times)} to {steps(2 * times)}: {answer}: {told} points.")
        by_chance = within_by_chance(_seeds(sample)) ** len(found)
        enough = None if moved else enough or steps(times)
        times *= 2
    if not lines:
        return "Twice the steps: not run on two seeds or more."
    end = f"{enough} are enough for them" if enough else "none of the numbers of steps that were tried is enough for all"
    rule = (
        f"Where nothing changes, all of the sample stay within a standard error in about {by_chance:.0%} of such checks alone."
    )
    if any("best_later" in r for r in sample):
        rule = _same(sample)
    question = "Do twice the steps move a setting of the sample by more than one standard error?"
    return "\n\n".join([question, "\n".join(lines), f"So {end}. {rule}"])


def size_answer(sample: list[Data], images: int) -> str:
    """How large the changes are beside what so many test images can tell."""
    times = _every(sample)[:-1]
    changes = [abs(change.mean) for k in times for _, change in _doubled(sample, k)]
    if not changes:
        return "The size of the changes: not run."
    errors = [math.sqrt(p * (1 - p) / images) for r in sample for p in [statistics.fmean(r["accuracies"])]]
    return (
        f"The largest change is {100 * max(changes):.1f} points; one accuracy on {images:,} test images has a standard error "
        f"of {100 * min(errors):.1f} to {100 * max(errors):.1f} by the images alone."
    )


def _same(sample: list[Data]) -> str:
    """How many runs that went on found nothing better."""
    pairs = [(a, b) for r in sample for later in r["best_later"].values() for a, b in zip(r["best"], later, strict=False)]
    kept = sum(a == b for a, b in pairs)
    return (
        f"Of {len(pairs)} runs that went on, {kept} found nothing better, and keep what they had when they would have ended. "
        "A setting whose runs all find something, as often worse on the test images as better, is within a standard error in "
        f"{within_by_chance(_seeds(sample)):.0%} of such checks."
    )


def _doubled(rows: list[Data], times: int) -> Iterator[tuple[Data, Difference]]:
    """The rows that were run with so many times the steps and with twice as many, and what these give more."""
    for r in rows:
        first, second = after(r, times), after(r, 2 * times)
        if first and len(second) > 1:
            yield r, difference(first[: len(second)], second)


def order_answer(sample: list[Data], steps: Steps) -> str:
    """Whether the settings of the sample lie in one order whatever the number of steps."""
    every, seeds = _every(sample), _seeds(sample)
    lines, mixed, unseen = [], False, False
    for first, second in pairwise(sample):
        found = [difference(after(first, times)[:seeds], after(second, times)[:seeds]) for times in every]
        signs = {one.sign for one in found}
        mixed, unseen = mixed or {1, -1} <= signs, unseen or 0 in signs
        told = "; ".join(f"{_points(one)} after {steps(times)}" for times, one in zip(every, found, strict=True))
        lines.append(f"- {_named([second])} less {_named([first])}: {told}.")
    if not lines:
        return "The order of the sample after more steps: not run."
    answer = "**no**" if mixed else "**not seen to change**, but not every difference is seen" if unseen else "**yes**"
    question = f"Is the order of the sample the same after each number of steps: {answer}. In points:"
    return "\n\n".join([question, "\n".join(lines)])


def _points(change: Difference) -> str:
    return f"{100 * change.mean:+.1f} (standard error {100 * (change.error or 0.0):.1f})"


def edge_answer(rows: list[Data]) -> str:
    """Which rates lie at the edge of what was tried."""
    found = [f"{r['variant']} {r['words']}".strip() for r in rows if r["edge"]]
    return f"Best rates at the edge of those tried: {', '.join(found) if found else 'none'}."


def _questions(rows: list[Data], missing: list[Data], recipe: Data) -> list[str]:
    """The questions of the small scale, each where all of its settings are finished, on as many seeds as both sides have.

    Where the lines alone are run, those about other variants are left out.
    """
    lines = [r for r in rows if r["variant"] in LINES]
    parts, left = ["## Questions", RULE], [r for r in missing if r["variant"] in LINES]
    parts += ["### Does LoRTA reach LoRA's accuracy with about a tenth of the parameters?"]
    parts += (
        [f"{OPEN} {_named(left)}."]
        if left
        else [rank_answer(rank_pairs(lines)), tenth_answer(tenths(lines)), reach_answer(reaching(lines))]
    )
    least = min((len(r["accuracies"]) for r in rows), default=0)
    even = [{**r, "accuracies": r["accuracies"][:least]} for r in rows]
    for title, what, test in QUESTIONS:
        found = list(pairs([*even, *missing], test))
        if not found and recipe.get("lines"):
            continue
        left = [r for r in missing if any(r is p.first or r is p.second for p in found)]
        parts += [f"### {title}", f"{OPEN} {_named(left)}." if left else summary(found, what)]
    return parts


def draw(result: Data, path: Path) -> Path:
    """Accuracy against parameters, with dense fine-tuning and the head alone as lines."""
    dense = [r for r in result["rows"] if r["variant"] == "dense"]
    lines = {f"dense q and v ({r['parameters']:,}):": statistics.fmean(r["accuracies"]) for r in dense}
    heads = [head for r in dense for head in r["heads"]]
    lines |= {"head alone, to convergence:": statistics.fmean(heads)} if heads else {}
    return draw_points(result, path, lines)
