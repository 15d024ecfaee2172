"""What ``superlora-tn reproduce`` does: run one experiment, draw it, and write the report of all that the folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from superlora_tn.demo.base import FULL, DigitsRecipe
from superlora_tn.demo.progress import on_step
from superlora_tn_paper import classification, converged, diffusion, diffusion_converged, geometry, report
from superlora_tn_paper.classification_training import RECIPES, Recipe
from superlora_tn_paper.converged import ConvergedRecipe
from superlora_tn_paper.store import Data
from superlora_tn_paper.task import DOMAINS, Task, TaskError, digits_task, folder_task

EXPERIMENTS = tuple(report.REPORTS)
STOPPING = "early-stopping"  # the scale of runs that end by themselves


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        experiment: one of `EXPERIMENTS`.
        scale: "small", "converged" (diffusion; classification and geometry with a data folder), "early-stopping"
            (classification and geometry of MNIST with a data folder) or "full".
        data: the data folder, or for the full scale a data set's folder or hub name; None takes what is there without.
        model: for the full scale, a folder or hub name.
        domain: what classification and geometry adapt to, of the small scale with a data folder, one of `task.DOMAINS`;
            None takes the first.
        device: "cpu" or "cuda".
        out: the folder for all that is written.
        digits: of the model that is pre-trained where there is no data folder.

    Raises:
        TaskError: settings that do not go together: nothing that is asked for is ignored.
    """

    experiment: str
    out: Path
    scale: str = "small"
    data: str | None = None
    model: str | None = None
    domain: str | None = None
    device: str = "cpu"
    digits: DigitsRecipe = FULL

    def __post_init__(self) -> None:
        if self.model is not None and self.experiment == "diffusion":
            raise TaskError(f"--model {self.model} goes with classification and geometry; diffusion trains its own model.")
        if self.model is not None and self.scale != "full":
            raise TaskError(f"--model {self.model} goes with --scale full; the {self.scale} scale brings its own model.")
        if self.scale == "converged" and self.experiment != "diffusion" and self.data is None:
            raise TaskError(
                "--scale converged goes with diffusion, and with classification or geometry and a data folder: --data FOLDER "
                "(or SUPERLORA_DATA)."
            )
        fits = self.experiment != "diffusion" and self.data is not None and self.domain in converged.STOPPING
        if self.scale == STOPPING and not fits:
            raise TaskError(
                f"--scale {STOPPING} goes with classification or geometry, with a data folder (--data FOLDER, or "
                f"SUPERLORA_DATA) and with --domain {' or '.join(converged.STOPPING)}."
            )
        if self.domain is not None and self.experiment == "diffusion":
            raise TaskError(f"--domain {self.domain} goes with classification and geometry; diffusion goes from SVHN to MNIST.")
        if self.domain is not None and (self.scale == "full" or self.data is None):
            raise TaskError(f"--domain {self.domain} goes with a data folder, and not with --scale full: --data FOLDER.")


def reproduce(
    request: Request, as_json: bool = False, recipes: Mapping[str, Recipe] = RECIPES, longer: ConvergedRecipe | None = None
) -> Data:
    """Run an experiment into its folder: JSON, pictures, and ``report.md``. A run that was stopped goes on.

    Args:
        request: what.
        as_json: print the results as JSON alone.
        recipes: hyper-parameters by scale, of classification and geometry.
        longer: those of the converged scale; None takes the domain's.

    Raises:
        TaskError: data, model or device are not there.
    """
    if request.device == "cuda" and not torch.cuda.is_available():
        raise TaskError("--device cuda was asked for, but torch sees no GPU here; use --device cpu.")
    console = Console(stderr=True) if as_json else Console()
    request.out.mkdir(parents=True, exist_ok=True)
    result = _run(request, console, recipes, longer)
    if as_json:
        print(json.dumps(result, indent=1))
    console.print(f"Written: {report.write(request.out)}, with {request.experiment}.json and its pictures beside it.")
    return result


def _run(request: Request, console: Console, recipes: Mapping[str, Recipe], longer: ConvergedRecipe | None) -> Data:
    out, scale = request.out, request.scale
    if request.experiment == "diffusion":
        folder = None if request.data is None else Path(request.data)
        if folder is not None and not folder.is_dir():
            raise TaskError(f"the data folder {folder} is not there; give another --data (or SUPERLORA_DATA), or none.")
        if scale == "converged":
            return diffusion_converged.run(out, diffusion_converged.LONG, folder, request.device, console)
        return diffusion.run(out, "full" if scale == "full" else "small", folder, request.device, console)

    def make(bar: Progress) -> Task:
        return make_task(request, bar)

    if scale in ("converged", STOPPING):
        own = converged.STOPPING if scale == STOPPING else converged.RECIPES
        experiment = geometry.run_converged if request.experiment == "geometry" else converged.run
        return experiment(out, longer or own[request.domain or DOMAINS[0]], make, console)
    recipe = recipes["digits" if scale == "small" and request.data is None else scale]

    if request.experiment == "geometry":
        return geometry.run(out, scale, recipe, make, console)
    return classification.run(out, scale, recipe, make, console)


def make_task(request: Request, bar: Progress) -> Task:
    """The model and data of a scale; without a data folder the small one is the demo's digits.

    Raises:
        TaskError: what was asked for is not there.
    """
    if request.scale == "full":
        from superlora_tn_paper import hub

        return hub.hub_task(request.model or hub.MODEL, request.data or hub.DATA, request.device)
    if request.data is None:
        return digits_task(request.out, request.digits, on_step(bar, "pre-training on printed digits"), request.device)
    return folder_task(Path(request.data), request.domain or DOMAINS[0], request.device)
