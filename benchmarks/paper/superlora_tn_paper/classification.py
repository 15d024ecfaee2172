"""The paper's image classification: q and v of a pre-trained ViT adapted by every variant, accuracy against parameters.

Chen et al., arXiv 2403.11887. A new head is trained along in every run, with the same first values for every variant.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from superlora_tn import Fastfood, Shuffle
from superlora_tn.demo.progress import on_step, progress
from superlora_tn.tools.measure import machine
from superlora_tn_paper.classification_report import PARETO, draw_classification
from superlora_tn_paper.classification_settings import Setting, settings
from superlora_tn_paper.classification_training import Recipe, adapted, converged_head, descend, features, head_score, score
from superlora_tn_paper.rates import best
from superlora_tn_paper.store import Data, Store, write_json
from superlora_tn_paper.task import Memory, Subset, Task

REVISION = 2  # raise it when the training code changes, so that older finished jobs expire
NOT_A_JOBS = ("seeds", "rates", "dense_share", "head_rates")  # of the recipe: each job's own are in its name


@dataclass(frozen=True)
class Experiment:
    """What all jobs share.

    Attributes:
        task: model and data.
        recipe: hyper-parameters.
        store: the finished jobs.
        bar: where progress is shown.
    """

    task: Task
    recipe: Recipe
    store: Store
    bar: Progress

    @cached_property
    def settings(self) -> list[Setting]:
        """All settings, for this model's q and v."""
        return settings(self.task.shapes)

    @cached_property
    def parts(self) -> tuple[Subset, Subset]:
        """The training images in two: what the choice of a rate trains on, and what decides it."""
        return self.task.train.cut(self.recipe.apart, self.recipe.choice_seed)

    @cached_property
    def seen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Features (n, width) that the frozen model gives its head, and labels, of all images."""
        splits = {"train": self.task.train, "apart": self.parts[1], "test": self.task.test}
        show, found = on_step(self.bar, "features of the frozen model"), {}
        for k, (name, split) in enumerate(splits.items(), 1):
            found[name] = features(self.task, split, self.recipe.look)
            show(k, len(splits), 0.0)
        return found

    def head_only(self, name: str, rate: float, seed: int, split: Subset, judged: str) -> Data:
        """The head alone on the frozen model: as many steps as any run, on the same images, from the same first values."""

        def make() -> Data:
            source = Memory(*self.seen["train"])
            head = self.task.new_head(seed).cpu()
            frozen = replace(self.task, model=head, device="cpu")
            batches = Subset(source, split.rows).drawn(self.recipe.steps, self.recipe.batch, seed)
            descend(frozen, [(head.parameters(), rate)], batches, self.recipe.steps, lambda *_: None)
            return asdict(head_score(head, self.seen[judged]))

        return self.store.get(name, make)

    def converged(self) -> Data:
        """The head alone on the frozen model, trained until it gets no better."""

        def make() -> Data:
            train = tuple(tensor[self.parts[0].rows] for tensor in self.seen["train"])
            head, decay = converged_head(self.task, (train[0], train[1]), self.seen["apart"])
            return asdict(head_score(head, self.seen["test"])) | {"decay": decay}

        return self.store.get("head_converged", make)

    def head_rate(self) -> dict[str, float]:
        """Head rate -> loss of the head alone on the images held apart."""
        seed, rates = self.recipe.choice_seed, self.recipe.head_rates
        return {f"{r:g}": self.head_only(f"choose_head_{r:g}", r, seed, self.parts[0], "apart")["loss"] for r in rates}

    def chooser(self, family: str) -> Setting:
        """The setting that chooses its family's rate: of the median count."""
        own = sorted((s for s in self.settings if s.family == family), key=lambda s: s.parameters)
        return own[(len(own) - 1) // 2]

    def rates(self, family: str, head: float) -> dict[str, float]:
        """Rate -> loss of the family's chooser on the images held apart."""
        setting, seed = self.chooser(family), self.recipe.choice_seed
        share = self.recipe.dense_share if family == "dense" else 1.0
        rates = [share * rate for rate in self.recipe.rates]
        return {f"{rate:g}": self._tried(setting, rate, head, seed)["loss"] for rate in rates}

    def _tried(self, setting: Setting, rate: float, head: float, seed: int) -> Data:
        name = f"choose_{setting.job}_{rate:g}_{head:g}"
        return self.store.get(name, lambda: self._run(setting, rate, head, seed, *self.parts))

    def run(self, setting: Setting, rate: float, head: float, seed: int) -> Data:
        """One setting with one seed, tested; the adapter is kept beside the result, in `kept`."""
        name = self.name(setting, rate, head, seed)
        kept = self.store.path(name, "adapter")
        return self.store.get(name, lambda: self._run(setting, rate, head, seed, self.task.train, self.task.test, kept))

    def name(self, setting: Setting, rate: float, head: float, seed: int) -> str:
        """A run's file name."""
        return f"{setting.job}_{rate:g}_{head:g}_seed_{seed}"

    def _run(
        self, setting: Setting, rate: float, head: float, seed: int, train: Subset, judged: Subset, kept: Path | None = None
    ) -> Data:
        recipe, task = self.recipe, self.task
        show = on_step(self.bar, f"{setting.variant} {setting.words}, rate {rate:g}, seed {seed}")
        with adapted(task, setting.spec, seed) as tuned:
            groups = [(task.model.get_submodule(task.head).parameters(), head), (tuned.parameters(), rate)]
            trained, seconds = descend(task, groups, train.drawn(recipe.steps, recipe.batch, seed), recipe.steps, show)
            found = score(task, judged, recipe.look)
            if kept is not None:
                tuned.save(kept)
        return asdict(found) | {"train_loss": trained, "step_seconds": round(seconds, 5)}


@contextmanager
def opened(out: Path, recipe: Recipe, make: Callable[[Progress], Task], console: Console) -> Iterator[Experiment]:
    """The experiment on a task, with progress shown meanwhile."""
    with progress(console) as bar:
        task = make(bar)
        facts = {k: v for k, v in asdict(recipe).items() if k not in NOT_A_JOBS}
        facts |= {"task": task.words, "model": task.identity, "device": task.device, "revision": REVISION}
        yield Experiment(task, recipe, Store(out / "classification_jobs", facts), bar)


def run(out: Path, scale: str, recipe: Recipe, make: Callable[[Progress], Task], console: Console) -> Data:
    """The whole experiment; what an earlier run into the same folder finished is taken up.

    Args:
        out: the folder for all that is written: ``classification.json``, its picture, and the finished jobs.
        scale: its name in the result.
        recipe: hyper-parameters.
        make: gives the task.
        console: for progress.

    Returns:
        What ``classification.json`` holds.
    """
    with opened(out, recipe, make, console) as experiment:
        task = experiment.task
        tried, head, rates = choose_rates(experiment, {s.family: None for s in experiment.settings})
        same = [experiment.head_only(f"head_{head:g}_seed_{s}", head, s, task.train, "test")["accuracy"] for s in recipe.seeds]
        limit = experiment.converged()["accuracy"]
        console.print(f"head alone: {statistics.fmean(same):.1%} after as many steps, {limit:.1%} to convergence")
        rows = [_row(experiment, setting, rates[setting.family], head, console) for setting in experiment.settings]
    last = task.model.get_submodule(task.head)
    result: Data = {
        "experiment": "classification",
        "scale": scale,
        "machine": machine(task.device),
        "task": task.words,
        "recipe": asdict(recipe),
        "images": {"train": len(task.train.rows), "apart": len(experiment.parts[1].rows), "test": len(task.test.rows)},
        "classes": task.classes,
        "weights": len(task.shapes),
        "elements": sum(o * i for o, i in task.shapes.values()),
        "head_parameters": sum(p.numel() for p in last.parameters()),
        "tried": tried,
        "head_only": same,
        "head_converged": limit,
        "rows": rows,
    }
    write_json(out / "classification.json", result)
    draw_classification(result, out / PARETO)
    return result


def choose_rates(experiment: Experiment, families: Mapping[str, None]) -> tuple[Data, float, dict[str, float]]:
    """What each rate gave, by family and for the head; the head's rate, and each family's."""
    heads = experiment.head_rate()
    head = best(heads)
    row = experiment.bar.add_task("choosing learning rates", total=len(families))
    tried = {}
    for family in families:
        tried[family] = experiment.rates(family, head)
        experiment.bar.console.print(f"learning rate of {family}: {best(tried[family]):g}")
        experiment.bar.advance(row)
    experiment.bar.remove_task(row)
    return {"head": heads, **tried}, head, {family: best(found) for family, found in tried.items()}


def _row(experiment: Experiment, setting: Setting, rate: float, head: float, console: Console) -> Data:
    seeds = experiment.recipe.seeds
    total = experiment.bar.add_task(f"{setting.variant} {setting.words}, seeds", total=len(seeds))
    found = []
    for seed in seeds:
        found.append(experiment.run(setting, rate, head, seed))
        experiment.bar.advance(total)
    experiment.bar.remove_task(total)
    accuracies = [one["accuracy"] for one in found]
    console.print(f"{setting.variant} {setting.words}: {setting.parameters:,} parameters, {statistics.fmean(accuracies):.1%}")
    return {
        "variant": setting.variant,
        "words": setting.words,
        "order": setting.order,
        "groups": setting.groups,
        "projection": map_words(setting),
        "parameters": setting.parameters,
        "rate": rate,
        "accuracies": accuracies,
        "losses": [one["loss"] for one in found],
        "train_losses": [one["train_loss"] for one in found],
        "step_seconds": statistics.median(one["step_seconds"] for one in found),
        "seconds": sum(one["seconds"] for one in found),
    }


def map_words(setting: Setting) -> str:
    """The fixed map in a word or two; empty without one."""
    projection = setting.projection
    if isinstance(projection, Fastfood):
        return f"rho={projection.ratio:g}" + " tanh" * projection.tanh
    return "shuffle" if isinstance(projection, Shuffle) else ""
