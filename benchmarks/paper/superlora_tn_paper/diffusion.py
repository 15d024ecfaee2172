"""The paper's image generation: a diffusion model of house numbers, its q and v adapted to handwriting by each variant.

Chen et al., arXiv 2403.11887: SVHN to MNIST at four levels of trainable parameters.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from superlora_tn import AdapterSpec, SpecError, attach, dense
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import reference_rank
from superlora_tn.demo.digits import Split
from superlora_tn.demo.progress import on_step, progress
from superlora_tn.demo.whole_file import whole_file
from superlora_tn.tools.measure import machine
from superlora_tn_paper import domains
from superlora_tn_paper.denoising import Schedule, Training, held_out_loss, sample, train
from superlora_tn_paper.diffusion_report import SAMPLES, SCORES, SHOWN, draw_samples, draw_scores
from superlora_tn_paper.diffusion_settings import Setting, settings
from superlora_tn_paper.domains import Domain
from superlora_tn_paper.judge import (
    FEATURES,
    Classifier,
    frechet,
    frechet_spread,
    look,
    moments,
    new_classifier,
    train_classifier,
)
from superlora_tn_paper.rates import best
from superlora_tn_paper.store import Data, Store, packed, unpacked, write_json
from superlora_tn_paper.unet import TARGETS, UNet, UNetShape, attention_shapes, build

SPLITS: tuple[Split, Split] = ("train", "test")
REVISION = 2  # raise it when the training code changes, so that older finished jobs expire


FULL_BASE = Training(steps=100_000, batch=128, lr=2e-4, decay=0.9999, every=2000)
FULL_ADAPT = Training(steps=20_000, batch=128, lr=0.0, decay=0.999, every=2000)  # the rate is chosen setting by setting


@dataclass(frozen=True)
class Recipe:
    """Every setting of the experiment; the defaults are the full scale's.

    Args:
        unet, schedule: the model.
        home: the source domain.
        close: the target's writing fills the images, see `domains`.
        drawn: images of the source domain, where SVHN is not there in full.
        base: pre-training.
        adapt: one adaptation; its learning rate is that of `rates` with the least loss on images kept apart,
            after `tried` steps.
        held: images kept apart to choose rates by, and as many of the target's test images for the reported loss.
        generated: images drawn and scored for each setting.
        asked: how often the net is asked on the way to an image.
        batch: images at once where nothing is trained.
        judge_steps: of the scoring classifier's training.
        seed: of everything.
    """

    unet: UNetShape = field(default_factory=UNetShape)
    schedule: Schedule = field(default_factory=Schedule)
    home: Literal["house numbers", "printed digits"] = "house numbers"
    close: bool = False
    drawn: int = 60_000
    base: Training = FULL_BASE
    adapt: Training = FULL_ADAPT
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tried: int = 1000
    held: int = 2048
    generated: int = 10_000
    asked: int = 100
    batch: int = 500
    judge_steps: int = 3000
    seed: int = 0


RECIPES = {
    "full": Recipe(),
    # The paper's U-Net at half its width, on grey 16x16 images that it sees as 8x8 points of 2x2 pixels.  Its last level
    # keeps the edge of the level above, for on a single point attention has nothing to choose from.
    "small": Recipe(
        unet=UNetShape(size=16, colours=1, patch=2, channels=32, halvings=2),
        schedule=Schedule("cosine"),
        drawn=20_000,
        base=Training(steps=5000, batch=32, lr=1e-3, decay=0.998, every=500),
        adapt=Training(steps=500, batch=32, lr=0.0, decay=0.98),
        rates=(3e-3, 1e-2, 3e-2),
        tried=60,
        held=256,
        generated=500,
        asked=20,
        judge_steps=400,
    ),
}


@dataclass(frozen=True)
class Experiment:
    """What all settings share: the frozen model, the target's images (uint8), and who judges."""

    recipe: Recipe
    store: Store
    model: UNet
    judge: Classifier
    train: Tensor
    apart: Tensor
    test: Tensor
    reference: tuple[Tensor, Tensor]
    bar: Progress

    def with_seed(self, seed: int) -> Experiment:
        """The same model and judge, with another seed for all that is drawn."""
        return replace(self, recipe=replace(self.recipe, seed=seed))

    def held_out(self, images: Tensor) -> float:
        """The loss of the model as it is, on fixed noise."""
        return held_out_loss(self.model, images, self.recipe.schedule, self.recipe.seed + 1, self.recipe.batch)

    def scored(self, images: Tensor) -> Data:
        """The first images, the distance of all to the target's training images, and the judge's confidence."""
        seen = look(self.judge, images)
        return {
            "frechet": frechet(moments(seen.features), self.reference),
            "spread": frechet_spread(seen.features, self.reference, self.recipe.seed),
            "confidence": seen.confidence,
            "shown": packed(images[:SHOWN]),
        }

    def generated(self) -> Data:
        """Draw images from the model as it is, and score it."""
        recipe = self.recipe
        images = sample(self.model, recipe.generated, recipe.schedule, recipe.asked, recipe.seed + 2, recipe.batch)
        return {"loss": self.held_out(self.test[: recipe.held]), **self.scored(images)}


def run(out: Path, scale: Literal["small", "full"], data: Path | None, device: str, console: Console) -> Data:
    """The whole experiment; what an earlier run into the same folder finished is taken up.

    Args:
        out: the folder for everything that is written: ``diffusion.json``, two pictures, and the finished jobs.
        scale: "small" takes about half an hour on one core, "full" is the paper's size, for a GPU.
        data: the folder with SVHN and MNIST, see `domains`; None uses what the `demo` extra brings.
        device: "cpu" or "cuda".
        console: for progress.

    Returns:
        What ``diffusion.json`` holds; `diffusion_report.report` puts it in words.
    """
    if scale not in RECIPES:
        raise ValueError(f"there is no scale {scale!r}; choose one of {', '.join(RECIPES)}.")
    return run_recipe(out, scale, RECIPES[scale], data, device, console)


def run_recipe(out: Path, scale: str, recipe: Recipe, data: Path | None, device: str, console: Console) -> Data:
    """`run` with any recipe; `scale` is its name in the result."""
    with progress(console) as bar:
        found, experiment = prepare(recipe, out, {}, data, device, bar)
        console.print(said(found))
        rows = _rows(experiment, console)
    result: Data = {"experiment": "diffusion", "scale": scale, "machine": machine(device), **found, "rows": rows}
    write(out, result)
    return result


def write(out: Path, result: Data) -> None:
    """Write ``diffusion.json`` and both pictures; takes the images out of the rows."""
    images = {row["job"]: unpacked(row.pop("shown")) for row in result["rows"] if "shown" in row}
    write_json(out / "diffusion.json", result)
    draw_samples(result, images, out / SAMPLES)
    draw_scores(result, out / SCORES)


def prepare(recipe: Recipe, out: Path, more: Data, data: Path | None, device: str, bar: Progress) -> tuple[Data, Experiment]:
    """Domains, pre-trained model and judge: what the result says of them, and what all settings share.

    Args:
        recipe: every setting.
        out: the folder for the finished jobs.
        more: facts beside the recipe that the jobs depend on; a name with None as its value takes that one out.
        data: see `domains`.
        device: "cpu" or "cuda".
        bar: for progress.
    """
    unet = recipe.unet
    drawn = (recipe.drawn, unet.size, recipe.seed)
    if recipe.home == "printed digits":
        home = domains.printed(*drawn, unet.colours)
    else:
        home = domains.home(*drawn, data, unet.colours)
    abroad, test = (domains.abroad(split, unet.size, data, unet.colours, recipe.close) for split in SPLITS)
    facts = asdict(recipe) | {"source": home.words, "target": abroad.words, "device": device, "revision": REVISION}
    depends = {name: value for name, value in (facts | more).items() if value is not None}
    store = Store(out / "diffusion_jobs", depends)
    base, model = _base(recipe, store, home, device, bar)
    judged, judge = _judge(recipe, store, abroad, test, device)
    train_images, apart = abroad.images[: -recipe.held], abroad.images[-recipe.held :]
    reference = moments(look(judge, train_images).features)
    shapes = attention_shapes(model)
    found: Data = {
        "recipe": facts,
        "weights": len(shapes),
        "elements": sum(o * i for o, i in shapes.values()),
        "base": base,
        "judge": judged,
    }
    return found, Experiment(recipe, store, model, judge, train_images, apart, test.images, reference, bar)


def said(found: Data) -> str:
    """What was prepared, in a line."""
    known = f"the judge knows {found['judge']['accuracy']:.1%} of the test digits"
    return f"pre-trained to a loss of {found['base']['loss']:.4f}; {known}"


def _base(recipe: Recipe, store: Store, home: Domain, device: str, bar: Progress) -> tuple[Data, UNet]:
    """The model, pre-trained on the source domain: from its last checkpoint on, or read where it is finished."""
    model = build(recipe.unet, recipe.seed, device)
    kept = store.path("base", "safetensors")

    def make() -> Data:
        show = on_step(bar, "pre-training")
        losses = train(model, home.images, recipe.schedule, recipe.base, recipe.seed, store.path("base", "pt"), show)
        _write(kept, model.state_dict())
        parameters = sum(p.numel() for p in model.parameters())
        return {"parameters": parameters, "loss": _last(losses)}

    found = store.get("base", make)
    if not kept.is_file():  # results may be kept without the weights
        make()
    model.load_state_dict(_read(kept))
    return found, model.eval()


def _judge(recipe: Recipe, store: Store, abroad: Domain, test: Domain, device: str) -> tuple[Data, Classifier]:
    """The classifier of the target's digits, and how many of its test images it knows."""
    model = new_classifier(recipe.unet.colours, recipe.seed, device)
    kept = store.path("judge", "safetensors")

    def make() -> Data:
        images, labels = abroad.images[: -recipe.held], abroad.labels[: -recipe.held]
        train_classifier(model, images, labels, recipe.judge_steps, recipe.seed)
        _write(kept, model.state_dict())
        guesses = look(model, test.images).probabilities.argmax(1)
        return {"accuracy": float((guesses == test.labels).double().mean()), "features": FEATURES}

    found = store.get("judge", make)
    if not kept.is_file():
        make()
    model.load_state_dict(_read(kept))
    return found, model.eval()


def _rows(experiment: Experiment, console: Console) -> list[Data]:
    """Real images, the model as it is, dense fine-tuning, then every setting that its level's budget allows."""
    shapes = attention_shapes(experiment.model)
    real = experiment.test[: experiment.recipe.generated]
    rows: list[Data] = [
        {"job": "real", "variant": "real test images", **experiment.store.get("real", lambda: experiment.scored(real))},
        {"job": "none", "variant": "no adaptation", **experiment.store.get("none", experiment.generated)},
        _adapted(experiment, "dense", dense(), shapes, {"variant": "dense fine-tuning", "setting": "", "structure": ""}),
    ]
    for row in rows:
        console.print(_line(row))
    for setting in settings():
        rows.append(_row(experiment, setting, shapes))
        console.print(_line(rows[-1]))
    return rows


def _row(experiment: Experiment, setting: Setting, shapes: Mapping[str, Shape]) -> Data:
    """One setting's result, or why it has none."""
    about: Data = {"level": setting.level, "variant": setting.variant, "structure": setting.structure}
    try:
        choice = setting.choose(shapes)
    except SpecError as error:
        return {"job": setting.job, **about, "skipped": str(error)}
    about["budget"] = choice.budget
    about["setting"] = f"{setting.structure} r={reference_rank(choice.spec.network)}".strip()
    return _adapted(experiment, setting.job, choice.spec, shapes, about)


def _adapted(
    experiment: Experiment, job: str, spec: AdapterSpec, shapes: Mapping[str, Shape], about: Mapping[str, object]
) -> Data:
    """One adaptation: choose the learning rate, train, generate, and take the adapter off again."""
    about = {"job": job, **about, "parameters": spec.count(shapes)}
    return {
        **about,
        **experiment.store.get(job, lambda: _adapt(experiment, job, spec, f"{about['variant']} {about['setting']}")),
    }


def _adapt(experiment: Experiment, job: str, spec: AdapterSpec, words: str) -> Data:
    tried = {f"{rate:g}": tried_loss(experiment, spec, rate, words) for rate in experiment.recipe.rates}
    rate = best(tried)
    return {"rate": rate, "tried": tried, **adapted(experiment, job, spec, rate, words)}


def tried_loss(experiment: Experiment, spec: AdapterSpec, rate: float, words: str) -> float:
    """The loss on the images kept apart after the few steps that choose a rate."""
    with _attached(experiment, spec):
        _train(experiment, replace(experiment.recipe.adapt, steps=experiment.recipe.tried, lr=rate), f"{words}, rate {rate:g}")
        return experiment.held_out(experiment.apart)


def adapted(experiment: Experiment, job: str, spec: AdapterSpec, rate: float, words: str) -> Data:
    """One adaptation at a rate, from its last checkpoint on: its losses, and the score of what it generates."""
    with _attached(experiment, spec):
        training = replace(experiment.recipe.adapt, lr=rate)
        losses = _train(experiment, training, words, experiment.store.path(job, "pt"))
        return {"train_loss": _last(losses), **experiment.generated()}


@contextmanager
def _attached(experiment: Experiment, spec: AdapterSpec) -> Iterator[None]:
    """The model with an adapter on q and v; afterwards it is bit for bit as before."""
    tuned = attach(experiment.model, spec, TARGETS, seed=experiment.recipe.seed)
    try:
        yield
    finally:
        tuned.detach()


def _train(experiment: Experiment, training: Training, words: str, checkpoint: Path | None = None) -> list[float]:
    """Every setting sees the same images, times and noise."""
    show = on_step(experiment.bar, words)
    return train(
        experiment.model, experiment.train, experiment.recipe.schedule, training, experiment.recipe.seed + 3, checkpoint, show
    )


def _last(losses: Sequence[float]) -> float:
    """Mean loss of the last tenth of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def _line(row: Data) -> str:
    words = f"{row.get('level', '')} {row['variant']} {row.get('setting', row.get('structure', ''))}".strip()
    if "skipped" in row:
        return f"{words}: skipped, {row['skipped']}"
    count = f"{row['parameters']:,} parameters, " if "parameters" in row else ""
    return f"{words}: {count}distance {row['frechet']:.2f}, confidence {row['confidence']:.3f}"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors whole or not at all."""
    with whole_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def _read(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(path)
    return found
