"""How good generated digits are, without a download: distances in a small digit classifier's own features.

It is Frechet's distance as in FID (Heusel et al., arXiv 1706.08500), but not FID: no Inception network is in it, and
its figures compare with those of the same run alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superlora_tn_paper.domains import to_unit

FEATURES = 64
_PART = 512  # images at once


class Classifier(nn.Module):
    """Three convolutions and two linear layers: images (n, colours, size, size) in [-1, 1] to 10 logits."""

    def __init__(self, colours: int) -> None:
        super().__init__()
        widths = (colours, 32, 64, 64)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, stride=2) for a, b in pairwise(widths))
        self.hidden, self.head = nn.Linear(4 * widths[-1], FEATURES), nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: (n, 64)."""
        x = images
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
        pooled = F.adaptive_avg_pool2d(x, 2) if x.shape[-1] > 2 else F.interpolate(x, size=(2, 2))
        return F.silu(self.hidden(pooled.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def new_classifier(colours: int, seed: int, device: str = "cpu") -> Classifier:
    """An untrained classifier whose weights `seed` fixes; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(colours).to(device)


def train_classifier(model: Classifier, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Teach it uint8 images (n, colours, size, size) with labels (n,), in place, 128 at a time."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    device = model.head.weight.device
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (128,), generator=generator)
        loss = F.cross_entropy(model(to_unit(images[rows]).to(device)), labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()


@dataclass(frozen=True)
class Seen:
    """What a classifier makes of images: features float64 (n, 64) and probabilities (n, 10), on the CPU."""

    features: Tensor
    probabilities: Tensor

    @property
    def confidence(self) -> float:
        """Mean probability of the likeliest digit."""
        return float(self.probabilities.amax(1).mean())


@torch.no_grad()
def look(model: Classifier, images: Tensor) -> Seen:
    """Features and probabilities of uint8 images (n, colours, size, size)."""
    device = model.head.weight.device
    found = torch.cat([model.features(to_unit(part).to(device)) for part in torch.split(images, _PART)])
    return Seen(found.double().cpu(), model.head(found).double().softmax(1).cpu())


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of features (n, d), float64."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images; {len(features)} were given.")
    return features.double().mean(0), torch.cov(features.double().T).reshape(features.shape[1], -1)


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Frechet's distance of two Gaussians: ``|m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)``.

    Exact through eigenvalues, float64; each Gaussian is its mean (d,) and covariance (d, d).
    """
    (mean, spread), (mean2, spread2) = one, other
    values, vectors = torch.linalg.eigh(spread)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ spread2 @ root
    mixed = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mean - mean2).square().sum() + spread.trace() + spread2.trace() - 2 * mixed)


def frechet_spread(features: Tensor, reference: tuple[Tensor, Tensor], seed: int, draws: int = 20) -> float:
    """Standard deviation of the distance over bootstrap draws of the images: what chance in sampling alone does to it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(features), (draws, len(features)), generator=generator)
    found = torch.tensor([frechet(moments(features[row]), reference) for row in rows], dtype=torch.float64)
    return float(found.std())
