"""The demo: one frozen ViT, every variant of the paper, from printed digits to handwriting."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from superlora_tn.declare.maps import Fastfood
from superlora_tn.demo.adapt import adapt
from superlora_tn.demo.base import FULL, QUICK, DigitsRecipe, accuracy, pretrained
from superlora_tn.demo.digits import printed_digits, scanned_digits
from superlora_tn.demo.progress import on_step, progress
from superlora_tn.model.attach import attach
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, lokr, lonkr, lora, lorta, lotr, superlora
from superlora_tn.tools import diagram, draw

TARGETS = ("q_proj", "v_proj")
HOME_TEST = 2000


@dataclass(frozen=True)
class Result:
    """One setting, over all seeds: accuracies in 0..1, seconds a training step."""

    variant: str
    setting: str
    parameters: int
    zero_shot: float
    accuracies: tuple[float, ...]
    step_seconds: float

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 for one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Setting:
    """A variant with its settings in words, and the declaration."""

    variant: str
    words: str
    spec: AdapterSpec


def settings(quick: bool) -> list[Setting]:
    """What every run adapts with; the quick demo takes one setting of each variant."""
    every = [
        Setting("dense", "", dense()),
        Setting("lora", "r=8", lora(8)),
        Setting("lora", "r=2", lora(2)),
        Setting("lora", "r=1", lora(1)),
        Setting("lokr", "r=4", lokr(4)),
        Setting("lokr", "r=1", lokr(1)),
        Setting("lotr", "r=8", lotr(8)),
        Setting("lotr", "r=2", lotr(2)),
        Setting("lonkr", "K=3", lonkr(2)),
        Setting("lorta", "r=6 M=3 G=4", lorta(6, 3, 4)),
        Setting("lorta", "r=4 M=3", lorta(4)),
        Setting("lorta", "r=2 M=5", lorta(2, 5)),
        Setting("superlora", "r=4 M=3 G=4 K=2 rho=0.5", superlora(4, 3, 4, 2, Fastfood(0.5))),
        Setting("superlora", "r=2 M=3 K=2 rho=0.1", superlora(2, 3, 1, 2, Fastfood(0.1))),
    ]
    first = {s.variant: s for s in reversed(every)}
    return [s for s in every if not quick or s is first[s.variant]]


@dataclass(frozen=True)
class Task:
    """The base and the data of all runs."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    zero_shot: float
    recipe: DigitsRecipe


def run(out: Path, quick: bool = False, as_json: bool = False) -> list[Result]:
    """Run the demo and write ``pareto.png``, ``network.png`` and ``results.json``.

    Args:
        out: the folder for all of them, and for the pre-trained base.
        quick: shorter training and one seed.
        as_json: print the results as JSON alone.
    """
    console = Console(stderr=True) if as_json else Console()
    recipe = QUICK if quick else FULL
    start = time.perf_counter()
    with progress(console) as bar:
        task, home = _prepare(recipe, out, bar)
        results = [_measure(task, setting, bar) for setting in settings(quick)]
    seconds = time.perf_counter() - start
    figures = _figures(out, task, results)
    body = {"seconds": seconds, "home_accuracy": home, "zero_shot": task.zero_shot, "results": [asdict(r) for r in results]}
    (out / "results.json").write_text(json.dumps(body, indent=1) + "\n")
    if as_json:
        print(json.dumps(body, indent=1))
    console.print(
        f"Base: {100 * home:.1f} % on printed digits in fonts it never saw, {100 * task.zero_shot:.1f} % on handwriting."
    )
    console.print(_table(results, len(recipe.seeds)))
    console.print(f"{seconds:.0f} s in all. Written: {', '.join(map(str, figures))}, {out / 'results.json'}")
    return results


def _prepare(recipe: DigitsRecipe, out: Path, bar: Progress) -> tuple[Task, float]:
    """The frozen base, the scans, and the base's accuracy at home."""
    model = pretrained(recipe, out, on_step(bar, "pre-training on printed digits"))
    train, test = scanned_digits("train", size=recipe.size), scanned_digits("test", size=recipe.size)
    home = accuracy(model, *printed_digits(HOME_TEST, 1, "test", recipe.size))
    return Task(model, train, test, accuracy(model, *test), recipe), home


def _measure(task: Task, setting: Setting, bar: Progress) -> Result:
    """One setting over all seeds; the base is bit for bit the same before each."""
    recipe, accuracies, seconds, parameters = task.recipe, [], [], 0
    for seed in recipe.seeds:
        tuned = attach(task.model, setting.spec, list(TARGETS), seed=seed)
        show = on_step(bar, f"{setting.variant} {setting.words}, seed {seed}")
        torch.manual_seed(seed)
        seconds.append(
            adapt(task.model, *task.train, steps=recipe.steps, batch=recipe.batch, lr=recipe.lr, seed=seed, on_step=show)
        )
        accuracies.append(accuracy(task.model, *task.test))
        parameters = tuned.num_parameters
        tuned.detach()
    return Result(setting.variant, setting.words, parameters, task.zero_shot, tuple(accuracies), statistics.median(seconds))


def _figures(out: Path, task: Task, results: Sequence[Result]) -> list[Path]:
    points = [draw.Point(r.variant, r.parameters, r.mean, r.spread) for r in results]
    title = "Printed digits to handwriting: q and v adapted, all else frozen"
    pareto = draw.pareto(points, out / "pareto.png", title, {"frozen base": task.zero_shot})
    drawn = superlora(3, 3, 1, 2)
    network = diagram.network(drawn, {"weight": (64, 64)}, out / "network.png", "superlora(rank=3, order=3, splits=2)")
    return [pareto, network]


def _table(results: Sequence[Result], seeds: int) -> Table:
    table = Table(title=f"q and v of a frozen ViT, accuracy on handwriting, {seeds} seed{'s' if seeds > 1 else ''}")
    for heading in ("variant", "setting"):
        table.add_column(heading)
    for heading in ("parameters", "zero-shot %", "adapted %", "ms a step"):
        table.add_column(heading, justify="right")
    for r in results:
        adapted = f"{100 * r.mean:.1f} ± {100 * r.spread:.1f}" if seeds > 1 else f"{100 * r.mean:.1f}"
        zero_shot = f"{100 * r.zero_shot:.1f}"
        table.add_row(r.variant, r.setting, f"{r.parameters:,}", zero_shot, adapted, f"{1e3 * r.step_seconds:.1f}")
    return table
