"""The image generation until dense fine-tuning draws digits: longer training, a searched rate for each setting, several seeds.

Several processes may work into one folder; each finished job is a JSON file, and a job that another process makes is left
to it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from superlora_tn import AdapterSpec, SpecError, dense
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import reference_rank
from superlora_tn.demo.progress import progress
from superlora_tn.tools.measure import machine
from superlora_tn_paper.denoising import Schedule, Training
from superlora_tn_paper.diffusion import Experiment, Recipe, adapted, prepare, said, tried_loss, write
from superlora_tn_paper.diffusion_settings import settings
from superlora_tn_paper.rates import lowest_level, searched
from superlora_tn_paper.store import Data, Elsewhere, alone
from superlora_tn_paper.unet import UNetShape, attention_shapes

PAUSE = 5.0  # seconds until it is looked again whether another process has finished its job


@dataclass(frozen=True)
class LongRecipe:
    """Every setting of the runs to convergence.

    Args:
        recipe: the model, its training, and how it is judged; its `rates` are tried in any case, its `seed` makes the model.
        factor: between neighbouring rates; more are tried on the side of the best while it is at the edge.
        extensions: the most rates that are added.
        choice_seed: of the runs that choose a rate; none of the report's.
        seeds: of the report.
    """

    recipe: Recipe
    factor: float = 4.0
    extensions: int = 2
    choice_seed: int = 100
    seeds: tuple[int, ...] = (0, 1)


# Tried with dense fine-tuning, one seed: distance (asked is five times that of real digits), confidence (0.85).
# - from house numbers, 2,000 steps of pre-training: confidence 0.68; white ink on black lies nearer;
# - from handwritten letters, 28 pixels padded to 32: 42.7 (30.6) and 0.78 after 2,000 steps, 36.5 and 0.81 after 6,000; four
#   times the elements in q and v (64 channels): no better. The writing fills the images: 46.3 (43.5) and 0.83 after 2,500,
#   45.1 and 0.82 after 10,000; many samples stay letters;
# - from printed digits, 4,000 steps: 45.1 (43.4) and 0.82 after 1,500 steps of adaptation; after 4,000 at rates of 0.0025,
#   0.005 and 0.01 34.7, 32.3 and 33.3 with 0.84 to 0.85. So a longer adaptation is what was missing (3,000 do not suffice).
# The judge of these trials was taught 800 steps, and is 0.85 sure of clean printed digits; after 3,000 as at the full scale
# it knows 98.9% of the test digits (98.3% before) and is 0.92 sure of the printed ones, and 0.89 to 0.90 of the last samples,
# whose distances are 64.2, 59.7 and 62.2 to it (71.1).
# A rate is tried for 1,000 steps: 200 prefer one that is too high for 4,000. LoRA of rank 1 has losses of 0.2079, 0.1976 and
# 0.1948 after 200 steps at 0.0025, 0.01 and 0.04, and 0.1951, 0.1901 and 0.1952 after 1,000; 4,000 at 0.04 end at 0.1991.
LONG = LongRecipe(
    Recipe(
        unet=UNetShape(size=16, colours=1, patch=2, channels=32, blocks=1, halvings=2),
        schedule=Schedule("cosine", predicts="velocity"),
        home="printed digits",
        close=True,
        drawn=20_000,
        base=Training(steps=4000, batch=64, lr=2e-3, decay=0.999, every=500),
        adapt=Training(steps=4000, batch=64, lr=0.0, decay=0.998, every=500),
        rates=(2.5e-3, 1e-2, 4e-2),
        tried=1000,
        held=256,
        generated=500,
        asked=50,
        batch=250,
        judge_steps=3000,
    )
)


@dataclass(frozen=True)
class Setting:
    """One row to come: its job's name, what the table says of it, and the declaration."""

    job: str
    about: Data
    spec: AdapterSpec

    @property
    def words(self) -> str:
        """For the progress bar."""
        return f"{self.about.get('level', '')} {self.about['variant']} {self.about['setting']}".strip()


def wanted(shapes: Mapping[str, Shape]) -> list[Setting | Data]:
    """Dense fine-tuning, then all settings of the four levels; those that a level's budget does not allow as their row."""
    first = {"variant": "dense fine-tuning", "setting": "", "structure": ""}
    found: list[Setting | Data] = [Setting("dense", first | {"parameters": dense().count(shapes)}, dense())]
    for one in settings():
        about: Data = {"level": one.level, "variant": one.variant, "structure": one.structure}
        try:
            choice = one.choose(shapes)
        except SpecError as error:
            found.append({"job": one.job, **about, "skipped": str(error)})
            continue
        words = f"{one.structure} r={reference_rank(choice.spec.network)}".strip()
        about |= {"budget": choice.budget, "setting": words, "parameters": choice.count}
        found.append(Setting(one.job, about, choice.spec))
    return found


@dataclass(frozen=True)
class Converged:
    """What all jobs share.

    Attributes:
        long: every setting.
        experiment: model, judge and data.
        locks: a folder for the locks of the jobs being made.
    """

    long: LongRecipe
    experiment: Experiment
    locks: Path

    def row(self, setting: Setting) -> Data:
        """Choose the rate, then adapt and generate with every seed.

        Raises:
            Elsewhere: another process is at a part of it.
        """
        long, spec, words = self.long, setting.spec, setting.words
        chooser = self.experiment.with_seed(long.choice_seed)

        def loss(rate: float) -> float:
            name = f"choose_{setting.job}_{rate:g}_after_{long.recipe.tried}"
            job = self.job(name, lambda: {"loss": tried_loss(chooser, spec, rate, words)})
            return float(job["loss"])

        tried = searched(long.recipe.rates, long.factor, long.extensions, loss, lowest_level)
        rate = lowest_level(tried)
        runs: list[Data] = []
        elsewhere: Elsewhere | None = None
        for seed in long.seeds:
            name, own = f"{setting.job}_{rate:g}_seed_{seed}", self.experiment.with_seed(seed)
            try:
                runs.append(self.job(name, partial(adapted, own, name, spec, rate, f"{words}, seed {seed}")))
            except Elsewhere as error:  # the other seeds are free
                elsewhere = error
        if elsewhere is not None:
            raise elsewhere
        return {"job": setting.job, **setting.about, "rate": rate, "tried": tried, **over_seeds(runs)}

    def references(self) -> list[Data]:
        """Real test images, and the model as it is."""
        own = self.experiment
        real = self.job("real", lambda: own.scored(own.test[: own.recipe.generated]))
        none = [self.job(f"none_seed_{seed}", own.with_seed(seed).generated) for seed in self.long.seeds]
        return [
            {"job": "real", "variant": "real test images", **real},
            {"job": "none", "variant": "no adaptation", **over_seeds(none)},
        ]

    def job(self, name: str, make: Callable[[], Data]) -> Data:
        """A job's result, made where it is not there and no other process is at it."""
        store = self.experiment.store
        if store.path(name).is_file():
            return store.get(name, dict)
        with alone(self.locks / f"{name}.lock"):
            return store.get(name, make)


def over_seeds(runs: Sequence[Data]) -> Data:
    """One row of several runs: means, and each run's own figures.

    The spread is that of the mean: the larger of the seeds' standard deviation and the images' chance, over the root of the
    number of seeds. Two seeds alone may lie close by luck.
    """
    means = {name: statistics.fmean(run[name] for run in runs) for name in ("frechet", "confidence", "loss")}
    distances = [run["frechet"] for run in runs]
    between = statistics.stdev(distances) if len(runs) > 1 else 0.0
    within = math.sqrt(statistics.fmean(run["spread"] ** 2 for run in runs))
    return means | {
        "spread": max(between, within) / math.sqrt(len(runs)),
        "frechets": distances,
        "confidences": [run["confidence"] for run in runs],
        "shown": runs[0]["shown"],
    }


def _prepared(
    long: LongRecipe, out: Path, locks: Path, data: Path | None, device: str, bar: Progress
) -> tuple[Data, Experiment]:
    """As `prepare`; only the settings that jobs depend on are in their folder's name."""
    with alone(locks / "model.lock"):
        return prepare(long.recipe, out, {"rates": None, "tried": None, "scale": "converged"}, data, device, bar)


def run(out: Path, long: LongRecipe, data: Path | None, device: str, console: Console, pause: float = PAUSE) -> Data:
    """Work off all settings; ``diffusion.json`` and its pictures are written after each, with the finished ones alone.

    Args:
        out: the folder for all that is written; other processes may work into it at the same time.
        long: every setting.
        data: the folder with SVHN and MNIST, see `domains`; None uses what the `demo` extra brings.
        device: "cpu" or "cuda".
        console: for progress.
        pause: seconds to wait where only jobs of other processes are left.

    Returns:
        What ``diffusion.json`` holds.
    """
    locks = out / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with progress(console) as bar:
        while True:
            try:
                found, experiment = _prepared(long, out, locks, data, device, bar)
                own = Converged(long, experiment, locks)
                first = own.references()
                break
            except Elsewhere:
                time.sleep(pause)
        console.print(said(found))
        every = wanted(attention_shapes(experiment.model))
        rows: dict[str, Data] = {one["job"]: one for one in every if isinstance(one, dict)}
        left = [one for one in every if isinstance(one, Setting)]
        result: Data = {}
        while left:
            before = len(left)
            for setting in list(left):
                try:
                    rows[setting.job] = row = own.row(setting)
                except Elsewhere:
                    continue
                left.remove(setting)
                console.print(f"{setting.words}: distance {row['frechet']:.2f}, confidence {row['confidence']:.3f}")
                names = [one.job if isinstance(one, Setting) else one["job"] for one in every]
                result = {
                    "experiment": "diffusion",
                    "scale": "converged",
                    "machine": machine(device),
                    **found,
                    "seeds": list(long.seeds),
                    "unfinished": [one.words for one in left],
                    "rows": [dict(one) for one in [*first, *(rows[name] for name in names if name in rows)]],
                }
                result["recipe"] |= {k: v for k, v in asdict(long).items() if k != "recipe"}
                write(out, result)
            if len(left) == before:
                time.sleep(pause)
    return result
