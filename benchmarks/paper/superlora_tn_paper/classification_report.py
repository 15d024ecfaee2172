"""What a classification result says: its picture, and its report, whose sentences are computed from the rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from superlora_tn.tools import draw
from superlora_tn_paper.classification_answers import (
    QUESTIONS,
    Pair,
    pairs,
    rank_answer,
    rank_pairs,
    summary,
    tenth_answer,
    tenths,
)
from superlora_tn_paper.differences import RULE
from superlora_tn_paper.markdown import percent, spread, table, where
from superlora_tn_paper.rates import at_the_edge, best
from superlora_tn_paper.store import Data

PARETO = "classification.png"


def draw_classification(result: Data, path: Path) -> Path:
    """Accuracy against parameters, a frontier line a variant, dense fine-tuning and the head alone as lines."""
    lines = {
        f"dense q and v ({r['parameters']:,}):": statistics.fmean(r["accuracies"])
        for r in result["rows"]
        if r["variant"] == "dense"
    }
    lines |= {"head alone, same steps:": statistics.fmean(result["head_only"])}
    lines |= {"head alone, to convergence:": result["head_converged"]}
    return draw_points(result, path, lines)


def draw_points(result: Data, path: Path, lines: Mapping[str, float]) -> Path:
    """Accuracy against parameters, a frontier line a variant, and level lines by name."""
    rows = [r for r in result["rows"] if r["variant"] != "dense"]
    points = [
        draw.Point(
            r["variant"], r["parameters"], statistics.fmean(r["accuracies"]), spread(r["accuracies"]), family(r["variant"])
        )
        for r in rows
    ]
    return draw.pareto(points, path, "Accuracy against trainable parameters of q and v", lines)


def family(variant: str) -> str:
    """Which variants share a colour: of one kind of fold and network."""
    kinds = {"2D": "2D", "LoRTA": "LoRTA", "SuperLoRA": "LoRTA", "LoKr": "Kronecker", "LoNKr": "Kronecker"}
    return next((kind for word, kind in kinds.items() if word in variant), variant)


def report(result: Data) -> str:
    """The report in markdown."""
    rows = result["rows"]
    ladder, tenth = rank_pairs(rows), tenths(rows)
    parts = [
        "# Image classification",
        where(result) + " " + _setup(result),
        f"![Accuracy against trainable parameters]({PARETO})",
        "## Results",
        _lines(result),
        _results(rows),
        "## Questions",
        RULE,
        "### Does accuracy rise with the parameters at all?",
        _answer(ladder, rank_answer(ladder)),
        "### Does LoRTA reach LoRA's accuracy with about a tenth of the parameters?",
        _answer(tenth, tenth_answer(tenth)),
    ]
    for title, what, test in QUESTIONS:
        found = list(pairs(rows, test))
        parts += [f"### {title}", _answer(found, summary(found, what))]
    return "\n\n".join([*parts, "## Learning rates", _rates(result), ""])


def _setup(result: Data) -> str:
    recipe, images = result["recipe"], result["images"]
    return (
        f"{result['task'][0].upper()}{result['task'][1:]}: {result['classes']} classes, {images['train']:,} images to train "
        f"on, {images['test']:,} to test. Adapted are {result['weights']} weights (query and value) of {result['elements']:,} "
        f"elements; all else is frozen but a new head of {result['head_parameters']:,} parameters, trained along in every run "
        f"from the same first values and not counted below. {recipe['steps']} steps of {recipe['batch']} images, AdamW, "
        f"one-cycle; seeds {', '.join(map(str, recipe['seeds']))}; scale `{result['scale']}`."
    )


def _lines(result: Data) -> str:
    return (
        f"Head alone on the frozen model: {percent(result['head_only'])} % after the same steps on the same images; "
        f"{100 * result['head_converged']:.1f} % trained to convergence on all images (many more than a run sees). "
        + _above(result)
    )


def _above(result: Data) -> str:
    """Whether adapting was worth anything, against both lines."""
    rows, limit = result["rows"], result["head_converged"]
    means = [statistics.fmean(r["accuracies"]) for r in rows]
    same = statistics.fmean(result["head_only"])
    return (
        f"Of {len(rows)} settings {sum(m > same for m in means)} have a higher mean than the first, and "
        f"{sum(m > limit for m in means)} than the second."
    )


def _results(rows: Sequence[Data]) -> str:
    heading = ("variant", "setting", "parameters", "accuracy, %", "test loss", "learning rate", "ms a step")
    lines = [
        (
            r["variant"],
            r["words"],
            f"{r['parameters']:,}",
            percent(r["accuracies"]),
            f"{statistics.fmean(r['losses']):.3f}",
            f"{r['rate']:g}",
            f"{1e3 * r['step_seconds']:.1f}",
        )
        for r in sorted(rows, key=lambda r: -r["parameters"])
    ]
    return table(heading, lines) + "\n\nMean ± standard deviation over the seeds."


def _answer(found: Sequence[Pair], words: str) -> str:
    if not found:
        return words
    lines = []
    for pair in found:
        d = pair.difference
        size = f"{100 * d.mean:+.1f}" + ("" if d.error is None else f" ± {100 * d.error:.1f}")
        lines.append((_name(pair.first), _name(pair.second), size, d.verdict))
    return words + "\n\n" + table(("first", "second", "second less first, points", "verdict"), lines)


def _name(row: Data) -> str:
    return f"{row['variant']} {row['words']}, {row['parameters']:,}: {percent(row['accuracies'])} %"


def _rates(result: Data) -> str:
    recipe, tried = result["recipe"], result["tried"]
    lines, edge = [], []
    for family, found in tried.items():
        rate = best(found)
        if at_the_edge(rate, map(float, found)):
            edge.append(family)
        cells = [f"**{r}**: {loss:.3f}" if float(r) == rate else f"{r}: {loss:.3f}" for r, loss in found.items()]
        lines.append((family, *cells))
    words = (
        f"For each family of variants its setting of median count is trained with each of {len(recipe['rates'])} rates on "
        f"{1 - recipe['apart']:.0%} of the training images, with a seed ({recipe['choice_seed']}) that is none of the "
        f"report's; the rate of the lowest loss on the other {result['images']['apart']:,} (below) is taken for the whole "
        "family. The head's rate is the best for the head alone and the same in every run. Test images choose nothing."
    )
    if edge:
        words += f" At the edge of what was tried, so that a better one may lie outside: {', '.join(edge)}."
    return words + "\n\n" + table(("family", *["rate: loss"] * (len(lines[0]) - 1)), lines)
