"""The two domains of the diffusion experiment: house numbers or printed digits at home, handwritten digits abroad.

Images are uint8 (count, colours, size, size), 3 colours or 1.  What a data folder lacks is replaced by what the `demo`
extra brings (printed digits on coloured grounds, scikit-learn's scans); the words that come back say what was used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from superlora_tn.demo.digits import Split, printed_digits, scanned_digits, uniform
from superlora_tn_paper.data_folder import mnist, svhn

FULL_SVHN = "train_32x32.mat"


@dataclass(frozen=True)
class Domain:
    """Images uint8 (count, colours, size, size), labels int64 (count,), and words that say what they are."""

    images: Tensor
    labels: Tensor
    words: str


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def home(count: int, size: int, seed: int, data: Path | None = None, colours: int = 3) -> Domain:
    """The domain of pre-training: SVHN as far as it is there, in colour or in grey.

    Args:
        count: how many images to draw where SVHN is not there in full; half of them are then real digits, shifted,
            scaled and recoloured, where the folder has any, and all others composed.
        size: pixels along an edge, a divisor of 32.
        seed: fixes what is drawn.
        data: a folder with SVHN's ``train_32x32.mat``, or with ``svhn_train1083``.
        colours: 3, or 1 for their mean.
    """
    found = _home(count, size, seed, data)
    return found if colours == 3 else replace(found, images=_grey(found.images))


def printed(count: int, size: int, seed: int, colours: int = 1) -> Domain:
    """A nearer domain of pre-training: printed digits in white ink, as the target's are.

    Args:
        count: how many to draw.
        size: pixels along an edge.
        seed: fixes what is drawn.
        colours: 3 or 1.
    """
    ink, labels = printed_digits(count, seed, "train", size, worn=False)
    images = to_bytes(ink).expand(-1, colours, -1, -1).contiguous()
    return Domain(images, labels, f"{count:,} printed digits, white ink on black")


def _home(count: int, size: int, seed: int, data: Path | None) -> Domain:
    if data is not None and (data / FULL_SVHN).is_file():
        images, labels = _svhn(data / FULL_SVHN)
        return Domain(_shrink(images, size), labels, f"SVHN, all {len(labels):,} training images")
    composed = "printed digits composed on coloured grounds"
    if data is None or not (data / "svhn_train1083").is_dir():
        return Domain(*_composed(count, size, seed), f"{count:,} {composed} (no SVHN in the data folder)")
    real, labels = svhn(data)
    varied, own = _varied(_channels_first(real), labels, count - count // 2, seed)
    drawn = _composed(count // 2, size, seed)
    words = f"{len(own):,} variations of the first {len(labels):,} SVHN images and {len(drawn[1]):,} {composed}"
    return Domain(torch.cat([_shrink(varied, size), drawn[0]]), torch.cat([own, drawn[1]]), words)


def abroad(split: Split, size: int, data: Path | None = None, colours: int = 3, close: bool = False) -> Domain:
    """The domain to adapt to: MNIST where the data folder has it, else scikit-learn's scans; grey, in so many equal colours.

    Args:
        split: "train" or "test".
        size: pixels along an edge, a divisor of 32.
        data: a folder with ``mnist``.
        colours: 3 or 1.
        close: MNIST's middle 24 pixels, where otherwise a border of 2 is added to its 28; any size then.
    """
    if data is None or not (data / "mnist").is_dir():
        scans, labels = scanned_digits(split, size=size)
        return Domain(to_bytes(scans).expand(-1, colours, -1, -1).contiguous(), labels, "scikit-learn's 8x8 scans, enlarged")
    images, own = mnist(data, split == "train")
    words = f"MNIST, {split} images" + (", their middle 24x24 pixels" if close else "")
    return Domain(_handwriting(images, size, colours, -2 if close else 2), own, words)


def _resized(images: Tensor, size: int) -> Tensor:
    """uint8 (n, colours, h, w) at any other size, by averages weighted linearly."""
    return to_bytes(F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", antialias=True))


def _handwriting(images: Tensor, size: int, colours: int, border: int) -> Tensor:
    """uint8 (n, h, w) with a border of empty pixels more, or less, as (n, colours, size, size)."""
    framed = F.pad(images, (border,) * 4).unsqueeze(1)
    if framed.shape[-1] % size == 0:
        drawn = _shrink(framed, size)
    else:
        drawn = torch.cat([_resized(part, size) for part in torch.split(framed, 4096)])
    return drawn.expand(-1, colours, -1, -1).contiguous()


def _svhn(path: Path) -> tuple[Tensor, Tensor]:
    """SVHN's own file: images (n, 3, 32, 32) uint8 and labels, its 10 read as 0."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # scipy is needed for this one file alone

    found: dict[str, Any] = loadmat(str(path))
    images, labels = (torch.from_numpy(np.array(found[name])) for name in "Xy")
    return _channels_first(images.permute(3, 0, 1, 2)), labels.reshape(-1).long() % 10


def _channels_first(images: Tensor) -> Tensor:
    """(n, h, w, 3) to (n, 3, h, w)."""
    return images.permute(0, 3, 1, 2).contiguous()


def _grey(images: Tensor) -> Tensor:
    """The mean of the three colours: uint8 (n, 1, h, w)."""
    return torch.cat([to_bytes(part.float().mean(1, keepdim=True) / 255) for part in torch.split(images, 4096)])


def _shrink(images: Tensor, size: int) -> Tensor:
    """Average uint8 images down to an edge of `size` pixels, a part at a time."""
    if images.shape[-1] == size:
        return images.contiguous()
    if images.shape[-1] % size:
        raise ValueError(f"images of {images.shape[-1]} pixels cannot be averaged to {size}; give a divisor.")
    step = images.shape[-1] // size
    return torch.cat([to_bytes(F.avg_pool2d(part.float() / 255, step)) for part in torch.split(images, 4096)])


def _varied(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` small shifts, crops and recolourings of images; no flips, which digits do not survive."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(labels), (count,), generator=generator)
    parts = [_vary(images[part].float() / 255, generator) for part in torch.split(rows, 4096)]
    return torch.cat(parts), labels[rows]


def _vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random variation each of float images (n, 3, h, w) in [0, 1], as uint8."""
    n = len(images)
    turn = torch.zeros(n, 2, 3)
    turn[:, 0, 0], turn[:, 1, 1] = uniform(n, 0.85, 1.05, generator), uniform(n, 0.85, 1.05, generator)
    turn[:, :, 2] = uniform(2 * n, -0.1, 0.1, generator).view(n, 2)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain = uniform(3 * n, 0.85, 1.15, generator).view(n, 3, 1, 1)
    return to_bytes((moved - 0.5) * gain + 0.5 + uniform(n, -0.1, 0.1, generator).view(n, 1, 1, 1))


def _composed(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Printed digits in one colour on smoothly uneven grounds of another: uint8 (count, 3, size, size), and labels."""
    ink, labels = printed_digits(count, seed, "train", 2 * size)
    generator = torch.Generator().manual_seed(seed + 1)
    grey, tint = torch.rand(count, 1, 1, 1, generator=generator), torch.rand(count, 3, 1, 1, generator=generator)
    ground = 0.1 + 0.5 * grey + 0.3 * tint
    # Ink differs in lightness above all, as paint on a house does: lighter on dark grounds, darker on light ones.
    sign = torch.where(ground.mean(1, keepdim=True) < 0.5, 1.0, -1.0)
    contrast = uniform(count, 0.3, 0.6, generator).view(count, 1, 1, 1)
    paint = ground + sign * contrast + 0.1 * torch.randn(count, 3, 1, 1, generator=generator)
    uneven = F.interpolate(torch.randn(count, 3, 3, 3, generator=generator), size=(size, size), mode="bicubic")
    return to_bytes(ground + F.avg_pool2d(ink, 2) * (paint - ground) + 0.05 * uneven), labels
