"""Pictures: a contraction tree coloured by cost, accuracy against parameters, predicted against measured.

Needs matplotlib (the `demo` extra). Every function writes one, as the ending of its path says, and returns the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superlora_tn.contraction.plan import Plan

INK, PAPER, OPEN = "#1f2933", "#ffffff", "#9aa5b1"
PALETTE = ("#0b84a5", "#ca472f", "#6f4e7c", "#2e8b57", "#ffa056", "#8dddd0", "#b35c9e", "#5c6ac4", "#7a5c3e", "#444444")
MARKS = "os^Dvp*"  # of a family's variants


@dataclass(frozen=True)
class Point:
    """One measured setting: trainable parameters, mean accuracy (0..1) and its spread over seeds.

    Variants of one family share a colour and differ by their marks; without a family each has a colour of its own.
    """

    variant: str
    parameters: int
    accuracy: float
    spread: float
    family: str = ""


def blank(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure of so many inches and its axes, without touching pyplot's global state."""
    figure = sheet(width, height)
    return figure, figure.subplots()


def panels(rows: int, columns: int) -> tuple[Any, Any]:
    """An empty figure and its grid of small axes (rows, columns), without touching pyplot's global state."""
    figure = sheet(3.5 * columns, 2.6 * rows + 0.4)
    return figure, figure.subplots(rows, columns, squeeze=False)


def sheet(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure under exactly this path, whose folder is made where it is missing: what its ending says, PNG without one.

    Raises:
        OSError: pictures cannot have such an ending.
    """
    place, ending = Path(path), check_ending(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, format=ending)
    return place


def check_ending(path: str | Path) -> str:
    """The kind of picture that a path's ending says, PNG without one; for a look before work is done whose picture it is.

    Raises:
        OSError: pictures cannot have such an ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    place = Path(path)
    ending = place.suffix[1:].lower() or "png"
    if ending not in FigureCanvasAgg.get_supported_filetypes():
        raise OSError(f"a picture cannot be written as '{place.name}': end its name in .png, .svg or .pdf.")
    return ending


def box(axes: Any, text: str, place: Any, size: int, face: Any, edge: str, style: str) -> None:
    """Text in a box, centred on a place."""
    box = {"boxstyle": style, "fc": face, "ec": edge}
    axes.annotate(text, place, fontsize=size, color=INK, ha="center", va="center", zorder=3, bbox=box)


def bare(axes: Any, spots: np.ndarray) -> None:
    """Axes around these places (count, 2), without ticks and frame."""
    low, high = spots.min(0) - 0.6, spots.max(0) + 0.6
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def tree(plan: Plan | Sequence[Plan], path: str | Path, title: str = "") -> Path:
    """Draw a plan as its contraction tree: leaves are operands, each join a step, its colour the step's share of the price.

    Args:
        plan: what to draw; several, as of a sum, stand side by side.
        path: where the PNG goes.
        title: above the picture.
    """
    plans = [plan] if isinstance(plan, Plan) else list(plan)
    laid = [_tree_spots(one) for one in plans]
    widths = [max(5.0, 1.7 * len(one.inputs)) for one in plans]
    figure = sheet(sum(widths), 1.6 + 0.9 * (max(depth for _, depth in laid) + 1))
    (grid,) = figure.subplots(1, len(plans), squeeze=False, width_ratios=widths)
    total = sum(step.price(one.device) for one in plans for step in one.steps) or 1.0
    for axes, one, (spots, _) in zip(grid, plans, laid, strict=True):
        _draw_tree(axes, one, spots, total)
        axes.set_title(f"{one.route} route, {one.flops:,} FLOPs forward", color=INK, fontsize=10)
    if title:
        figure.suptitle(title, color=INK, fontsize=10)
    return save(figure, path)


def _draw_tree(axes: Any, plan: Plan, spots: Mapping[int, tuple[float, float]], total: float) -> None:
    from matplotlib import colormaps

    count = len(plan.inputs)
    for k, step in enumerate(plan.steps):
        x, y = spots[count + k]
        share = step.price(plan.device) / total
        for child in (step.large, step.small):
            axes.plot([spots[child][0], x], [spots[child][1], y], color=OPEN, linewidth=1.4, zorder=1)
        text = f"{' '.join(step.result) or '1'}\n{step.flops:,} FLOPs, {share:.0%}"
        box(axes, text, (x, y), 8, colormaps["YlOrRd"](0.05 + 0.75 * share), INK, "round,pad=0.3")
    for k, (name, indices) in enumerate(zip(plan.names, plan.inputs, strict=True)):
        box(axes, f"{name}\n{' '.join(indices) or '1'}", spots[k], 8, PAPER, INK, "round,pad=0.3")
    bare(axes, np.array(list(spots.values())))


def _tree_spots(plan: Plan) -> tuple[dict[int, tuple[float, float]], int]:
    """Leaves side by side in the order the tree meets them, each join above the middle of what it joins."""
    count = len(plan.inputs)
    spots: dict[int, tuple[float, float]] = {}
    height: dict[int, int] = {}

    def place(k: int) -> None:
        if k < count:
            spots[k], height[k] = (1.7 * sum(j < count for j in spots), 0.0), 0
            return
        step = plan.steps[k - count]
        for child in (step.large, step.small):
            place(child)
        height[k] = 1 + max(height[step.large], height[step.small])
        spots[k] = ((spots[step.large][0] + spots[step.small][0]) / 2, 1.0 * height[k])

    place(count + len(plan.steps) - 1)
    return spots, max(height.values())


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats with as many parameters or fewer, by rising parameters."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.parameters, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def pareto(
    points: Sequence[Point],
    path: str | Path,
    title: str,
    references: Mapping[str, float] | None = None,
    label: str = "accuracy, %",
) -> Path:
    """Draw accuracy against trainable parameters (log axis), with each variant's frontier line and that of all.

    Args:
        points: measured settings.
        path: where the PNG goes.
        title: above the picture.
        references: accuracies drawn as horizontal lines, such as the frozen base's.
        label: of the upright axis.
    """
    families: dict[str, list[str]] = {}
    for variant, family in dict.fromkeys((p.variant, p.family or p.variant) for p in points):
        families.setdefault(family, []).append(variant)
    styles = [
        (variant, PALETTE[k % len(PALETTE)], MARKS[j % len(MARKS)])
        for k, own in enumerate(families.values())
        for j, variant in enumerate(own)
    ]
    beside = len(styles) > 8  # so long a legend would lie on the points
    figure, axes = blank(8.8 if beside else 7.2, 4.8)
    for variant, colour, mark in styles:
        own = [p for p in points if p.variant == variant]
        axes.errorbar(
            [p.parameters for p in own],
            [100 * p.accuracy for p in own],
            [100 * p.spread for p in own],
            fmt=mark,
            color=colour,
            markersize=6,
            capsize=2,
            elinewidth=1,
            label=variant,
            zorder=3,
        )
        line = frontier(own)
        axes.plot([p.parameters for p in line], [100 * p.accuracy for p in line], "-", color=colour, linewidth=1.2, zorder=2)
    best = frontier(points)
    axes.step(
        [p.parameters for p in best],
        [100 * p.accuracy for p in best],
        where="post",
        color=OPEN,
        linestyle=":",
        linewidth=1.4,
        label="best of all with at most so many",
        zorder=1,
    )
    for name, value in (references or {}).items():
        axes.axhline(100 * value, color=INK, linewidth=0.8, linestyle="--")
        side = _freer(points, value)
        at = ({"left": 0.01, "right": 0.99}[side], 100 * value)
        words, fractions = f"{name} {100 * value:.1f} %", ("axes fraction", "data")
        axes.annotate(words, at, xycoords=fractions, fontsize=8, ha=side, va="bottom", color=INK)
    axes.margins(y=0.08)  # the words of the highest reference stand above its line
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25, which="both")
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if beside else {}
    axes.legend(fontsize=8, framealpha=0.9, **place)
    return save(figure, path)


def _freer(points: Sequence[Point], accuracy: float) -> str:
    """The side, left or right, on which words at a height are farther from all points of that third of the picture."""
    logs = np.log([p.parameters for p in points])
    third = (logs.max() - logs.min()) / 3
    gaps = np.array([max(0.0, abs(p.accuracy - accuracy) - p.spread) for p in points])
    left, right = gaps[logs <= logs.min() + third], gaps[logs >= logs.max() - third]
    return "left" if left.min() > right.min() else "right"


def predictions(points: Sequence[tuple[float, float, str]], path: str | Path) -> Path:
    """Draw predicted against measured seconds, both on log axes, with the line where they are equal.

    Args:
        points: (predicted, measured, route).
        path: where the PNG goes.
    """
    figure, axes = blank(5.6, 4.8)
    for k, route in enumerate(dict.fromkeys(p[2] for p in points)):
        own = [p for p in points if p[2] == route]
        axes.plot([1e3 * p[0] for p in own], [1e3 * p[1] for p in own], "o", color=PALETTE[k], label=route, alpha=0.8)
    values = [1e3 * value for p in points for value in p[:2]]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, "--", color=OPEN, linewidth=1, label="as predicted")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted, ms a step")
    axes.set_ylabel("measured above the frozen layer, ms a step")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    return save(figure, path)
