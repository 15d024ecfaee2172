"""The paper's geometry analysis: how near each variant's dW comes to dense fine-tuning's, in the classification's own runs.

Chen et al., arXiv 2403.11887: shared singular directions dL and dR and distance dE, query and value apart.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from superlora_tn import load
from superlora_tn.tools.geometry import compare_all
from superlora_tn.tools.measure import machine
from superlora_tn_paper import converged
from superlora_tn_paper.classification import choose_rates, opened
from superlora_tn_paper.classification_settings import Setting
from superlora_tn_paper.classification_training import Recipe
from superlora_tn_paper.converged import PAUSE, ConvergedRecipe
from superlora_tn_paper.geometry_report import COUNTS, LAYERS, SCALED, draw_counts, draw_layers
from superlora_tn_paper.store import Data, Elsewhere, write_json
from superlora_tn_paper.task import Task, TaskError

K = 5  # singular directions, as in the paper
COMPARED = ("dense", "LoRA", "2D", "2D reshape", "LoKr", "LoTR", "LoRTA M=3", "LoRTA M=5")


def run(out: Path, scale: str, recipe: Recipe, make: Callable[[Progress], Task], console: Console) -> Data:
    """The whole analysis; runs that classification finished in the same folder are taken up, the others made.

    Args:
        out: the folder for all that is written: ``geometry.json``, two pictures, and the finished jobs.
        scale: its name in the result.
        recipe: hyper-parameters.
        make: gives the task.
        console: for progress.

    Returns:
        What ``geometry.json`` holds.
    """
    with opened(out, recipe, make, console) as experiment:
        own = _compared_settings(experiment.settings)
        _, head, rates = choose_rates(experiment, {s.family: None for s in own})

        def kept(setting: Setting, seed: int) -> Path:
            rate = rates[setting.family]
            experiment.run(setting, rate, head, seed)
            return experiment.store.path(experiment.name(setting, rate, head, seed), "adapter")

        return _written(out, scale, experiment.task, recipe, _rows(experiment.task, own, recipe.seeds, kept, experiment.bar))


def run_converged(
    out: Path, recipe: ConvergedRecipe, make: Callable[[Progress], Task], console: Console, pause: float = PAUSE
) -> Data:
    """As `run`, of the runs to convergence: of dense fine-tuning's seeds, and the settings that are finished there.

    Args:
        out, recipe, make, console: as `run`'s, and those of the classification.
        pause: seconds to wait for a job of another process.

    Raises:
        TaskError: dense fine-tuning is not finished, or nothing beside it.
    """
    done = out / "classification.json"
    rates = {(r["variant"], r["words"]): r["rate"] for r in json.loads(done.read_text())["rows"]} if done.is_file() else {}
    with converged.opened(out, recipe, make, console) as experiment:
        own = [s for s in _compared_settings(experiment.settings) if (s.variant, s.words) in rates]
        if len(own) < 2 or own[0].variant != "dense":
            raise TaskError(
                "the geometry compares finished runs with dense fine-tuning's; run classification --scale converged into the "
                "same --out until dense fine-tuning and others are finished."
            )

        def kept(setting: Setting, seed: int) -> Path:
            while True:
                try:
                    return experiment.kept(setting, rates[setting.variant, setting.words], seed)
                except Elsewhere:
                    time.sleep(pause)

        rows = _rows(experiment.task, own, recipe.seeds, kept, experiment.bar)
        return _written(out, "converged", experiment.task, recipe, rows)


def _compared_settings(every: Sequence[Setting]) -> list[Setting]:
    """Those of the variants that are compared, dense fine-tuning first."""
    return sorted((s for s in every if s.variant in COMPARED), key=lambda s: s.variant != "dense")


def _written(out: Path, scale: str, task: Task, recipe: Recipe | ConvergedRecipe, rows: list[Data]) -> Data:
    result: Data = {
        "experiment": "geometry",
        "scale": scale,
        "machine": machine(task.device),
        "task": task.words,
        "recipe": asdict(recipe),
        "directions": K,
        "side": min(min(shape) for shape in task.shapes.values()),
        "rows": rows,
    }
    write_json(out / "geometry.json", result)
    draw_layers(result, out / LAYERS)
    draw_counts(result, out / COUNTS)
    return result


def _rows(
    task: Task, own: Sequence[Setting], seeds: Sequence[int], kept: Callable[[Setting, int], Path], bar: Progress
) -> list[Data]:
    """Each setting beside dense fine-tuning of the same seed; dense itself beside no change at all, for scale."""
    weights: list[list[dict[str, dict[str, float]]]] = [[] for _ in own]
    row = bar.add_task("comparing", total=len(seeds) * len(own))
    for seed in seeds:
        reference: dict[str, Tensor] = {}
        for k, setting in enumerate(own):
            found = _deltas(task, kept(setting, seed))
            reference = reference or found
            nothing = {name: torch.zeros_like(delta) for name, delta in found.items()}
            weights[k].append(_compared(nothing if setting.variant == "dense" else found, reference))
            bar.advance(row)
    return [
        {
            "variant": setting.variant,
            "words": setting.words,
            "parameters": setting.parameters,
            "weights": by_seed,
        }
        for setting, by_seed in zip(own, weights, strict=True)
    ]


def _compared(deltas: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """dL, dR and dE of each weight, and the distance that its best multiple leaves, as a share of the reference."""
    found = {}
    for name, one in compare_all(deltas, references, K).items():
        delta, reference = deltas[name].double().flatten(), references[name].double().flatten()
        cosine = float(functional.cosine_similarity(delta, reference, dim=0))
        found[name] = asdict(one) | {SCALED[0]: math.sqrt(max(0.0, 1 - cosine**2))}
    return found


def _deltas(task: Task, kept: Path) -> dict[str, Tensor]:
    """dW of each target, of a kept adapter."""
    handle = load(task.model, kept)
    try:
        return {name: handle.delta(name).detach().cpu() for name in handle.targets}
    finally:
        handle.detach()
