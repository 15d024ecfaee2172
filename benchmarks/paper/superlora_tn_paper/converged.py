"""The image classification to convergence: few images seen often, the head from its optimum, a rate for each setting.

Several processes may work into one folder; each finished job is a file, and a job that another process makes is left to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from superlora_tn.demo.progress import on_step, progress
from superlora_tn.tools.measure import machine
from superlora_tn_paper.classification import map_words
from superlora_tn_paper.classification_report import PARETO
from superlora_tn_paper.classification_settings import Setting, settings
from superlora_tn_paper.classification_training import (
    adapted,
    answers,
    converged_head,
    descend,
    features,
    head_score,
    score,
)
from superlora_tn_paper.converged_report import CHECKED, draw
from superlora_tn_paper.first_steps import moved, rate_times
from superlora_tn_paper.rates import at_the_edge, best, best_scored, searched
from superlora_tn_paper.stopping import Stop, calibrated_loss, descend_until
from superlora_tn_paper.store import Data, Elsewhere, Store, alone, write_json
from superlora_tn_paper.task import Batch, Subset, Task

REVISION = 2  # raise it when the training code changes, so that older finished jobs expire
OWN_RATE = ("LoRA", "LoRTA", "projected LoRTA")  # families whose every setting chooses its own rate, and takes more seeds
MORE_LORTA = (4.0, 16.0)  # LoRTA at the counts of LoRA of ranks 4 and 16, to see from which count on it reaches LoRA's accuracy
PAUSE = 5.0  # seconds until it is looked again whether another process has finished its job


@dataclass(frozen=True)
class ConvergedRecipe:
    """Every hyper-parameter of the runs to convergence.

    Attributes:
        images: training images of one seed, drawn by it.
        steps, batch: of each run.
        rates: peak learning rates tried at first, each `factor` times the one before; more follow on the side of the best
            while it is at the edge, `extensions` at most.
        head_rate: peak rate of the head, which starts at its optimum on the frozen model.
        stride: rates are multiplied so that a first step at rate r moves all dW by r * stride * sqrt(elements).
        seeds, more_seeds: of the report, more for the families of `OWN_RATE`.
        choice_seed: of the runs that choose a rate; none of the report's.
        apart: the share of all training images that choose a rate, held apart from all training.
        look: images at once where nothing is trained.
        lines: run the lines alone: dense fine-tuning, every second rank of LoRA, and LoRTA of order 3 without groups.
        sample: of the lines, run the sample (`Converged.checked`) alone.
        longer: how many times the steps the sample (`Converged.checked`) is run with as well, on `seeds` and at the same rate.
        stop: a run ends by itself instead of after `steps`, at a constant rate.
    """

    images: int = 1000
    steps: int = 500
    batch: int = 32
    rates: tuple[float, ...] = (2.5e-3, 1e-2, 4e-2)
    factor: float = 4.0
    extensions: int = 4
    head_rate: float = 1e-3
    stride: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    more_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    choice_seed: int = 100
    apart: float = 0.04
    look: int = 250
    lines: bool = False
    sample: bool = False
    longer: tuple[int, ...] = (2,)
    stop: Stop | None = None


# On few natural images fine-tuning q and v gains little over the head alone (on 5,000 of Tiny ImageNet's 2.5 points, on all 8).
# All of them take longer, so the lines are run alone.
RECIPES = {
    "mnist": ConvergedRecipe(longer=(2, 4, 8)),
    "tinyimagenet30": ConvergedRecipe(images=14_400, steps=1800, lines=True),
}
# In trials on the choice seed dense fine-tuning's plain loss was lowest after 150 steps, 3 points of accuracy before the best;
# the calibrated loss goes on falling as long as the accuracy rises.
STOPPING = {
    "mnist": ConvergedRecipe(rates=(2e-2, 4e-2, 8e-2), factor=2.0, more_seeds=(0, 1, 2), lines=True, sample=True, stop=Stop()),
}
# Of the recipe: each job's own are in its name.
NOT_A_JOBS = ("seeds", "more_seeds", "rates", "factor", "extensions", "lines", "sample", "longer")


@dataclass(frozen=True)
class Converged:
    """What all jobs share.

    Attributes:
        task: model and data.
        recipe: hyper-parameters.
        store: the finished jobs.
        bar: where progress is shown.
        locks: a folder for the locks of the jobs being made.
    """

    task: Task
    recipe: ConvergedRecipe
    store: Store
    bar: Progress
    locks: Path

    @cached_property
    def settings(self) -> list[Setting]:
        """All settings in the order they are worked off: dense, then the lines of LoRA and LoRTA, then all others."""
        every = settings(self.task.shapes, MORE_LORTA)
        if self.recipe.lines:
            ladder = [s for s in every if s.variant == "LoRA"][::2]
            lorta = [s for s in every if s.variant == "LoRTA M=3" and s.groups == 1]
            every = [*(s for s in every if s.variant == "dense"), *ladder, *lorta]
        if self.recipe.sample:
            return _middle(every)
        lines = {variant: place for place, variant in enumerate(CHECKED)}
        return sorted(every, key=lambda s: lines.get(s.variant, 3 if s.family in OWN_RATE else 4))

    @cached_property
    def parts(self) -> tuple[Subset, Subset]:
        """The images that seeds draw from, and those that choose a rate."""
        return self.task.train.cut(self.recipe.apart, self.recipe.choice_seed)

    @cached_property
    def seen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Features (n, width) that the frozen model gives its head, and labels."""
        splits = {"train": self.task.train, "apart": self.parts[1], "test": self.task.test}
        return {name: features(self.task, split, self.recipe.look) for name, split in splits.items()}

    def drawn(self, seed: int) -> Subset:
        """The training images of a seed."""
        pool = self.parts[0].rows
        most = min(self.recipe.images, len(pool))
        return Subset(self.task.train.source, pool[torch.randperm(len(pool), generator=_generator(seed))[:most]])

    @cached_property
    def heads(self) -> dict[int, nn.Linear]:
        """The heads found so far, by seed."""
        return {}

    def head(self, seed: int) -> nn.Linear:
        """The head's optimum on the frozen model for the images of a seed; what it is worth on the test images is a job."""
        if seed not in self.heads:
            rows = self.drawn(seed).rows
            images, labels = self.seen["train"]
            made, decay = converged_head(self.task, (images[rows], labels[rows]), self.seen["apart"])
            self.heads[seed] = made
            self.store.get(f"head_seed_{seed}", lambda: asdict(head_score(made, self.seen["test"])) | {"decay": decay})
        return self.heads[seed]

    def head_score(self, seed: int) -> float:
        """Accuracy of the frozen model with the head of a seed."""
        if not self.store.path(f"head_seed_{seed}").is_file():
            self.head(seed)
        return float(self.store.get(f"head_seed_{seed}", dict)["accuracy"])

    def job(self, setting: Setting, rate: float, seed: int, judged: Subset, prefix: str = "", times: int = 1) -> Data:
        """One run, its result kept.

        Raises:
            Elsewhere: another process is at it.
        """
        name = f"{prefix}{setting.job}_{rate:g}_seed_{seed}" + (f"_x{times}" if times > 1 else "")
        if self.store.path(name).is_file():
            return self.store.get(name, dict)
        if times > 1 and self.recipe.stop is not None:  # one run goes on to both
            found: Data = self.job(setting, rate, seed, judged)["longer"][str(times)]
            return found
        kept = None if prefix or times > 1 else self.store.path(name, "adapter")
        with alone(self.locks / f"{name}.lock"):
            return self.store.get(name, lambda: self._run(setting, rate, seed, judged, times, kept))

    def kept(self, setting: Setting, rate: float, seed: int) -> Path:
        """The adapter of a run of the report; it is trained again where its result is kept without it.

        Raises:
            Elsewhere: another process is at it.
        """
        self.job(setting, rate, seed, self.task.test)
        name = f"{setting.job}_{rate:g}_seed_{seed}"
        path = self.store.path(name, "adapter")
        if not path.exists():
            with alone(self.locks / f"{name}.lock"):
                self._run(setting, rate, seed, self.task.test, 1, path)
        return path

    def _run(self, setting: Setting, rate: float, seed: int, judged: Subset, times: int, kept: Path | None) -> Data:
        recipe, task = self.recipe, self.task
        head, train = self.head(seed), self.drawn(seed)
        show = on_step(self.bar, f"{setting.variant} {setting.words}, rate {rate:g}, seed {seed}")
        with adapted(task, setting.spec, seed) as tuned:
            own = task.model.get_submodule(task.head)
            own.load_state_dict(head.state_dict())
            first = next(train.drawn(1, recipe.batch, seed))
            faster = rate_times(task, tuned, first, recipe.stride)
            groups = [(list(own.parameters()), recipe.head_rate), (list(tuned.parameters()), faster * rate)]

            def result() -> Data:
                return asdict(score(task, judged, recipe.look)) | {"moved": moved(tuned)}

            if recipe.stop is None:
                steps = times * recipe.steps
                trained, seconds = descend(task, groups, _epochs(train, steps, recipe.batch, seed), steps, show)
                found = result() | {"train_loss": trained, "step_seconds": round(seconds, 5)}
            else:
                further = recipe.longer if kept is not None and seed in recipe.seeds and setting in self.checked() else ()
                batches = _epochs(train, recipe.stop.most * max((1, *further)), recipe.batch, seed)
                ends = descend_until(task, groups, batches, recipe.stop, self._loss_apart, show, further)
                results = [one.put_back(groups, result) for one in reversed(ends)][::-1]  # the first of them is what is kept
                found = results[0] | {"longer": dict(zip(map(str, further), results[1:], strict=True))}
            if kept is not None:
                tuned.save(kept)
        return found | {"rate_times": faster}

    def _loss_apart(self) -> float:
        """The calibrated loss of the model as it is on the images held apart."""
        return calibrated_loss(answers(self.task, self.parts[1], self.recipe.look), self.parts[1].labels)

    def best(self, tried: Mapping[str, Mapping[str, float]]) -> float:
        """The rate that is chosen of those tried."""
        if self.recipe.stop is not None:
            return best({rate: one["loss"] for rate, one in tried.items()})
        return best_scored(tried, len(self.parts[1].rows))

    def rates(self, setting: Setting) -> dict[str, dict[str, float]]:
        """Rate -> accuracy and loss on the images held apart, the grid extended while the best is at its edge."""
        recipe, apart = self.recipe, self.parts[1]

        def score(rate: float) -> dict[str, float]:
            job = self.job(setting, rate, recipe.choice_seed, apart, "choose_")
            loss = job["loss" if recipe.stop is None else "loss_apart"]
            return {"accuracy": float(job["accuracy"]), "loss": float(loss)}

        return searched(recipe.rates, recipe.factor, recipe.extensions, score, self.best)

    def chooser(self, setting: Setting) -> Setting:
        """The setting whose rate a setting takes: its own for the lines, else its family's of median count."""
        if setting.family in OWN_RATE:
            return setting
        own = sorted((s for s in self.settings if s.family == setting.family), key=lambda s: s.parameters)
        return own[(len(own) - 1) // 2]

    def checked(self) -> list[Setting]:
        """The sample that is run with twice the steps and more: dense, and the median of the lines of LoRA and LoRTA."""
        return _middle(self.settings)

    def row(self, setting: Setting, whole: bool = True) -> Data:
        """All that is needed of one setting; not `whole`: on the first seeds alone, and not with more steps.

        Raises:
            Elsewhere: another process is at a part of it.
        """
        recipe = self.recipe
        tried = self.rates(self.chooser(setting))
        rate = self.best(tried)
        seeds = recipe.more_seeds if whole and setting.family in OWN_RATE else recipe.seeds
        runs = [self.job(setting, rate, seed, self.task.test) for seed in seeds]
        further = {
            str(times): [self.job(setting, rate, seed, self.task.test, times=times) for seed in recipe.seeds]
            for times in (recipe.longer if setting in self.checked() and (whole or recipe.stop is not None) else ())
        }
        return {
            **_about(setting),
            "tried": tried,
            "rate": rate,
            "edge": at_the_edge(rate, map(float, tried)),
            "seeds": list(seeds),
            "accuracies": [one["accuracy"] for one in runs],
            "losses": [one["loss"] for one in runs],
            "train_losses": [one["train_loss"] for one in runs],
            "rate_times": [one["rate_times"] for one in runs],
            "heads": [self.head_score(seed) for seed in seeds],
            "longer": {times: [one["accuracy"] for one in every] for times, every in further.items()},
            "step_seconds": statistics.median(one["step_seconds"] for one in runs),
            **(_stops(runs, further) if recipe.stop is not None else {}),
        }


def _middle(every: Sequence[Setting]) -> list[Setting]:
    found = []
    for variant in CHECKED:
        own = sorted((s for s in every if s.variant == variant), key=lambda s: s.parameters)
        found += own[(len(own) - 1) // 2 :][:1]
    return found


def _about(setting: Setting) -> Data:
    return {
        "variant": setting.variant,
        "words": setting.words,
        "order": setting.order,
        "groups": setting.groups,
        "projection": map_words(setting),
        "parameters": setting.parameters,
    }


def _stops(runs: Sequence[Data], further: Mapping[str, Sequence[Data]]) -> Data:
    best_later = {times: [one["best"] for one in every] for times, every in further.items()}
    return {name: [one[name] for one in runs] for name in ("best", "steps")} | {"best_later": best_later}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _epochs(split: Subset, steps: int, batch: int, seed: int) -> Iterator[Batch]:
    """`steps` batches, every image once an epoch as far as whole batches go, in an order that the seed fixes."""
    generator, own = _generator(seed), split.rows
    size = min(batch, len(own))
    each = len(own) // size
    plan: list[Tensor] = []
    while len(plan) < steps:
        plan += torch.split(own[torch.randperm(len(own), generator=generator)][: each * size], size)
    return split.source.batches(plan[:steps])


@contextmanager
def opened(out: Path, recipe: ConvergedRecipe, make: Callable[[Progress], Task], console: Console) -> Iterator[Converged]:
    """The experiment on a task, with progress shown meanwhile."""
    with progress(console) as bar:
        task = make(bar)
        facts = {k: v for k, v in asdict(recipe).items() if k not in NOT_A_JOBS and v is not None}
        facts |= {"task": task.words, "model": task.identity, "device": task.device, "revision": REVISION, "scale": "converged"}
        store, locks = Store(out / "classification_jobs", facts), out / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        yield Converged(task, recipe, store, bar, locks)


def run(out: Path, recipe: ConvergedRecipe, make: Callable[[Progress], Task], console: Console, pause: float = PAUSE) -> Data:
    """Work off all settings on the first seeds, then on more and with more steps.

    ``classification.json`` is written after each, with the finished ones alone.

    Args:
        out: the folder for all that is written; other processes may work into it at the same time.
        recipe: hyper-parameters.
        make: gives the task.
        console: for progress.
        pause: seconds to wait where only jobs of other processes are left.

    Returns:
        What ``classification.json`` holds.
    """
    with opened(out, recipe, make, console) as experiment:
        rows: dict[str, Data] = {}
        for whole in (False, True):
            left = experiment.settings
            while left:
                before = left
                for setting in before:
                    try:
                        rows[setting.job] = row = experiment.row(setting, whole)
                    except Elsewhere:
                        continue
                    left = [one for one in left if one is not setting]
                    seeds, mean = len(row["seeds"]), statistics.fmean(row["accuracies"])
                    console.print(f"{setting.variant} {setting.words}: {mean:.1%} ({seeds} seeds)")
                    result = _result(experiment, rows)
                    write_json(out / "classification.json", result)
                    if len(rows) > 1:
                        draw(result, out / PARETO)
                if left == before:
                    if not whole:
                        break  # the others' jobs are waited for at the end
                    time.sleep(pause)
    return result


def _result(experiment: Converged, rows: dict[str, Data]) -> Data:
    task, ordered = experiment.task, experiment.settings
    return {
        "experiment": "classification",
        "scale": "converged",
        "machine": machine(task.device),
        "task": task.words,
        "recipe": asdict(experiment.recipe),
        "images": {"train": len(task.train.rows), "apart": len(experiment.parts[1].rows), "test": len(task.test.rows)},
        "classes": task.classes,
        "weights": len(task.shapes),
        "elements": sum(o * i for o, i in task.shapes.values()),
        "unfinished": [_about(s) for s in ordered if s.job not in rows],
        "rows": [rows[s.job] for s in ordered if s.job in rows],
    }
