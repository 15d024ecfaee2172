"""Fine-tuning of diffusion models: pictures and what they show, the loss of a noised batch, and samples of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from superlora_tn.declare.checks import near
from superlora_tn.finetune.config import Config
from superlora_tn.finetune.data import Row, in_order, opened, read_rows
from superlora_tn.finetune.denoiser import Denoiser, load
from superlora_tn.finetune.job import Job, adapted
from superlora_tn.finetune.named import ConfigError
from superlora_tn.tools import draw
from superlora_tn.trainers import AdapterTrainer

SAMPLES = "samples.png"
HELD = "held"
TOGETHER = 8  # captions or pictures that are encoded at once


class Pictures(Dataset[dict[str, Any]]):
    """Rows as the denoiser learns from them: images in [-1, 1] or latents' means and deviations, and what it is told.

    Attributes:
        rows: with ``image``, a path or a picture.
        size: the side in pixels; a picture is cut to its middle square.
        latents: mean and deviation a row; empty where images themselves are denoised.
        told: of each row.
    """

    def __init__(self, rows: Sequence[Row], size: int, channels: int) -> None:
        self.rows, self.size, self.grey = rows, size, channels == 1
        self.latents: list[tuple[Tensor, Tensor]] = []
        self.told: list[dict[str, Any]] = [{} for _ in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, k: int) -> Tensor:
        """One image, (channels, size, size) in [-1, 1]."""
        from PIL import ImageOps

        fitted = ImageOps.fit(opened(self.rows[k]["image"], "L" if self.grey else "RGB"), (self.size, self.size))
        values = torch.from_numpy(np.array(fitted, dtype=np.float32)) / 127.5 - 1
        return values[None] if self.grey else values.permute(2, 0, 1).contiguous()

    def __getitem__(self, k: int) -> dict[str, Any]:
        clean = dict(zip(("mean", "deviation"), self.latents[k], strict=True)) if self.latents else {"mean": self.pixels(k)}
        return {"row": k, **clean, "told": self.told[k]}


class DenoisingTrainer(AdapterTrainer):
    """The Trainer of a denoiser.

    What is drawn for a row depends on the seed, the step and the row alone: on no number of processes, and not on what was
    drawn before. An evaluation always draws the same.
    """

    denoiser: Denoiser
    drawn: int
    loss_is_scaled_for_ga = False  # the mean over the rows of a batch

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean squared error of what the scheduler says the model predicts."""
        when: int | str = self.state.global_step if model.training else HELD
        count = int(self.denoiser.training.config.num_train_timesteps)
        clean = inputs["mean"]
        drawn = [draws(self.drawn, when, int(row), clean.shape[1:], count) for row in inputs["row"]]
        moments, noise, other = (torch.stack(own).to(clean.device) for own in zip(*drawn, strict=True))
        if "deviation" in inputs:
            clean = clean + inputs["deviation"] * other
        noisy, times, target = self.denoiser.noised(clean, noise, moments)
        loss = F.mse_loss(self.denoiser.predict(model, noisy, times, inputs["told"]).float(), target.float())
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss of a batch that is held apart."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def draws(seed: int, when: int | str, row: int, shape: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A moment below `count`, the noise of an image, and of its latents, for one row at one step."""
    mixed = hashlib.blake2b(f"{seed} {when} {row}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
    moment = torch.randint(count, (), generator=generator)
    return moment, torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


@dataclass(frozen=True)
class DiffusionJob(Job):
    """What a run of a diffusion model trains."""

    config: Config
    denoiser: Denoiser

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch."""
        return dict(default_collate(list(rows)))

    def trainer(self, *args: Any, **options: Any) -> Any:
        """The Trainer of this job."""
        made = DenoisingTrainer(*args, **options)
        made.denoiser, made.drawn, made.model_accepts_loss_kwargs = self.denoiser, self.config.seed, False
        return made

    def write(self, place: Path) -> None:
        """Write the pipeline, or model and scheduler."""
        self.denoiser.write(place)

    @property
    def prefix(self) -> str | None:
        """Of diffusers' names: the denoiser's part of the pipeline."""
        return self.denoiser.part

    def results(self, out: Path) -> dict[str, Any]:
        """Samples as a picture: what was learnt from, and from the same noise the base's and the adapted model's."""
        config, own = self.config, self.held if len(self.held) else self.train
        count = min(config.samples, len(own))
        if not count:
            return {}
        device = next(self.model.parameters()).device
        self._move(device)
        told = _moved(default_collate([own.told[k] for k in range(count)]), device)
        first = own[0]["mean"]
        start = torch.stack([draws(config.seed, "sample", k, first.shape, 1)[1] for k in range(count)]).to(device)
        trained = self.model.training
        self.model.eval()
        with torch.no_grad():
            untold = self.denoiser.untold(count, own.size, device)
            known = (start, told, _moved(untold, device), config.guidance, config.sample_steps, config.seed)
            with self.tuned.disabled():
                base = self.denoiser.sample(*known)
            with self.tuned.fixed():
                found = self.denoiser.sample(*known)
        self.model.train(trained)
        data = torch.stack([own.pixels(k) for k in range(count)]) / 2 + 0.5
        words = [str(own.rows[k].get("text", own.rows[k].get("label", ""))) for k in range(count)]
        return {"samples": str(grid({"data": data, "base": base, "adapted": found}, words, out / SAMPLES))}

    def _move(self, device: torch.device | str) -> None:
        if self.denoiser.pipeline is not None:
            self.denoiser.pipeline.to(device)


def _moved(told: Any, device: torch.device) -> Any:
    """Tensors of nested mappings on a device."""
    if isinstance(told, Mapping):
        return {name: _moved(value, device) for name, value in told.items()}
    return told.to(device) if isinstance(told, Tensor) else told


def grid(rows: Mapping[str, Tensor], words: Sequence[str], path: Path) -> Path:
    """Draw images (count, channels, height, width) in [0, 1], a line a name, with words above each column."""
    figure, axes = draw.panels(len(rows), len(words))
    figure.set_size_inches(1.6 * len(words) + 0.5, 1.6 * len(rows) + 0.4)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    for axis, text in zip(axes[0], words, strict=True):
        axis.set_title(text if len(text) < 24 else f"{text[:21]}...", fontsize=7)
    return draw.save(figure, path)


def prepare(config: Config, device: torch.device) -> DiffusionJob:
    """Read pictures and model, encode what need not be encoded at each step, and attach the adapter.

    Args:
        config: see `read_config`.
        device: where captions and latents are computed; they are then kept in the processor's memory.

    Raises:
        ConfigError: data that cannot be learnt from, or a model that is not known here.
        AttachError, SpecError: the declaration or the targets do not fit the model.
    """
    rows = read_rows(config)
    torch.manual_seed(config.seed)
    denoiser = load(config)
    size = denoiser.size(config.size)
    train, held = (Pictures(own, size, denoiser.channels) for own in (rows.train, rows.held))
    classes = _tell(config, denoiser, (train, held), device)
    if denoiser.vae is not None:
        denoiser.vae.to(device).requires_grad_(False)
        for own in (train, held):
            for k in range(0, len(own), TOGETHER):
                pixels = torch.stack([own.pixels(j) for j in range(k, min(k + TOGETHER, len(own)))])
                with torch.no_grad():
                    own.latents += zip(*(found.cpu() for found in denoiser.encoded(pixels.to(device))), strict=True)
    if denoiser.pipeline is not None:
        denoiser.pipeline.to("cpu")
    tuned, beside = adapted(denoiser.model, config, [])
    return DiffusionJob(denoiser.model, tuned, None, train, held, classes, beside, config, denoiser)


def _tell(config: Config, denoiser: Denoiser, both: Sequence[Pictures], device: torch.device) -> list[str]:
    """Note for each picture what the model is told of it; returns the classes by number, where it is told classes."""
    if denoiser.told == "nothing":
        return []
    column, key = ("text", config.text) if denoiser.told == "text" else ("label", config.label)
    rows = [row for own in both for row in own.rows]
    bare = next((row["image"] for row in rows if column not in row), None)
    if bare is not None:
        told = {"text": "a caption: metadata.jsonl or .csv with file_name and text, or NAME.txt beside NAME.png"}
        way = told.get(column, "its class: CLASS/NAME.png, or metadata.jsonl or .csv with file_name and label")
        raise ConfigError(f"the model is told {way}; there is no '{key}' for {bare}.")
    if column == "label":
        classes = _classes(config, denoiser, in_order(row["label"] for row in rows))
        for own in both:
            for k, row in enumerate(own.rows):
                own.told[k] = {"class_labels": torch.tensor(classes[row["label"]])}
        names = {number: name for name, number in classes.items()}
        return [names.get(k, str(k)) for k in range(max(names) + 1)]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    denoiser.pipeline.to(device)
    known: dict[str, Any] = {}
    for k in range(0, len(texts), TOGETHER):
        some = texts[k : k + TOGETHER]
        with torch.no_grad():
            found = _moved(denoiser.captions(some, both[0].size, device), torch.device("cpu"))
        known |= {text: _picked(found, j) for j, text in enumerate(some)}
    for own in both:
        own.told = [known[row["text"]] for row in own.rows]
    return []


def _picked(told: Any, k: int) -> Any:
    """One row of nested mappings of tensors."""
    return {name: _picked(value, k) for name, value in told.items()} if isinstance(told, Mapping) else told[k].clone()


def _classes(config: Config, denoiser: Denoiser, labels: Sequence[str]) -> dict[str, int]:
    """The number of each label: itself, or the pipeline's for that name, or its place among the labels.

    Raises:
        ConfigError: the model has no such class.
    """
    settings, pipeline = denoiser.model.config, denoiser.pipeline
    count = settings.get("num_class_embeds") or settings.get("num_embeds_ada_norm")
    named: dict[str, int] = getattr(pipeline, "labels", {})  # DiTPipeline's
    if all(label.isdecimal() for label in labels):
        found = {label: int(label) for label in labels}
    elif any(label in named for label in labels):
        strange = next((label for label in labels if label not in named), None)
        if strange is not None:
            raise ConfigError(f"the model knows no class '{strange}'; {near(strange, named)}")
        found = {label: int(named[label]) for label in labels}
    else:
        found = {label: k for k, label in enumerate(labels)}
    if count and max(found.values()) >= count:
        raise ConfigError(f"the data has a class {max(found.values())}, and the model has {count}, from 0 on.")
    return found
