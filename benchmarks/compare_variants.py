"""How accurate is each variant at about the same parameters? In the demo's setting, at 500, 3,000 and 20,000.

``python benchmarks/compare_variants.py`` writes ``results/compare_variants-cpu.json``, docs/comparison.md and its figure; a run
that was stopped goes on with the rows that the file has. ``--page`` writes page and figure again from the file alone.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superlora_tn import AdapterSpec, SpecError, attach, dense, fit
from superlora_tn.demo.adapt import adapt
from superlora_tn.demo.base import FULL, DigitsRecipe, accuracy, pretrained
from superlora_tn.demo.demo import TARGETS
from superlora_tn.demo.digits import scanned_digits
from superlora_tn.demo.experiments import find_experiments
from superlora_tn.demo.whole_file import whole_file
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.tools.draw import INK, PALETTE, panels, save
from superlora_tn.tools.measure import machine

find_experiments()
from superlora_tn_paper.rates import at_the_edge, best, searched  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compare_variants-cpu.json"
PAGE = ROOT / "docs" / "comparison.md"
FAR = ("tiny_lora",)  # so far below all others that the figure tells them in words
FIGURE = ROOT / "docs" / "images" / "comparison.png"
LEVELS = (500, 3000, 20_000)
# Settings beside the rank, where the defaults leave a level empty.
OTHERS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "lokr": ({}, {"factor": 4}, {"factor": 2}),
    "krona": ({}, {"factor": 4}, {"factor": 2}),
    "lonkr": ({}, {"splits": 2}),
    "tt_lora": ({}, {"splits": 2}),
    "goft": ({}, {"factors": 2}),
    "quan_ta": ({"splits": 4}, {"splits": (2, 2, 16)}),
}
Shapes = dict[str, tuple[int, int]]
Data = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How all variants are compared.

    Attributes:
        rates: peak learning rates that each setting tries in any case, by the loss on training images kept apart; dense
            fine-tuning takes a tenth of each.
        extensions: the most rates that are added, one after the other, on the side of the best while it is at the edge.
        apart: how many of the 900 training images choose the rate.
        tried: steps of the runs that choose.
        choice_seed: of the runs that choose; none of the reported seeds.
        near: a count is at a level where it is at most this factor away.
        demo: the model, the steps and the seeds.
    """

    rates: tuple[float, ...] = (2.5e-3, 1e-2, 4e-2)
    extensions: int = 4
    apart: int = 180
    tried: int = 80
    choice_seed: int = 100
    near: float = 1.5
    demo: DigitsRecipe = FULL


@dataclass(frozen=True)
class Task:
    """The frozen model and the scans, as (images, labels)."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    protocol: Protocol

    @property
    def shapes(self) -> Shapes:
        """(out, in) of the adapted weights by name."""
        weights = {n: m for n, m in self.model.named_modules() if n.endswith(TARGETS) and isinstance(m, nn.Linear)}
        return {name: (m.out_features, m.in_features) for name, m in weights.items()}

    def run(
        self, spec: AdapterSpec, rate: float, seed: int, steps: int, train: tuple[Tensor, Tensor], judge: Callable[[], float]
    ) -> float:
        """What `judge` says of the model after one adaptation; the base is bit for bit the same before and after."""
        tuned = attach(self.model, spec, list(TARGETS), seed=seed)
        try:
            torch.manual_seed(seed)
            adapt(self.model, *train, steps=steps, batch=self.protocol.demo.batch, lr=rate, seed=seed)
            return judge()
        finally:
            tuned.detach()


def settings(variant: str) -> Iterator[Callable[[int], AdapterSpec]]:
    """Rank -> spec, once for each way of setting the rest."""
    maker = VARIANTS[variant]
    for others in OTHERS.get(variant, ({},)):
        if {"rank", "count", "size"} & set(inspect.signature(maker).parameters):  # the first of its settings
            yield partial(_ranked, maker, others)
        else:
            yield partial(_unranked, maker, others)


def _ranked(maker: Callable[..., Any], others: Mapping[str, Any], rank: int) -> AdapterSpec:
    made: AdapterSpec = maker(rank, **others)
    return made


def _unranked(maker: Callable[..., Any], others: Mapping[str, Any], rank: int) -> AdapterSpec:
    made: AdapterSpec = maker(**others)
    return made


def nearest(variant: str, level: int, shapes: Shapes, near: float) -> tuple[int, AdapterSpec] | None:
    """A variant's count nearest to a level (as a ratio) and its spec, or None where all are more than `near` times away."""
    found: list[tuple[int, AdapterSpec]] = []
    for maker in settings(variant):
        try:
            choice = fit(maker, level, shapes)
            found.append((choice.count, choice.spec))
            if choice.next_count is not None and choice.next_spec is not None:
                found.append((choice.next_count, choice.next_spec))
        except SpecError:  # even the smallest is above, or some ranks do not divide the sizes
            found += _divisors(maker, shapes)
    close = min(found, key=lambda one: (abs(math.log(one[0] / level)), one[0]), default=None)
    return close if close is not None and abs(math.log(close[0] / level)) <= math.log(near) else None


def _divisors(maker: Callable[[int], AdapterSpec], shapes: Shapes) -> Iterator[tuple[int, AdapterSpec]]:
    for rank in (1, 2, 4, 8, 16, 32, 64):
        try:
            spec = maker(rank)
            yield spec.count(shapes), spec
        except SpecError:
            continue


def measure(task: Task, variant: str, level: int | None, spec: AdapterSpec) -> Data:
    """One row: the rate is chosen, then every seed is trained on all training images."""
    protocol, steps, seeds = task.protocol, task.protocol.demo.steps, task.protocol.demo.seeds
    rates = [rate / 10 for rate in protocol.rates] if variant == "dense" else protocol.rates
    rows = torch.randperm(len(task.train[1]), generator=torch.Generator().manual_seed(protocol.choice_seed))
    kept, apart = rows[protocol.apart :], rows[: protocol.apart]
    own, held = ((task.train[0][part], task.train[1][part]) for part in (kept, apart))
    tried = searched(
        rates,
        rates[1] / rates[0],
        protocol.extensions,
        lambda rate: task.run(spec, rate, protocol.choice_seed, protocol.tried, own, lambda: _loss(task.model, held)),
        best,
    )
    rate = best(tried)
    return {
        "variant": variant,
        "level": level,
        "spec": spec.to_dict(),
        "parameters": spec.count(task.shapes),
        "tried": tried,
        "rate": rate,
        "accuracies": [
            task.run(spec, rate, seed, steps, task.train, lambda: accuracy(task.model, *task.test)) for seed in seeds
        ],
    }


@torch.no_grad()
def _loss(model: nn.Module, held: tuple[Tensor, Tensor]) -> float:
    return float(F.cross_entropy(model(pixel_values=held[0]).logits, held[1]))


def run(
    protocol: Protocol,
    place: Path,
    variants: tuple[str, ...] = tuple(VARIANTS),
    levels: tuple[int, ...] = LEVELS,
    bases: Path = ROOT / "out" / "demo",
) -> Data:
    """Measure all rows that `place` lacks, which is written after each; the pre-trained base is kept in `bases`."""
    demo = protocol.demo
    facts = json.loads(json.dumps(asdict(protocol) | {"base": demo.base_record()}))
    result: Data = json.loads(place.read_text()) if place.is_file() else {}
    if result.get("protocol") != facts:
        result = {"machine": machine("cpu"), "protocol": facts, "rows": []}
    done = {(row["variant"], row["level"]) for row in result["rows"]}
    model = pretrained(demo, bases)
    task = Task(model, scanned_digits("train", size=demo.size), scanned_digits("test", size=demo.size), protocol)
    result["zero_shot"] = accuracy(model, *task.test)
    wanted: list[tuple[str, int | None, AdapterSpec]] = [("dense", None, dense())]
    for level in levels:
        close = {v: nearest(v, level, task.shapes, protocol.near) for v in variants if v != "dense"}
        wanted += [(variant, level, found[1]) for variant, found in close.items() if found is not None]
    for variant, level, spec in wanted:
        if (variant, level) in done:
            continue
        start = time.process_time()
        row = measure(task, variant, level, spec)
        row["cpu_seconds"] = round(time.process_time() - start, 1)
        result["rows"].append(row)
        with whole_file(place) as partial_file:
            partial_file.write_text(json.dumps(result, indent=1) + "\n")
        print(variant, level, row["parameters"], f"{_mean(row):.4f}", row["cpu_seconds"], flush=True)
    return result


def _mean(row: Data) -> float:
    return statistics.fmean(row["accuracies"])


def _spread(row: Data) -> float:
    return statistics.stdev(row["accuracies"])


def _cell(row: Data | None) -> str:
    if row is None:
        return "| |"
    return f"{row['parameters']:,} | {100 * _mean(row):.1f} ± {100 * _spread(row):.1f} |"


def at(result: Data, level: int) -> list[Data]:
    """The rows of a level, the most accurate first."""
    return sorted((r for r in result["rows"] if r["level"] == level), key=_mean, reverse=True)


def answers(result: Data) -> Iterator[str]:
    """What the rows say, in sentences."""
    for level in LEVELS:
        rows = at(result, level)
        top, lowest = rows[0], rows[-1]
        chance = statistics.fmean(_spread(row) ** 2 for row in rows) ** 0.5
        # Two standard deviations of a difference of two means, with the rows' pooled spread.
        reach = 2 * chance * (2 / len(top["accuracies"])) ** 0.5
        like = sum(_mean(top) - _mean(row) <= reach for row in rows) - 1
        yield (
            f"**About {level:,}:** `{top['variant']}` has the highest mean, {100 * _mean(top):.1f} %; {like} of the "
            f"{len(rows) - 1} others lie within {100 * reach:.1f} points, two standard deviations of a difference of means. "
            f"The lowest is `{lowest['variant']}` with {100 * _mean(lowest):.1f} %."
        )
    adapted = [row for row in result["rows"] if row["level"] is not None]
    outside = [row for row in adapted if at_the_edge(row["rate"], map(float, row["tried"]))]
    names = ", ".join(f"`{row['variant']}` ({row['parameters']:,})" for row in outside)
    yield (
        f"{len(outside)} of {len(adapted)} settings chose the smallest or the largest rate that was tried"
        + (f", so that a better one may lie outside: {names}." if outside else ".")
    )


def page(result: Data) -> str:
    """docs/comparison.md."""
    about, protocol = result["machine"], result["protocol"]
    demo, (dense_row,) = protocol["demo"], [row for row in result["rows"] if row["variant"] == "dense"]
    named = {(row["variant"], row["level"]): row for row in result["rows"]}
    order = sorted({r["variant"] for r in result["rows"]} - {"dense"}, key=lambda v: list(VARIANTS).index(v))
    table = "\n".join(f"| `{v}` | " + " ".join(_cell(named.get((v, level))) for level in LEVELS) for v in order)
    heads = " | ".join(f"about {level:,} | accuracy %" for level in LEVELS)
    said = "\n".join(f"- {sentence}" for sentence in answers(result))
    apart, rates = protocol["apart"], ", ".join(f"{rate:g}" for rate in protocol["rates"])
    whole = f"{100 * _mean(dense_row):.1f} ± {100 * _spread(dense_row):.1f} %"
    return f"""# All variants at the same number of parameters

The demo's setting: a vision transformer of {demo["layers"]} layers and width {demo["dim"]}, pre-trained on printed digits and
frozen; q and v are adapted to scikit-learn's handwriting (900 scans to train on, 897 to test). It is a small task on a small
model: it shows that all variants train, and ranks none for large models.

![Accuracy of all variants at three numbers of parameters](images/comparison.png)

Mean and standard deviation over {len(demo["seeds"])} seeds; frozen base {100 * result["zero_shot"]:.1f} %, dense fine-tuning of
q and v ({dense_row["parameters"]:,} parameters) {whole}. An empty cell: no setting within a factor of {protocol["near"]:g}.

| variant | {heads} |
|---|{"---:|---|" * len(LEVELS)}
{table}

{said}

Each setting takes the rate with the least loss on {apart} training scans kept apart (a seed that is not reported) after
{protocol["tried"]} steps: of {rates} (dense: a tenth of each), and while the best is at the edge, one beyond it,
{protocol["extensions"]} at most. It then trains {demo["steps"]} steps of {demo["batch"]} on
all 900, as in the demo. Test scans are used for the figures alone. With 897 of them, chance in which scans are tested alone
makes about one point.

{about["device"]}, {about["threads"]} thread{"s" * (about["threads"] != "1")}, torch {about["torch"]}, {about["date"]};
written by `python benchmarks/compare_variants.py`.
"""


def draw(result: Data, place: Path) -> Path:
    """A row a variant, a colour a level, with the spread over seeds; the variants of the highest means first."""
    order = sorted({row["variant"] for row in result["rows"]} - {"dense"}, key=lambda v: _best(result, v))
    figure, grid = panels(1, 1)
    figure.set_size_inches(7.5, 1.2 + 0.22 * len(order))
    axes, (dense_row,) = grid[0][0], [row for row in result["rows"] if row["variant"] == "dense"]
    line = f"dense fine-tuning, {dense_row['parameters']:,}"
    axes.axvline(100 * _mean(dense_row), color=INK, linewidth=0.9, linestyle="--", label=line)
    for k, level in enumerate(LEVELS):
        rows = at(result, level)
        heights = [order.index(row["variant"]) + 0.22 * (k - 1) for row in rows]
        means, spreads = ([100 * f(row) for row in rows] for f in (_mean, _spread))
        style = {"fmt": "osD"[k], "color": PALETTE[k], "markersize": 4.5, "elinewidth": 1}
        axes.errorbar(means, heights, xerr=spreads, label=f"about {level:,} parameters", **style)
    axes.set_yticks(range(len(order)), order, fontsize=9)
    axes.set_ylim(-0.7, len(order) - 0.3)
    least = min(100 * (_mean(row) - _spread(row)) for row in result["rows"] if row["variant"] not in FAR)
    axes.set_xlim(left=least - 0.5)
    for variant in FAR:
        found = sorted(f"{100 * _mean(row):.1f}" for row in result["rows"] if row["variant"] == variant)
        axes.annotate(f"\u2190 {', '.join(found)}", (least - 0.3, order.index(variant)), fontsize=9, va="center", color=INK)
    axes.set_xlabel("accuracy on handwriting, %", fontsize=9)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=9, loc="outside upper center", ncols=2)
    return save(figure, place)


def _best(result: Data, variant: str) -> float:
    return max(_mean(row) for row in result["rows"] if row["variant"] == variant)


def main() -> None:
    """Measure what is missing, then write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write page and figure from the file alone")
    result = json.loads(RESULT.read_text()) if parser.parse_args().page else run(Protocol(), RESULT)
    PAGE.write_text(page(result))
    draw(result, FIGURE)


if __name__ == "__main__":
    main()
