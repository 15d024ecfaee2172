"""What the runs to convergence say: a table of what is finished, and each verdict whose settings are."""

from __future__ import annotations

import statistics
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
from superlora_tn_paper.differences import RULE, difference
from superlora_tn_paper.markdown import percent, table, where
from superlora_tn_paper.store import Data

OPEN = "Not judged yet, for want of"
CHECKED = ("dense", "LoRA", "LoRTA M=3")  # of which twice the steps are run
LINES = ("LoRA", "LoRTA M=3", "LoRTA M=4", "LoRTA M=5")
ABOVE = 0.05  # dense fine-tuning is wanted so far above the head alone


def report(result: Data) -> str:
    """The report in markdown."""
    rows, missing = result["rows"], result["unfinished"]
    parts = ["# Image classification to convergence", where(result) + " " + _setup(result)]
    if missing:
        parts.append(f"**Unfinished**: {len(missing)} settings are missing: {_named(missing)}. What needs them is not judged.")
    parts += ["## Results", f"![Accuracy against trainable parameters]({PARETO})", _results(rows), "## Has it converged?"]
    checked = [r for r in missing if r["variant"] in CHECKED]
    parts += [f"{OPEN} {_named(checked)}."] if checked else [head_answer(rows), twice_answer(rows), edge_answer(rows)]
    return "\n\n".join([*parts, *_questions(rows, missing, result["recipe"]), ""])


def _named(rows: list[Data]) -> str:
    return ", ".join(f"{r['variant']} {r['words']}".strip() for r in rows)


def _setup(result: Data) -> str:
    recipe = result["recipe"]
    return (
        f"{result['task'][0].upper()}{result['task'][1:]}: {result['classes']} classes; each seed draws {recipe['images']:,} "
        f"training images, {result['images']['test']:,} test. Of {result['images']['apart']:,} others is chosen, with another "
        "seed, the rate of the lowest loss among those whose accuracy is within a standard error of the highest. "
        f"{recipe['steps']} steps of {recipe['batch']} images, AdamW, one-cycle, no augmentation. The head starts at its "
        f"optimum on the frozen model for the same images, and goes on at {recipe['head_rate']:g}. Each setting multiplies "
        f"its rates by the number (last column) with which the first step at rate r moves all dW by {recipe['stride']:g} r "
        "sqrt(elements), so that a rate means the same for all. Every LoRA and LoRTA setting chooses its own "
        "rate; other families take that of their setting of median count."
    )


def _results(rows: list[Data]) -> str:
    heading = (
        "variant",
        "setting",
        "parameters",
        "seeds",
        "accuracy, %",
        "head alone, %",
        "twice the steps, %",
        "rate",
        "rate x",
    )
    lines = [
        (
            r["variant"],
            r["words"],
            f"{r['parameters']:,}",
            str(len(r["seeds"])),
            percent(r["accuracies"]),
            percent(r["heads"]),
            percent(r["twice"]) if r["twice"] else "",
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


def twice_answer(rows: list[Data]) -> str:
    """Whether twice the steps move a setting of the sample by more than one standard error."""
    lines, moved = [], 0
    for r in (r for r in rows if r["twice"]):
        change = difference(r["accuracies"][: len(r["twice"])], r["twice"])
        error = change.error or 0.0
        moved += abs(change.mean) > error
        lines.append(f"{r['variant']} {r['words']}".strip() + f" {100 * change.mean:+.1f} (standard error {100 * error:.1f})")
    if not lines:
        return "Twice the steps: not run."
    answer = "**no**" if moved == 0 else f"**yes**, {moved} of {len(lines)}"
    return f"Twice the steps move a setting by more than one standard error: {answer}: {'; '.join(lines)} points."


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
