"""First steps that are equally long: by how much each setting's rate is multiplied, and how far dW has moved."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from superlora_tn import Tuned
from superlora_tn_paper.task import Batch, Task
from superlora_tn_paper.values import copied, put


def moved(tuned: Tuned) -> float:
    """Frobenius norm of all targets' dW together."""
    with torch.no_grad():
        return float(torch.stack([tuned.delta(name).double().square().sum() for name in tuned.targets]).sum().sqrt())


def rate_times(task: Task, tuned: Tuned, batch: Batch, stride: float, rate: float = 1e-5) -> float:
    """By how much a rate is multiplied so that a first step of Adam moves dW as far as any other setting's.

    Adam's first step moves each number by the rate, whatever its gradient's size. How far dW moves is then up to how many
    numbers there are and to the first values of the other factors, which stay as the library gives them.

    Args:
        task: model and head; only the gradient's signs are used.
        tuned: the adapter, its dW zero; afterwards it is as before.
        batch: images and labels of the gradient.
        stride: wanted is ``|dW| = rate * stride * sqrt(elements)``.
        rate: of the probing step, small enough that dW is linear in it.
    """
    own = list(tuned.parameters())
    first = copied(own)
    loss = functional.cross_entropy(task.logits(batch[0]), batch[1].to(task.device))
    slopes = torch.autograd.grad(loss, own, allow_unused=True)
    with torch.no_grad():
        for p, slope in zip(own, slopes, strict=True):
            if slope is not None:
                p.sub_(rate * slope.sign())
    here = moved(tuned)
    put(own, first)
    return rate * stride * math.sqrt(sum(o * i for o, i in task.shapes.values())) / here
