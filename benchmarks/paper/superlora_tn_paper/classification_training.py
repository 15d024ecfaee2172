"""One run: a new head and an adapter on the frozen model; and the head alone, on features computed once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn import AdapterSpec, Tuned, attach
from superlora_tn.demo.progress import OnStep
from superlora_tn_paper.task import Batch, Subset, Task

CLIP = 1.0  # largest gradient norm: adapters that multiply several factors meet sudden slopes
PROBE_DECAYS = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of the classification experiment.

    Attributes:
        steps, batch: of each run.
        rates: peak learning rates tried for each variant;
        dense_share: dense fine-tuning tries this share of each: its numbers are dW's own, not factors of it.
        head_rates: those tried for the head alone; the best is the head's in every run.
        seeds: of the report: the new head, the adapter's first values, and which images are drawn.
        choice_seed: of the runs that choose a rate; none of `seeds`.
        apart: the share of the training images that choose it, held apart from all training.
        look: images at once where nothing is trained.
    """

    steps: int = 200
    batch: int = 8
    rates: tuple[float, ...] = (1e-3, 4e-3, 1.6e-2)
    dense_share: float = 0.1
    head_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    choice_seed: int = 100
    apart: float = 0.04
    look: int = 250


RECIPES = {
    "small": Recipe(),
    "digits": Recipe(batch=16, apart=0.2),  # the small scale without the data folder: few images, and a smaller model
    "full": Recipe(steps=3000, batch=128, rates=(1e-3, 3e-3, 1e-2), head_rates=(1e-3, 3e-3, 1e-2), look=500),
}


@contextmanager
def adapted(task: Task, spec: AdapterSpec, seed: int) -> Iterator[Tuned]:
    """The model with a new head and an adapter; afterwards, the new head aside, it is bit for bit as before."""
    head = task.new_head(seed)
    handle = attach(task.model, spec, task.targets, seed=seed)
    head.requires_grad_(True)
    try:
        yield handle
    finally:
        handle.detach()


def adamw(groups: Sequence[tuple[Iterable[nn.Parameter], float]]) -> tuple[torch.optim.AdamW, list[nn.Parameter]]:
    """The optimizer of groups of parameters and their rates, without decay, and all its parameters."""
    optimizer = torch.optim.AdamW([{"params": list(own), "lr": rate} for own, rate in groups], weight_decay=0.0)
    return optimizer, [p for group in optimizer.param_groups for p in group["params"]]


def step_down(task: Task, optimizer: torch.optim.Optimizer, own: Sequence[nn.Parameter], batch: Batch) -> float:
    """One step on the cross-entropy of a batch; its loss before."""
    images, labels = batch
    loss = functional.cross_entropy(task.logits(images), labels.to(task.device, non_blocking=True))
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(own, CLIP)
    optimizer.step()
    return loss.item()


def descend(
    task: Task, groups: Sequence[tuple[Iterable[nn.Parameter], float]], batches: Iterable[Batch], steps: int, show: OnStep
) -> tuple[float, float]:
    """Minimise cross-entropy by AdamW (no decay) under one-cycle schedules, one peak rate a group of parameters.

    Returns the mean loss of the last tenth of the steps, and the median seconds of a step.
    """
    optimizer, own = adamw(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.2)
    losses, seconds = [], []
    task.model.train()
    for step, batch in enumerate(batches, 1):
        start = time.perf_counter()
        losses.append(step_down(task, optimizer, own, batch))
        schedule.step()
        seconds.append(time.perf_counter() - start)
        show(step, steps, losses[-1])
    task.model.eval()
    return statistics.fmean(losses[-max(1, steps // 10) :]), statistics.median(seconds)


@dataclass(frozen=True)
class Score:
    """How well images are classified.

    Attributes:
        accuracy: the share whose largest logit is the label, in [0, 1].
        loss: mean cross-entropy; smoother than accuracy, so it chooses between settings.
    """

    accuracy: float
    loss: float


@torch.no_grad()
def answers(task: Task, split: Subset, batch: int) -> Tensor:
    """Logits (n, classes) of the model as it is, for all images of a split, on the CPU."""
    task.model.eval()
    return torch.cat([task.logits(images).cpu() for images, _ in split.in_order(batch)])


def score(task: Task, split: Subset, batch: int) -> Score:
    """The model as it is, on all images of a split."""
    return _scored(answers(task, split, batch), split.labels)


def _scored(logits: Tensor, labels: Tensor) -> Score:
    right = (logits.argmax(-1) == labels).double().mean()
    return Score(float(right), float(functional.cross_entropy(logits, labels)))


@torch.no_grad()
def features(task: Task, split: Subset, batch: int) -> tuple[Tensor, Tensor]:
    """What the frozen model gives its head, (n, width), and the labels, on the CPU."""
    seen: list[Tensor] = []
    head = task.model.get_submodule(task.head)
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
    task.model.eval()
    try:
        for images, _ in split.in_order(batch):
            task.logits(images)
    finally:
        handle.remove()
    return torch.cat(seen), split.labels


@torch.no_grad()
def head_score(head: nn.Linear, data: tuple[Tensor, Tensor]) -> Score:
    """A head on features (n, width) with labels (n,)."""
    return _scored(head(data[0]), data[1])


def converged_head(task: Task, train: tuple[Tensor, Tensor], apart: tuple[Tensor, Tensor]) -> tuple[nn.Linear, float]:
    """The head alone trained to convergence by L-BFGS on all features, its decay the best on the images held apart."""
    heads = {decay: task.new_head(0).cpu() for decay in PROBE_DECAYS}
    for decay, head in heads.items():
        _converge(head, train, decay)
    best = min(heads, key=lambda decay: head_score(heads[decay], apart).loss)
    return heads[best], best


def _converge(head: nn.Linear, data: tuple[Tensor, Tensor], decay: float) -> None:
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(data[0]), data[1]) + decay * head.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
