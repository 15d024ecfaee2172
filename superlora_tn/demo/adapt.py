"""One adaptation run: train whatever an adapter left trainable on the handwritten scans."""

import statistics

import torch
from torch import Tensor, nn

from superlora_tn.demo.base import train
from superlora_tn.demo.progress import OnStep


def adapt(
    model: nn.Module,
    train_images: Tensor,
    train_labels: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    on_step: OnStep | None = None,
) -> float:
    """Train the parameters of ``model`` that require grad, in place; return the median seconds per step.

    ``train_images`` (count, 1, size, size) and ``train_labels`` (count,) are sampled in an order that
    ``seed`` fixes; ``lr`` is the peak of the one-cycle schedule.  Frozen parameters, the classification
    head among them, stay as they are.  Raises ValueError if nothing requires grad.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model requires grad: attach an adapter before adapting")
    # No weight decay: an adapter starts at no change, so decay would only pull it back to the base.
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    return statistics.median(train(model, optimizer, train_images, train_labels, steps, batch, seed, on_step))
