"""Training that ends by itself: at a constant rate, once the averaged parameters do no better on images held apart."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.demo.progress import OnStep
from superlora_tn_paper.classification_training import adamw, step_down
from superlora_tn_paper.store import Data
from superlora_tn_paper.task import Batch, Task
from superlora_tn_paper.values import copied, put


@dataclass(frozen=True)
class Stop:
    """When a run ends, and what is kept of it.

    Attributes:
        every: steps between two looks at the images held apart.
        patience: a run ends this many steps after its best look.
        most: steps of a run that goes on improving; the reports say which runs had as many.
        better: a look is better than the best so far where its loss is lower by more than this share.
        memory: of the averaged parameters, what each step keeps; they are what is judged and kept.
        warmup: steps in which the rates rise to their constant values.
    """

    every: int = 100
    patience: int = 500
    most: int = 4000
    better: float = 0.02
    memory: float = 0.99
    warmup: int = 50


@dataclass(frozen=True)
class Kept:
    """The best look of a run.

    Attributes:
        best: the step it was at; 0 is the start.
        steps: of the run so far.
        loss: of that look.
        values: the averaged parameters there, in the order of the groups.
        train_loss: mean of the run's last steps, as many as lie between two looks.
        step_seconds: median of a step.
    """

    best: int
    steps: int
    loss: float
    values: list[Tensor]
    train_loss: float
    step_seconds: float

    def put_back(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]], result: Callable[[], Data]) -> Data:
        """What is found with its values in the parameters, which are left so, and of which run they are."""
        put((p for own, _ in groups for p in own), self.values)
        told = {"best": self.best, "steps": self.steps, "loss_apart": self.loss, "train_loss": self.train_loss}
        return result() | told | {"step_seconds": round(self.step_seconds, 5)}


@contextmanager
def _held(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Other values in the parameters meanwhile."""
    own = copied(parameters)
    put(parameters, values)
    try:
        yield
    finally:
        put(parameters, own)


def calibrated_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy at the best temperature: what is wrong with the order of the classes, not with how sure it is of it.

    After many passes over few images a run that has learnt more is surer of its mistakes, too, so its loss rises while its
    accuracy still does; this loss shows the latter (Berta et al., arXiv 2501.19195). It is convex in the inverse temperature.

    Args:
        logits: (n, classes).
        labels: (n,).

    Returns:
        The loss in nats; not a number where a logit is not finite.
    """
    scores, inverse = logits.double(), 1.0
    if not bool(scores.isfinite().all()):
        return math.nan
    right = scores.gather(-1, labels[:, None])[:, 0].mean()
    for _ in range(100):  # Newton's steps, at most a factor of four each
        likely = (inverse * scores).softmax(-1)
        mean = (likely * scores).sum(-1)
        slope, curve = float(mean.mean() - right), float(((likely * scores.square()).sum(-1) - mean.square()).mean())
        wanted = inverse - slope / curve if curve > 0 else inverse
        before, inverse = inverse, min(max(wanted, inverse / 4), inverse * 4)
        if abs(inverse - before) <= 1e-9 * before:
            break
    return float(functional.cross_entropy(inverse * scores, labels))


def descend_until(
    task: Task,
    groups: Sequence[tuple[Iterable[nn.Parameter], float]],
    batches: Iterable[Batch],
    stop: Stop,
    judge: Callable[[], float],
    show: OnStep,
    longer: Sequence[int] = (),
) -> list[Kept]:
    """Minimise cross-entropy by AdamW (no decay) at one constant rate a group of parameters until it helps no more.

    Args:
        task: model and head.
        groups: parameters and their rates.
        batches: without end, or long enough; the same however long the run is.
        stop: when it ends.
        judge: a loss of the model as it is on the images held apart.
        show: told of each step.
        longer: once it would have ended, the run goes on to so many times its steps, in rising order.

    Returns:
        What is best until it would have ended, then until each of `longer`. The parameters are left as the last step left them.
    """
    optimizer, own = adamw(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    averaged = copied(own)
    best, least, values = 0, judge(), averaged
    losses, seconds, found = list[float](), list[float](), list[Kept]()
    for step, batch in enumerate(batches, 1):
        start = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, step / stop.warmup)
        task.model.train()
        losses.append(step_down(task, optimizer, own, batch))
        keep = min(stop.memory, step / (step + 10))  # what the first steps passed through is soon forgotten
        averaged = [torch.lerp(p.detach(), one, keep) for p, one in zip(own, averaged, strict=True)]
        seconds.append(time.perf_counter() - start)
        if step % stop.every == 0:
            with _held(own, averaged):
                loss = judge()
            if loss < least * (1 - stop.better):
                best, least, values = step, loss, averaged
        end = longer[len(found) - 1] * found[0].steps if found else min(best + stop.patience, stop.most)
        show(step, end, losses[-1])
        if step >= end:
            trained = statistics.fmean(losses[-stop.every :])
            found.append(Kept(best, step, least, values, trained, statistics.median(seconds)))
            if len(found) > len(longer):
                break
    return found
