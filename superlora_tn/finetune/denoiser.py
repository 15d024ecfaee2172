"""A diffusion model of ``diffusers``: what it is told, how its images are noised, what it is to predict, and its samples."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from superlora_tn.finetune.config import Config
from superlora_tn.finetune.named import ConfigError, unreachable

Told = Mapping[str, Any]
# What the denoisers are told beside image and time; they take (image, timestep, told) and predict an image.
KNOWN = {
    "UNet2DModel": "class",
    "DiTTransformer2DModel": "class",
    "UNet2DConditionModel": "text",
    "SD3Transformer2DModel": "text",
}
TARGETS = ("epsilon", "v_prediction", "sample")
PARTS = ("unet", "transformer")
INDEX = "model_index.json"


@dataclass(frozen=True)
class Denoiser:
    """A denoiser, and what stands around it.

    Attributes:
        model: takes noisy images or latents and says what of them is noise.
        part: its name in a pipeline: ``unet`` or ``transformer``.
        scheduler: as it is saved with the model; it samples.
        training: the same schedule, by which images are noised.
        pipeline: with text encoders and VAE; None for a model alone.
        told: ``nothing``, ``class`` or ``text``.
    """

    model: Any
    part: str
    scheduler: Any
    training: Any
    pipeline: Any
    told: str

    @property
    def vae(self) -> Any:
        """Between images and latents; None where images themselves are denoised."""
        return None if self.pipeline is None else self.pipeline.components.get("vae")

    @property
    def flows(self) -> bool:
        """Whether it predicts the velocity noise - image on straight lines between them (flow matching)."""
        return isinstance(self.training, diffusers.FlowMatchEulerDiscreteScheduler)

    @property
    def channels(self) -> int:
        """Of the images it reads and writes: 1 is grey."""
        return int(self.model.config.in_channels if self.vae is None else self.vae.config.in_channels)

    def size(self, wanted: int) -> int:
        """An image's side in pixels: what is wanted, or what the model was made for.

        Raises:
            ConfigError: the model does not say, or cannot take it.
        """
        own, shrinks = self.model.config.sample_size, self._shrinks()
        if not wanted and not isinstance(own, int):
            raise ConfigError(f"the model is made for images of size {own}; say which squares it learns from: size: 64.")
        if wanted % shrinks:
            raise ConfigError(f"size is {wanted}, and this model's VAE makes {shrinks} pixels one; give a multiple of that.")
        return wanted or int(own) * shrinks

    def _shrinks(self) -> int:
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images in [-1, 1], (rows, channels, height, width)."""
        found = self.vae.encode(pixels).latent_dist
        scale, shift = self._scale()
        return (found.mean - shift) * scale, found.std * scale

    def decoded(self, latents: Tensor) -> Tensor:
        """Images in [0, 1] from latents, or from images in [-1, 1] where there is no VAE."""
        scale, shift = self._scale()
        pixels = latents if self.vae is None else self.vae.decode(latents / scale + shift).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _scale(self) -> tuple[float, float]:
        if self.vae is None:
            return 1.0, 0.0
        return float(self.vae.config.scaling_factor), float(self.vae.config.get("shift_factor") or 0.0)

    def noised(self, clean: Tensor, noise: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, the times as the model takes them, and what it is to predict.

        Args:
            clean, noise: (rows, channels, height, width).
            moments: (rows,) whole numbers below the schedule's `num_train_timesteps`.
        """
        if self.flows:
            sigma = self.training.sigmas.to(clean)[moments][:, None, None, None]
            return (1 - sigma) * clean + sigma * noise, self.training.timesteps.to(clean)[moments], noise - clean
        noisy = self.training.add_noise(clean, noise, moments)
        kind = self.training.config.prediction_type
        if kind == "epsilon":
            return noisy, moments, noise
        return noisy, moments, clean if kind == "sample" else self.training.get_velocity(clean, noise, moments)

    def predict(self, model: Any, noisy: Tensor, times: Tensor, told: Told) -> Tensor:
        """What `model`, this denoiser or a wrapper of it, predicts; a learnt variance behind it is left out."""
        found: Tensor = model(noisy, timestep=times, return_dict=False, **told)[0]
        return found[:, : noisy.shape[1]]

    def classes(self, labels: Sequence[int]) -> Told:
        """What it is told of classes."""
        return {"class_labels": torch.tensor(labels)}

    def captions(self, texts: Sequence[str], size: int, device: torch.device) -> dict[str, Any]:
        """What it is told of captions, by its own text encoders; a tensor's first axis is the caption."""
        found = self.pipeline.encode_prompt(
            **{name: list(texts) for name in self._prompts()},
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        states = {"encoder_hidden_states": found[0]}
        if isinstance(self.model, diffusers.SD3Transformer2DModel):
            return states | {"pooled_projections": found[2]}
        if self.model.config.addition_embed_type == "text_time":  # SDXL's
            sizes = torch.tensor([[size, size, 0, 0, size, size]] * len(texts), device=device)
            return states | {"added_cond_kwargs": {"text_embeds": found[2], "time_ids": sizes}}
        return states

    def _prompts(self) -> list[str]:
        """All of its text encoders read the same caption."""
        taken = inspect.signature(self.pipeline.encode_prompt).parameters
        return [name for name in ("prompt", "prompt_2", "prompt_3") if name in taken]

    def untold(self, count: int, size: int, device: torch.device) -> Told | None:
        """What it is told where it is told nothing: the empty caption, DiT's class behind the last; None without one."""
        if self.told == "text":
            empty = self.captions([""] * count, size, device)
            if self.pipeline.config.get("force_zeros_for_empty_prompt"):  # SDXL's base was trained so
                empty["encoder_hidden_states"] = torch.zeros_like(empty["encoder_hidden_states"])
                added = empty["added_cond_kwargs"]
                empty["added_cond_kwargs"] = added | {"text_embeds": torch.zeros_like(added["text_embeds"])}
            return empty
        classes = self.model.config.get("num_embeds_ada_norm")
        return self.classes([classes] * count) if self.told == "class" and classes else None

    @torch.no_grad()
    def sample(self, start: Tensor, told: Told, untold: Told | None, guidance: float, steps: int, seed: int) -> Tensor:
        """Images in [0, 1] by the model's own scheduler.

        Args:
            start: noise, (rows, channels, height, width), of the denoiser's sizes.
            told: what it is told of each row.
            untold: the same for guidance; None is without.
            guidance: how far away from what it predicts untold.
            steps: calls of the denoiser, or twice as many.
            seed: of schedulers that draw.
        """
        fixed = str(self.scheduler.config.get("variance_type")).startswith("learned")  # the variance is not asked for
        scheduler = type(self.scheduler).from_config(
            self.scheduler.config, **({"variance_type": "fixed_small"} if fixed else {})
        )
        bent = {"mu": scheduler.config.base_shift} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, device=start.device, **bent)
        draws = "generator" in inspect.signature(scheduler.step).parameters
        more = {"generator": torch.Generator().manual_seed(seed)} if draws else {}
        x = start if self.flows else start * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            given = x if self.flows else scheduler.scale_model_input(x, time)
            times = time.expand(len(x))
            found = self.predict(self.model, given, times, told)
            if untold is not None and guidance != 1:
                other = self.predict(self.model, given, times, untold)
                found = other + guidance * (found - other)
            x = scheduler.step(found, time, x, return_dict=False, **more)[0]
        return self.decoded(x)

    def write(self, place: Path) -> None:
        """Write the pipeline, or model and scheduler, as they were read."""
        if self.pipeline is not None:
            self.pipeline.save_pretrained(place)
            return
        self.model.save_pretrained(place)
        self.scheduler.save_pretrained(place / "scheduler")


def load(config: Config) -> Denoiser:
    """Read a pipeline, or a denoiser with its scheduler, in float32.

    Raises:
        ConfigError: no such model, or one of a kind that is not known here.
    """
    name, folder = config.model, Path(config.model)
    try:
        if folder.is_dir() and not (folder / INDEX).exists():
            pipeline, model = None, diffusers.AutoModel.from_pretrained(name)
            part = PARTS["UNet" not in type(model).__name__]
        else:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(name, dtype=torch.float32, **_absent(folder))
            part = next((own for own in PARTS if pipeline.components.get(own) is not None), "")
            if not part or "scheduler" not in pipeline.components:
                raise ConfigError(f"the pipeline '{name}' has no {' or '.join(PARTS)}, or no scheduler, so nothing to train.")
            model = pipeline.components[part]
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise unreachable("model", name, error) from error
    told = _told(name, model, pipeline)
    scheduler = _scheduler(folder) if pipeline is None else pipeline.scheduler
    found = Denoiser(model, part, scheduler, _training(name, scheduler), pipeline, told)
    reads, writes = int(model.config.in_channels), int(model.config.out_channels or model.config.in_channels)
    width = reads if found.vae is None else found.vae.config.latent_channels
    if reads != width or writes not in (reads, 2 * reads):
        raise ConfigError(
            f"the denoiser of '{name}' reads {reads} channels and writes {writes}, of {width} that are noised; models that are "
            "given another image, as for inpainting, are not known here."
        )
    return found


def _absent(folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without, such as SD3's third text encoder; diffusers wants to be told of them."""
    note = folder / INDEX
    found = json.loads(note.read_text()) if note.is_file() else {}
    return {name: None for name, place in found.items() if place == [None, None]}


def _told(name: str, model: Any, pipeline: Any) -> str:
    kind = type(model).__name__
    if kind not in KNOWN:
        raise ConfigError(f"'{name}' is a {kind}; task diffusion knows {', '.join(KNOWN)}.")
    if pipeline is not None and not isinstance(pipeline.components.get("vae"), diffusers.AutoencoderKL | None):
        raise ConfigError(f"the pipeline '{name}' has a {type(pipeline.vae).__name__}; an AutoencoderKL is known here.")
    if KNOWN[kind] == "text":
        if pipeline is None or pipeline.components.get("tokenizer") is None:
            raise ConfigError(f"'{name}' is told captions; give the folder of its pipeline, with tokenizer and text encoder.")
        return "text"
    return "class" if kind != "UNet2DModel" or model.class_embedding is not None else "nothing"


def _scheduler(folder: Path) -> Any:
    for place in (folder / "scheduler", folder):
        note = place / "scheduler_config.json"
        if note.exists():
            kind = json.loads(note.read_text()).get("_class_name", "")
            made: Any = getattr(diffusers, kind, None)  # made by diffusers when it is asked for
            known = isinstance(made, type) and issubclass(made, diffusers.SchedulerMixin)
            if not known:
                raise ConfigError(
                    f"{note} names the scheduler '{kind}', which diffusers {diffusers.__version__} does not have."
                )
            return made.from_pretrained(place)
    raise ConfigError(f"{folder} has no scheduler/scheduler_config.json, which says how images are noised.")


def _training(name: str, scheduler: Any) -> Any:
    """The schedule that noises images, whatever scheduler samples."""
    settings = scheduler.config
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return type(scheduler).from_config(settings)
    if "beta_schedule" in settings and settings.get("prediction_type", "epsilon") in TARGETS:
        return diffusers.DDPMScheduler.from_config(settings)
    raise ConfigError(
        f"'{name}' has a {type(scheduler).__name__} with prediction_type {settings.get('prediction_type')}; known are those "
        f"with betas that predict {', '.join(TARGETS)}, and FlowMatchEulerDiscreteScheduler."
    )
