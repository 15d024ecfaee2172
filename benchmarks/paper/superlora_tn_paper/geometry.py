"""The paper's geometry analysis: how near each variant's dW comes to dense fine-tuning's, in the classification's own runs.

Chen et al., arXiv 2403.11887: shared singular directions dL and dR and distance dE, query and value apart.
"""

from __future__ import annotations

import math
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
from superlora_tn_paper.classification import Experiment, choose_rates, opened
from superlora_tn_paper.classification_settings import Setting
from superlora_tn_paper.classification_training import Recipe
from superlora_tn_paper.geometry_report import COUNTS, LAYERS, SCALED, draw_counts, draw_layers
from superlora_tn_paper.store import Data, write_json
from superlora_tn_paper.task import Task

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
        own = [s for s in experiment.settings if s.variant in COMPARED]
        _, head, rates = choose_rates(experiment, {s.family: None for s in own})
        rows = _rows(experiment, own, head, rates)
        task = experiment.task
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


def _rows(experiment: Experiment, own: Sequence[Setting], head: float, rates: Mapping[str, float]) -> list[Data]:
    """Each setting beside dense fine-tuning of the same seed; dense itself beside no change at all, for scale."""
    weights: list[list[dict[str, dict[str, float]]]] = [[] for _ in own]
    row = experiment.bar.add_task("comparing", total=len(experiment.recipe.seeds) * len(own))
    for seed in experiment.recipe.seeds:
        reference: dict[str, Tensor] = {}
        for k, setting in enumerate(own):
            found = _deltas(experiment, setting, rates[setting.family], head, seed)
            reference = reference or found
            nothing = {name: torch.zeros_like(delta) for name, delta in found.items()}
            weights[k].append(_compared(nothing if setting.variant == "dense" else found, reference))
            experiment.bar.advance(row)
    return [
        {
            "variant": setting.variant,
            "words": setting.words,
            "parameters": setting.parameters,
            "weights": seeds,
        }
        for setting, seeds in zip(own, weights, strict=True)
    ]


def _compared(deltas: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """dL, dR and dE of each weight, and the distance that its best multiple leaves, as a share of the reference."""
    found = {}
    for name, one in compare_all(deltas, references, K).items():
        delta, reference = deltas[name].double().flatten(), references[name].double().flatten()
        cosine = float(functional.cosine_similarity(delta, reference, dim=0))
        found[name] = asdict(one) | {SCALED[0]: math.sqrt(max(0.0, 1 - cosine**2))}
    return found


def _deltas(experiment: Experiment, setting: Setting, rate: float, head: float, seed: int) -> dict[str, Tensor]:
    """dW of each target after a run, trained where no earlier run has kept it."""
    experiment.run(setting, rate, head, seed)
    kept = experiment.store.path(experiment.name(setting, rate, head, seed), "adapter")
    handle = load(experiment.task.model, kept)
    try:
        return {name: handle.delta(name).detach().cpu() for name in handle.targets}
    finally:
        handle.detach()
