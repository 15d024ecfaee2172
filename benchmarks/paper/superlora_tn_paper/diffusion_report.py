"""What a diffusion result says: its pictures, and a section in markdown whose answers are computed from the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from superlora_tn.tools.draw import INK, PALETTE, blank, save
from superlora_tn_paper.diffusion_settings import LEVELS, PAPER_ELEMENTS, level_budget
from superlora_tn_paper.rates import LEVEL, at_the_edge
from superlora_tn_paper.store import Data

SAMPLES, SCORES = "diffusion_samples.png", "diffusion_scores.png"
SHOWN = 20  # images in a row of the picture
# The least confidence of the judge, and the most distance in units of the real test images', of samples that are digits.
DIGIT_CONFIDENCE, DIGIT_DISTANCE = 0.85, 5
_REFERENCES = ("real test images", "no adaptation", "dense fine-tuning")
# (question, the row it is about, the row it is compared with); a row is (level, variant, structure).
_PAIRS = (
    ("reshape", ("high", "2D reshape", "G=8"), ("high", "2D", "G=8")),
    ("reshape", ("middle", "2D reshape", "G=1"), ("middle", "2D", "G=1")),
    ("grouping", ("middle", "2D reshape", "G=4"), ("middle", "2D reshape", "G=1")),
    ("grouping", ("middle", "LoRTA", "M=3 G=12"), ("middle", "LoRTA", "M=3 G=1")),
    ("projection", ("middle", "2D reshape projected", "G=4 rho=0.5"), ("middle", "2D reshape", "G=4")),
    ("projection", ("low", "LoRTA projected", "M=3 G=4 rho=0.01"), ("low", "LoRTA", "M=3 G=1")),
    ("order", ("low", "LoRTA", "M=4 G=1"), ("low", "LoRTA", "M=3 G=1")),
)


def scored(result: Data) -> list[Data]:
    """The rows that were trained or measured; the others were skipped."""
    return [row for row in result["rows"] if "frechet" in row]


def _named(row: Data) -> str:
    return f"{row['variant']} {row.get('setting', '')}".strip()


def compare(row: Data, other: Data) -> str:
    """ "better", "worse", or "no clear difference" within two standard deviations of the images' chance."""
    gap = row["frechet"] - other["frechet"]
    if abs(gap) <= 2 * math.hypot(row["spread"], other["spread"]):
        return "no clear difference"
    return "better" if gap < 0 else "worse"


def draw_samples(result: Data, images: Mapping[str, Tensor], path: Path) -> Path:
    """A row of generated images a setting, the same noise in each column, under their levels.

    Args:
        images: job -> uint8 (count, colours, size, size).
    """
    rows = scored(result)
    size = next(iter(images.values())).shape[-1]
    strips = [_strip(images[row["job"]][:SHOWN]) for row in rows]
    width = max(strip.shape[1] for strip in strips)
    gap = size // 4
    canvas, places, y = [], [], 0
    for k, (row, strip) in enumerate(zip(rows, strips, strict=True)):
        space = 0 if k == 0 else gap if row.get("level") != rows[k - 1].get("level") else max(1, size // 16)
        padded = np.full((space + size, width, 3), 255, dtype=np.uint8)
        padded[space:, : strip.shape[1]] = strip
        canvas.append(padded)
        places.append(y + space + size / 2)
        y += space + size
    figure, axes = blank(11.4, 0.5 + 0.34 * len(rows))
    axes.imshow(np.concatenate(canvas), interpolation="nearest", aspect="equal")
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=7)
    axes.set_anchor("E")  # all room to spare goes to the names on the left
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Generated images (one starting noise a column), and their Fréchet distance", fontsize=11, color=INK)
    return save(figure, path)


def _strip(images: Tensor) -> np.ndarray:
    """Images uint8 (n, colours, size, size) side by side with a white line behind each: (size, n (size + 1), 3)."""
    framed = F.pad(images.expand(-1, 3, -1, -1), (0, 1), value=255)
    strip: np.ndarray = framed.permute(2, 0, 3, 1).flatten(1, 2).numpy()
    return strip


def _label(row: Data) -> str:
    level = f"{row['level']}: " if "level" in row else ""
    count = f", {row['parameters']:,}" if "parameters" in row else ""
    return f"{level}{_named(row)}{count}  [{row['frechet']:.1f}]"


def draw_scores(result: Data, path: Path) -> Path:
    """Fréchet distance against trainable parameters (log axis), a variant's lowest distances so far joined by a line."""
    rows = scored(result)
    figure, axes = blank(8, 5.2)
    adapted = [row for row in rows if "level" in row]
    for k, variant in enumerate(dict.fromkeys(row["variant"] for row in adapted)):
        own = sorted((row for row in adapted if row["variant"] == variant), key=lambda row: int(row["parameters"]))
        values = [[row[name] for row in own] for name in ("parameters", "frechet", "spread")]
        axes.errorbar(*values, fmt="o", color=PALETTE[k], capsize=2, elinewidth=1, label=variant, zorder=3)
        lowest = [row for row in own if all(row["frechet"] < other["frechet"] for other in own if _fewer(other, row))]
        values = [[row[name] for row in lowest] for name in ("parameters", "frechet")]
        axes.plot(*values, "-", color=PALETTE[k], linewidth=1.1, zorder=2)
    for row in rows:
        if "level" not in row:
            axes.axhline(row["frechet"], color=INK, linewidth=0.8, linestyle="--")
            x, side = (
                (0.01, "left") if row["variant"] == "dense fine-tuning" else (0.99, "right")
            )  # the two others are far apart
            text, place = f"{row['variant']} {row['frechet']:.2f}", ("axes fraction", "data")
            axes.annotate(text, (x, row["frechet"]), xycoords=place, fontsize=8, ha=side, va="bottom", color=INK)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("Fréchet distance in the classifier's features, lower is better")
    axes.set_title(f"{_home(result).capitalize()} to handwritten digits: q and v of the U-Net adapted", fontsize=11)
    axes.grid(alpha=0.25, which="both")
    if adapted:
        axes.legend(fontsize=8, framealpha=0.9)
    return save(figure, path)


def _fewer(one: Data, other: Data) -> bool:
    """Whether a row has fewer parameters, or as many and comes first."""
    return (one["parameters"], one["frechet"]) < (other["parameters"], other["frechet"])


def report(result: Data) -> str:
    """The markdown section: what was run, a table, both pictures, and plain answers."""
    parts = [
        f"## Image generation: a diffusion model from {_home(result)} to handwritten digits",
        _setup(result),
        _table(result),
    ]
    skipped = [row for row in result["rows"] if "skipped" in row]
    if skipped:
        parts.append("Not run, as the variant cannot have so many or so few parameters:")
        reasons = [(f"{row['level']}, {row['variant']} {row['structure']}", row["skipped"].split(". ")[0]) for row in skipped]
        parts.append("\n".join(f"- {name.strip()}: {reason}." for name, reason in reasons))
    parts.append(f"![Fréchet distance against parameters]({SCORES})\n\n![Generated images]({SAMPLES})")
    if result.get("unfinished"):
        parts.append(f"**Unfinished**: {len(result['unfinished'])} settings are not in the table yet.")
    found = ([digits_answer(result)] if "seeds" in result else []) + answers(result)
    parts.append("\n".join(f"- {answer}" for answer in found))
    return "\n\n".join(parts) + "\n"


def _home(result: Data) -> str:
    """The kind of the source domain; results of before it could be chosen are of house numbers."""
    return str(result["recipe"].get("home", "house numbers"))


def _setup(result: Data) -> str:
    recipe, unet, machine = result["recipe"], result["recipe"]["unet"], result["machine"]
    base, adapt, size = recipe["base"], recipe["adapt"], unet["size"]
    colour = "grey" if unet["colours"] == 1 else "in colour"
    seeds = result.get("seeds", [])
    drawn = f"{len(seeds)} seeds, which draw first values, images, times and noise" if seeds else "one seed"
    chance = (
        "± is the larger of the seeds' standard deviation and the bootstrap's over the images, over the root of the number of "
        "seeds."
        if seeds
        else "± is the bootstrap's standard deviation over the images; the spread over training seeds was not measured."
    )
    edge = f", others a factor apart while the best is at the edge, the lowest within {LEVEL:.0%} of" if seeds else ""
    levels = ", ".join(
        f"{level} {level_budget(level, result['elements']):,} (on the paper's net {count:,})" for level, count in LEVELS.items()
    )
    return (
        f"Scale {result['scale']}, {machine['device']}, {machine['threads']} thread(s), {machine['date']}. "
        f"Source: {recipe['source']}. Target: {recipe['target']}. Images are {size}x{size}, {colour}.\n\n"
        f"The U-Net has {result['base']['parameters']:,} parameters: {unet['channels']} channels times "
        f"{', '.join(map(str, unet['multipliers']))}, patches of {unet['patch']}x{unet['patch']} pixels. Its "
        f"{result['weights']} q and v weights hold N = {result['elements']:,} elements (the paper's: {PAPER_ELEMENTS:,}). "
        f"Pre-training: {base['steps']:,} steps of {base['batch']} images. Each adaptation: {adapt['steps']:,} steps of "
        f"{adapt['batch']}, the same images, times and noise for all, {drawn}. Learning rate: for each setting, of "
        f"{', '.join(f'{r:g}' for r in recipe['rates'])}{edge} the one with the least loss on {recipe['held']:,} training "
        f"images kept apart, after {recipe['tried']:,} steps. Parameters that may be spent at each level: {levels}; "
        "a variant that needs more at the middle level may go to the upper end of the paper's, 20,000 in proportion.\n\n"
        f"Score: Fréchet distance in the {result['judge']['features']} features of a small digit classifier "
        f"({result['judge']['accuracy']:.1%} on the target's test images) between {recipe['generated']:,} generated images "
        f"({recipe['asked']} DDIM steps, eta 0) and the target's training images. **It is not FID**: no Inception network is "
        f"in it, and it compares rows of this table alone. {chance}"
    )


def _table(result: Data) -> str:
    lines = [
        "| level | variant | setting | parameters | Fréchet distance | confidence | loss, test images | learning rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scored(result):
        cells = [
            row.get("level", ""),
            row["variant"],
            row.get("setting", ""),
            f"{row['parameters']:,}" if "parameters" in row else "",
            f"{row['frechet']:.2f} ± {row['spread']:.2f}",
            f"{row['confidence']:.3f}",
            f"{row['loss']:.4f}" if "loss" in row else "",
            f"{row['rate']:g}" if "rate" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _references(result: Data) -> dict[str, Data]:
    """Real images, the model as it is, and dense fine-tuning, as far as they are finished."""
    return {row["variant"]: row for row in scored(result) if row["variant"] in _REFERENCES}


def digits_answer(result: Data) -> str:
    """Whether dense fine-tuning draws what the judge takes for digits."""
    known = _references(result)
    real, tuned = known["real test images"], known.get("dense fine-tuning")
    if tuned is None:
        return "Are dense fine-tuning's samples digits? It is not finished."
    good = tuned["confidence"] >= DIGIT_CONFIDENCE and tuned["frechet"] <= DIGIT_DISTANCE * real["frechet"]
    return (
        f"Are dense fine-tuning's samples digits? {'**Yes**' if good else '**No**'}: confidence {tuned['confidence']:.3f} "
        f"({DIGIT_CONFIDENCE:g} was asked for), distance {tuned['frechet'] / real['frechet']:.1f} times that of the real test "
        f"images ({DIGIT_DISTANCE} at most)."
    )


def answers(result: Data) -> list[str]:
    """Plain answers, one a sentence or two, from the rows alone; each once all rows that it asks for are finished."""
    rows, missing = scored(result), result.get("unfinished", [])
    known = _references(result)
    if len(known) < len(_REFERENCES):
        return []
    real, none, tuned = (known[name] for name in _REFERENCES)
    found = [
        f"Does adapting q and v work at all? Dense fine-tuning: {tuned['frechet']:.2f}, against {none['frechet']:.2f} without "
        f"adaptation and {real['frechet']:.2f} for real images: {compare(tuned, none)}."
    ]
    if not any(" LoRTA" in words or words.startswith("high LoRA ") for words in missing):
        found += _headline(rows, none)
    for question, key, other_key in _PAIRS:
        row, other = _find(rows, key), _find(rows, other_key)
        if row and other:
            found.append(
                f"What does {question} give? {_named(row)} ({row['parameters']:,} parameters) {row['frechet']:.2f}, "
                f"{_named(other)} ({other['parameters']:,}) {other['frechet']:.2f}: {compare(row, other)}."
            )
    for level in LEVELS:
        own = sorted((row for row in rows if row.get("level") == level), key=lambda row: float(row["frechet"]))
        if own and not any(words.startswith(f"{level} ") for words in missing):
            found.append(f"Best at the level {level}: {_named(own[0])} with {own[0]['frechet']:.2f}.")
    rates = [row["rate"] for row in rows if "rate" in row]
    tried = [row.get("tried", result["recipe"]["rates"]) for row in rows if "rate" in row]
    ends = sum(at_the_edge(rate, map(float, own)) for rate, own in zip(rates, tried, strict=True))
    return [*found, f"{ends} of {len(rates)} settings chose the smallest or the largest rate that was tried."]


def _headline(rows: Sequence[Data], none: Data) -> list[str]:
    """Does LoRTA reach LoRA's score with about a tenth of the parameters?"""
    lora = [row for row in rows if row["variant"] == "LoRA" and row["level"] == "high"]
    lorta = [row for row in rows if row["variant"].startswith("LoRTA")]
    if not lora or not lorta:
        return ["Does LoRTA reach LoRA with a tenth of the parameters? Not asked: LoRA or LoRTA was not run."]
    [other] = lora
    small = [row for row in lorta if row["parameters"] <= other["parameters"] / 8]
    question = f"Does LoRTA reach LoRA ({other['parameters']:,} parameters, {other['frechet']:.2f}) with about a tenth of them?"
    if compare(other, none) != "better":
        return [f"{question} Not asked: LoRA itself is not clearly better than no adaptation ({none['frechet']:.2f})."]
    if not small:
        return [f"{question} Not asked: no LoRTA so small was run."]
    best = min(small, key=lambda row: float(row["frechet"]))
    words = {"better": "Yes, and it is better", "no clear difference": "Yes", "worse": "No, not at this scale"}
    verdict = words[compare(best, other)]
    share = other["parameters"] / best["parameters"]
    return [f"{question} {verdict}: {_named(best)}, {best['parameters']:,} ({share:.1f} times fewer), {best['frechet']:.2f}."]


def _find(rows: Sequence[Data], key: tuple[str, str, str]) -> Data | None:
    return next((r for r in rows if (r.get("level"), r["variant"], r.get("structure")) == key), None)
