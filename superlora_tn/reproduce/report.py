"""The reports in words: every sentence about a result is computed from the results' own rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from superlora_tn.reproduce.answers import (
    QUESTIONS,
    RULE,
    Pair,
    best,
    pairs,
    rank_answer,
    rank_pairs,
    summary,
    tenth_answer,
    tenths,
)
from superlora_tn.reproduce.store import Data
from superlora_tn.tools import draw

PARETO = "classification.png"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; all columns but the first two to the right."""
    bars = ["---" if k < 2 else "---:" for k in range(len(heading))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heading, bars, *rows))


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * _spread(values):.1f}" if len(values) > 1 else mean


def where(result: Data) -> str:
    """Machine and date."""
    facts = result["machine"]
    threads = f"{facts['threads']} thread{'' if facts['threads'] == '1' else 's'}"
    return f"{facts['date']}, {facts['device']}, {threads}, torch {facts['torch']}."


def draw_classification(result: Data, path: Path) -> Path:
    """Accuracy against parameters, a frontier line a variant, dense fine-tuning and the head alone as lines."""
    rows = [r for r in result["rows"] if r["variant"] != "dense"]
    points = [
        draw.Point(r["variant"], r["parameters"], statistics.fmean(r["accuracies"]), _spread(r["accuracies"])) for r in rows
    ]
    lines = {
        f"dense q and v ({r['parameters']:,}):": statistics.fmean(r["accuracies"])
        for r in result["rows"]
        if r["variant"] == "dense"
    }
    lines |= {"head alone, same steps:": statistics.fmean(result["head_only"])}
    lines |= {"head alone, to convergence:": result["head_converged"]}
    return draw.pareto(points, path, "Accuracy against trainable parameters of q and v", lines)


def classification(result: Data) -> str:
    """The classification report in markdown."""
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
        f"Head alone on the frozen model: {_percent(result['head_only'])} % after the same steps on the same images; "
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
            _percent(r["accuracies"]),
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
    return f"{row['variant']} {row['words']}, {row['parameters']:,}: {_percent(row['accuracies'])} %"


def _rates(result: Data) -> str:
    recipe, tried = result["recipe"], result["tried"]
    lines, edge = [], []
    for family, found in tried.items():
        rate = best(found)
        if rate in (min(map(float, found)), max(map(float, found))):
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


def sections(out: Path) -> Mapping[str, str]:
    """The report of each experiment whose results are in the folder."""
    found = {}
    for name in ("classification", "geometry", "diffusion"):
        place = out / f"{name}.json"
        if place.is_file():
            found[name] = _report(name, json.loads(place.read_text()))
    return found


def _report(name: str, result: Data) -> str:
    if name == "classification":
        return classification(result)
    if name == "geometry":
        from superlora_tn.reproduce import geometry_run

        return geometry_run.report(result)
    from superlora_tn.reproduce import diffusion

    return str(diffusion.report(result))


def write(out: Path) -> Path:
    """Write ``report.md``: the reports of all experiments whose results are in the folder, one after another."""
    place = out / "report.md"
    place.write_text("\n\n".join(text.strip() for text in sections(out).values()) + "\n")
    return place
