"""Denoising diffusion: noise schedules, training with averaged weights, deterministic sampling.

Ho et al., arXiv 2006.11239 (linear); Nichol and Dhariwal, arXiv 2102.09672 (cosine); Song et al., arXiv 2010.02502 (DDIM);
Salimans and Ho, arXiv 2202.00512 (velocity).
All random numbers are drawn on the CPU, so that every device sees the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superlora_tn.demo.progress import OnStep
from superlora_tn.demo.whole_file import whole_file
from superlora_tn_paper.domains import to_bytes, to_unit
from superlora_tn_paper.unet import UNet
from superlora_tn_paper.values import copied, put

_CLIP = 1.0  # largest gradient norm
_WARM = 0.05  # the part of the steps in which the learning rate rises


@dataclass(frozen=True)
class Schedule:
    """How much of an image is left at each time, ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise``, and what the net tells.

    Args:
        kind: "linear" betas or "cosine" abar.
        times: T.
        predicts: the "noise", or the "velocity" ``sqrt(abar_t) noise - sqrt(1 - abar_t) x_0``, whose error counts where
            little of the image is left as well.
    """

    kind: Literal["linear", "cosine"] = "linear"
    times: int = 1000
    predicts: Literal["noise", "velocity"] = "noise"

    def alpha_bars(self) -> Tensor:
        """abar_t for t = 0 .. T - 1, float64 (T,), falling from nearly 1 to nearly 0."""
        if self.kind == "linear":
            scale = 1000 / self.times
            betas = torch.linspace(1e-4 * scale, 0.02 * scale, self.times, dtype=torch.float64)
        else:
            ends = torch.arange(self.times + 1, dtype=torch.float64) / self.times
            left = torch.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - left[1:] / left[:-1]
        return torch.cumprod(1 - betas.clamp(max=0.999), 0)

    def noised(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Images (n, colours, size, size) in [-1, 1] and noise of the same shape, mixed as of each one's time (n,)."""
        return self._mixed(images, noise, times)

    def wanted(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the net is to tell of images mixed with noise by `noised`, same shapes."""
        return noise if self.predicts == "noise" else self._mixed(noise, -images, times)

    def _mixed(self, one: Tensor, other: Tensor, times: Tensor) -> Tensor:
        left = self.alpha_bars()[times.cpu()].float().to(one.device)[:, None, None, None]
        return left.sqrt() * one + (1 - left).sqrt() * other

    def cleaned(self, x: Tensor, told: Tensor, left: float) -> Tensor:
        """The image, by what the net tells of x, of whose variance the part `left` is image."""
        if self.predicts == "noise":
            return (x - math.sqrt(1 - left) * told) / math.sqrt(left)
        return math.sqrt(left) * x - math.sqrt(1 - left) * told


@dataclass(frozen=True)
class Training:
    """One training run.

    Args:
        steps, batch: optimiser steps, and images in each.
        lr: peak learning rate of Adam; it rises over the first twentieth of the steps and falls to 0 as a cosine.
        decay: of the averaged weights; it starts lower, at (1 + step) / (10 + step).
        every: steps between two checkpoints.
    """

    steps: int
    batch: int
    lr: float
    decay: float
    every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        warm = max(1, round(_WARM * self.steps))
        if step <= warm:
            return self.lr * step / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm + 1))) / 2

    def keep(self, step: int) -> float:
        """How much of the average stays at a step, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step))


class TrainingState:
    """The state of a training run: parameters, their average, the optimiser and the random numbers to come."""

    def __init__(self, model: UNet, training: Training, seed: int) -> None:
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter of the model requires grad: attach an adapter before training.")
        self.average = copied(self.parameters)
        self.optimizer = torch.optim.Adam(self.parameters, lr=training.lr, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []

    def save(self, path: Path) -> None:
        """Write everything, whole or not at all."""
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }
        with whole_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote for a run of the same parameters."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        put(self.parameters, state["parameters"])
        put(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.losses = list(state["losses"])

    def update_average(self, keep: float) -> None:
        """``average <- keep average + (1 - keep) parameters``."""
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - keep)


def train(
    model: UNet,
    images: Tensor,
    schedule: Schedule,
    training: Training,
    seed: int,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
) -> list[float]:
    """Teach what requires grad to predict as the schedule says; leave the averaged weights in the model, in eval mode.

    Args:
        images: uint8 (count, colours, size, size), on the CPU.
        seed: fixes the images, times and noise of all steps.
        checkpoint: where the state is written every so many steps and taken up again; removed at the end.
        on_step: called after each step with (steps done, steps in all, loss).

    Returns:
        The loss of each step.
    """
    state = TrainingState(model, training, seed)
    if checkpoint is not None and checkpoint.is_file():
        state.load(checkpoint)
    model.train()
    for step in range(len(state.losses) + 1, training.steps + 1):
        for group in state.optimizer.param_groups:
            group["lr"] = training.rate(step)
        rows = torch.randint(len(images), (training.batch,), generator=state.generator)
        loss = _loss(model, to_unit(images[rows]), schedule, state.generator)
        state.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(state.parameters, _CLIP)
        state.optimizer.step()
        state.update_average(training.keep(step))
        state.losses.append(loss.item())
        if checkpoint is not None and step % training.every == 0 and step < training.steps:
            state.save(checkpoint)
        if on_step is not None:
            on_step(step, training.steps, state.losses[-1])
    put(state.parameters, state.average)
    model.eval()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return state.losses


def _loss(model: UNet, images: Tensor, schedule: Schedule, generator: torch.Generator, times: Tensor | None = None) -> Tensor:
    """Mean squared error of what the net predicts on images in [-1, 1]; the times are drawn where not given."""
    if times is None:
        times = torch.randint(schedule.times, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    device = next(model.parameters()).device
    noised, wanted = schedule.noised(images, noise, times), schedule.wanted(images, noise, times)
    return F.mse_loss(model(noised.to(device), times.to(device)), wanted.to(device))


@torch.no_grad()
def held_out_loss(model: UNet, images: Tensor, schedule: Schedule, seed: int, batch: int) -> float:
    """The loss on uint8 images (count, colours, size, size), with fixed noise, and times that are spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.arange(len(images)) * schedule.times // len(images)
    total = 0.0
    for part, when in zip(torch.split(images, batch), torch.split(times, batch), strict=True):
        total += len(part) * _loss(model, to_unit(part), schedule, generator, when).item()
    return total / len(images)


@torch.no_grad()
def sample(model: UNet, count: int, schedule: Schedule, steps: int, seed: int, batch: int) -> Tensor:
    """Draw images by DDIM with eta = 0: the seeded noise alone decides them.

    Args:
        count: how many.
        steps: times at which the net is asked, spread evenly; at most the schedule's.
        seed: of the starting noise, the same for the k-th image whatever the batch.
        batch: images at once.

    Returns:
        uint8 (count, colours, size, size), on the CPU.

    Raises:
        FloatingPointError: the model gives values that are not finite.
    """
    shape, device = model.shape, next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(count, shape.colours, shape.size, shape.size, generator=generator)
    bars = schedule.alpha_bars()
    times = list(range(0, schedule.times, max(1, schedule.times // steps)))[:steps]
    path = [(time, float(bars[time])) for time in times]
    found = torch.cat([_denoise(model, x.to(device), schedule, path).cpu() for x in torch.split(start, batch)])
    broken = int((~found.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise FloatingPointError(f"{broken} of {count} generated images are not finite; train at a lower learning rate.")
    return to_bytes((found + 1) / 2)


def _denoise(model: UNet, x: Tensor, schedule: Schedule, path: list[tuple[int, float]]) -> Tensor:
    """Follow (time, abar) from the last to the first, then to the image, which is kept in [-1, 1]."""
    clean = x
    for k in range(len(path) - 1, -1, -1):
        time, left = path[k]
        after = path[k - 1][1] if k else 1.0
        told = model(x, torch.full((len(x),), time, device=x.device))
        clean = schedule.cleaned(x, told, left).clamp(-1, 1)
        noise = (x - math.sqrt(left) * clean) / math.sqrt(1 - left)
        x = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
    return clean
