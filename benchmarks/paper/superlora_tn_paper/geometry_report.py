"""What a geometry result says: the paper's figures of dL, dR and dE, and a report computed from the rows."""

from __future__ import annotations

import statistics
from pathlib import Path

from superlora_tn.declare.fold import split_name
from superlora_tn.tools.draw import INK, PALETTE, panels, save
from superlora_tn.tools.geometry import MEASURES, Comparison, figure
from superlora_tn_paper.differences import RULE, difference
from superlora_tn_paper.markdown import table, where
from superlora_tn_paper.store import Data

OVER_LAYERS = ("LoRA", "2D", "2D reshape", "LoKr", "LoRTA M=3")
LAYERS, COUNTS = "geometry_layers.png", "geometry_counts.png"
SCALED = ("scaled", "dE at the best scale, relative")
SHORT = {"left": "dL", "right": "dR", "distance": "dE", "scaled": "dE, scaled"}
RISES = {"left": 1, "right": 1, "distance": -1, "scaled": -1}  # the paper's direction with more parameters


def weight_types(result: Data) -> list[str]:
    """The types of weight, query before value."""
    return list(dict.fromkeys(split_name(name)[1] for name in result["rows"][0]["weights"][0]))


def means(row: Data, weight_type: str, measure: str) -> list[float]:
    """A measure's mean over the layers, for each seed."""
    return [statistics.fmean(v[measure] for n, v in seed.items() if split_name(n)[1] == weight_type) for seed in row["weights"]]


def _adapters(result: Data) -> list[Data]:
    return [row for row in result["rows"] if row["variant"] != "dense"]


def draw_layers(result: Data, path: Path) -> Path:
    """The paper's figure over the layers: LoRA of middle rank, and of each other variant the setting nearest to its count."""
    rows = _adapters(result)
    loras = sorted((r for r in rows if r["variant"] == "LoRA"), key=lambda r: r["parameters"])
    middle = loras[len(loras) // 2 - 1]
    shown: dict[str, Data] = {}
    for row in (r for r in rows if r["variant"] in OVER_LAYERS):
        old = shown.get(row["variant"])
        gap = abs(row["parameters"] - middle["parameters"])
        if old is None or gap < abs(old["parameters"] - middle["parameters"]):
            shown[row["variant"]] = row
    over = {f"{r['variant']} {r['words']} ({r['parameters']:,})": _averaged(r) for r in shown.values()}
    return figure(over, path, "Against dense fine-tuning, mean over the seeds")


def _averaged(row: Data) -> dict[str, Comparison]:
    names = row["weights"][0]
    fields = [measure for measure, _ in MEASURES]
    return {n: Comparison(*(statistics.fmean(seed[n][m] for seed in row["weights"]) for m in fields)) for n in names}


def draw_counts(result: Data, path: Path) -> Path:
    """dL, dR, dE and dE at the best scale against trainable parameters: a row a type of weight, a line a variant."""
    rows, every = _adapters(result), weight_types(result)
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    picture, grid = panels(len(every), len(MEASURES) + 1)
    nothing = next(r for r in result["rows"] if r["variant"] == "dense")
    for weight_type, line in zip(every, grid, strict=True):
        for (measure, label), axes in zip((*MEASURES, SCALED), line, strict=True):
            for k, variant in enumerate(variants):
                own = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["parameters"])
                heights = [statistics.fmean(means(r, weight_type, measure)) for r in own]
                axes.plot([r["parameters"] for r in own], heights, "o-", color=PALETTE[k], markersize=3.5, label=variant)
            still = statistics.fmean(means(nothing, weight_type, measure))
            chance = result["directions"] / result["side"]
            level, words = (chance, "directions at random") if measure in ("left", "right") else (still, "no change")
            axes.axhline(level, color=INK, linestyle="--", linewidth=0.8, label=words)
            axes.set_xscale("log")
            axes.set_xlabel("trainable parameters", fontsize=8)
            axes.set_title(f"{weight_type}: {label}", fontsize=9, color=INK)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
            axes.set_ylim(*((0, None) if measure == "distance" else (-0.03, 1.03)))
    grid[0][0].legend(fontsize=7, framealpha=0.9)
    grid[0][-1].legend(grid[0][-1].lines[-1:], ["no change"], fontsize=7, framealpha=0.9)
    picture.suptitle("Against dense fine-tuning, mean over layers and seeds", color=INK, fontsize=11)
    return save(picture, path)


def trend(result: Data, weight_type: str, variant: str, measure: str) -> tuple[float, float | None, int, bool] | None:
    """From a variant's fewest parameters to its most: the paired change, its error, and whether it goes the paper's way.

    The third is 1 for the paper's way, -1 for the other, 0 where no change is seen; the fourth, whether it is clear.
    None for a variant of one setting.
    """
    own = sorted((r for r in _adapters(result) if r["variant"] == variant), key=lambda r: r["parameters"])
    if len(own) < 2:
        return None
    change = difference(means(own[0], weight_type, measure), means(own[-1], weight_type, measure))
    return change.mean, change.error, RISES[measure] * change.sign, change.clear


def report(result: Data) -> str:
    """The geometry report in markdown."""
    side, k = result["side"], result["directions"]
    about = (
        f"{result['task'][0].upper()}{result['task'][1:]}. Each run of the classification experiment is compared with dense "
        f"fine-tuning of q and v of the same seed (same base, first head, images), weight by weight: dL and dR, the share of "
        f"the {k} largest left and right singular directions that both have ({k / side:.2f} for directions at random among "
        f"{side}; at most r / {k} for an update of rank r below {k}), and dE, the Frobenius distance. dE hangs on how far "
        "each method's learning rate carried it, so a second dE allows each update its best multiple, as a share of dense "
        "fine-tuning's norm (0: the same direction; 1: nothing in common). The row *no change* says how far a dW of zero is."
    )
    return "\n\n".join(
        [
            "# Geometry",
            where(result) + " " + about,
            f"![Over the layers]({LAYERS})",
            f"![Against parameters]({COUNTS})",
            *[part for weight_type in weight_types(result) for part in (f"## {weight_type}", _table(result, weight_type))],
            "## Does dE fall, and do dL and dR rise, with more parameters?",
            RULE,
            _answer(result),
            _trends(result),
            "## Is any update nearer to dense fine-tuning than no change at all?",
            _nearer(result),
            "",
        ]
    )


def _table(result: Data, weight_type: str) -> str:
    lines = []
    for row in sorted(result["rows"], key=lambda r: -r["parameters"]):
        cells = []
        for measure in SHORT:
            values = means(row, weight_type, measure)
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        name = "no change, beside dense" if row["variant"] == "dense" else row["variant"]
        lines.append((name, row["words"], f"{row['parameters']:,}" if row["variant"] != "dense" else "0", *cells))
    return table(("variant", "setting", "parameters", *SHORT.values()), lines)


def _all_trends(result: Data) -> list[tuple[str, str, str, float, float | None, int, bool]]:
    variants = dict.fromkeys(r["variant"] for r in _adapters(result))
    found = []
    for weight_type in weight_types(result):
        for variant in variants:
            for measure in SHORT:
                if change := trend(result, weight_type, variant, measure):
                    found.append((weight_type, variant, measure, *change))
    return found


def _answer(result: Data) -> str:
    """One sentence a measure."""
    words = []
    for measure, label in SHORT.items():
        own = [t for t in _all_trends(result) if t[2] == measure]
        if not own or own[0][4] is None:
            return "Not answered: it takes two settings of a variant and two seeds."
        way, other = sum(t[5] > 0 for t in own), sum(t[5] < 0 for t in own)
        expected = "rises" if RISES[measure] > 0 else "falls"
        verdict = "**yes**" if way > len(own) / 2 and not other else "**in part**" if way > other else "**no**"
        words.append(
            f"{label} {expected}: {verdict}, in {way} of {len(own)} comparisons of a variant's fewest with its "
            f"most parameters (query and value apart); the other way in {other}."
        )
    return " ".join(words)


def _trends(result: Data) -> str:
    lines = []
    for weight_type, variant, measure, mean, error, way, clear in _all_trends(result):
        size = f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")
        words = "no change seen" if way == 0 else f"{'clear' if clear else 'a hint'}: {'as' if way > 0 else 'not as'} the paper"
        lines.append((weight_type, variant, SHORT[measure], size, words))
    return table(("weights", "variant", "measure", "most less fewest parameters", "verdict"), lines)


def _nearer(result: Data) -> str:
    nothing = next(r for r in result["rows"] if r["variant"] == "dense")
    words = []
    for weight_type in weight_types(result):
        still = statistics.fmean(means(nothing, weight_type, "distance"))
        nearer = [r for r in _adapters(result) if statistics.fmean(means(r, weight_type, "distance")) < still]
        words.append(
            f"{weight_type}: dE is below that of no change ({still:.3f}) in {len(nearer)} of {len(_adapters(result))} settings."
        )
    return " ".join(words)
