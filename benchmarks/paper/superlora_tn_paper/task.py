"""What an experiment adapts: a pre-trained classifier, its new classes, and its images in three parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn import attach, lora
from superlora_tn.declare.fold import Shape
from superlora_tn.demo.base import FULL, DigitsRecipe, pretrained
from superlora_tn.demo.digits import scanned_digits
from superlora_tn.demo.progress import OnStep
from superlora_tn_paper.data_folder import mnist, tiny_imagenet
from superlora_tn_paper.vit import Vit

Batch = tuple[Tensor, Tensor]
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])  # the ViT's own, per channel
DOMAINS = ("tinyimagenet30", "mnist")
MNIST_TRAIN, MNIST_TEST = 15_000, 1500  # as many as Tiny ImageNet's 30 classes have


class TaskError(ValueError):
    """Data or a model that is not there, or not of the right kind; the message says what to do."""


class Source(Protocol):
    """Labelled images."""

    @property
    def labels(self) -> Tensor:
        """Labels (count,), in order."""
        ...

    def batches(self, plan: Sequence[Tensor]) -> Iterator[Batch]:
        """Images (n, channels, h, w) and labels (n,) of each batch of rows."""
        ...


@dataclass(frozen=True)
class Memory:
    """Images that are tensors already, (count, channels, h, w) float32, and labels (count,)."""

    images: Tensor
    labels: Tensor

    def batches(self, plan: Sequence[Tensor]) -> Iterator[Batch]:
        """Images and labels of each batch of rows."""
        return ((self.images[rows], self.labels[rows]) for rows in plan)


@dataclass(frozen=True)
class Subset:
    """Some rows of a source."""

    source: Source
    rows: Tensor

    @classmethod
    def whole(cls, source: Source) -> Subset:
        """All rows."""
        return cls(source, torch.arange(len(source.labels)))

    @property
    def labels(self) -> Tensor:
        """Labels in order."""
        return self.source.labels[self.rows]

    def drawn(self, steps: int, batch: int, seed: int) -> Iterator[Batch]:
        """`steps` batches drawn with replacement, in an order that the seed fixes."""
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(self.rows), (steps, batch), generator=generator)
        return self.source.batches(list(self.rows[picks]))

    def in_order(self, batch: int) -> Iterator[Batch]:
        """Every image once."""
        return self.source.batches(torch.split(self.rows, batch))

    def cut(self, share: float, seed: int) -> tuple[Subset, Subset]:
        """Most of the rows, and a share of them apart, every class in its proportion."""
        most, apart = train_test_split(range(len(self.rows)), test_size=share, stratify=self.labels, random_state=seed)
        return Subset(self.source, self.rows[most]), Subset(self.source, self.rows[apart])


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        words: what was used as model and data, for the report.
        model: pre-trained, on its device; its head is replaced before each run.
        head: the name of the linear layer that gives the logits.
        targets: what to adapt, query and value.
        train, test: test images are for the final figure only.
        identity: what the weights are, exactly; finished jobs of others are not taken up.
        device: "cpu" or "cuda".
    """

    words: str
    model: nn.Module
    head: str
    targets: tuple[str, ...]
    train: Subset
    test: Subset
    identity: str
    device: str = "cpu"

    @property
    def classes(self) -> int:
        """How many."""
        return int(self.train.source.labels.max()) + 1

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of each target."""
        tuned = attach(self.model, lora(1), self.targets)  # the library knows; the model is as before once it is detached
        found = dict(tuned.targets)
        tuned.detach()
        return found

    def new_head(self, seed: int) -> nn.Linear:
        """Put a new head on the model, its first values fixed by the seed."""
        old = self.model.get_submodule(self.head)
        assert isinstance(old, nn.Linear)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(old.in_features, self.classes)
        self.model.set_submodule(self.head, head.to(self.device))
        return head

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, classes), float32; in bfloat16 within on CUDA."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            out = self.model(images.to(self.device, non_blocking=True))
        found: Tensor = out if isinstance(out, Tensor) else out.logits
        return found.float()


def digits_task(cache: Path, recipe: DigitsRecipe = FULL, on_step: OnStep | None = None, device: str = "cpu") -> Task:
    """The demo's: a ViT pre-trained on printed digits (here, if `cache` does not hold it), to scikit-learn's scans."""
    model = pretrained(recipe, cache, on_step)
    train, test = Memory(*scanned_digits("train", size=recipe.size)), Memory(*scanned_digits("test", size=recipe.size))
    return Task(
        words="a ViT pre-trained on digits printed in matplotlib's fonts, adapted to scikit-learn's handwritten digits",
        model=model.to(device),
        head="classifier",
        targets=("q_proj", "v_proj"),
        train=Subset.whole(train),
        test=Subset.whole(test),
        identity=recipe.base_record(),
        device=device,
    )


def folder_task(folder: Path, domain: str, device: str) -> Task:
    """The data folder's: its ViT pre-trained on CIFAR-10, to Tiny ImageNet's 30 classes or to MNIST.

    Raises:
        TaskError: the folder lacks them, or there is no such domain.
    """
    if domain not in DOMAINS:
        raise TaskError(f"there is no domain '{domain}'; choose one of {', '.join(DOMAINS)}.")
    weights = folder / "weights_vit_cifar10" / "vit_cifar10.pth"
    for place in (weights, folder / domain):
        if not place.exists():
            raise TaskError(
                f"the data folder {folder} has no {place.relative_to(folder)}; give another --data (or SUPERLORA_DATA), "
                "or none: then printed digits are adapted to scikit-learn's."
            )
    model = Vit()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    name = "30 classes of Tiny ImageNet at 32x32" if domain == DOMAINS[0] else "MNIST at 32x32"
    size = sum(p.numel() for p in model.parameters())
    return Task(
        words=f"a ViT of {size:,} parameters pre-trained on CIFAR-10, adapted to {name}",
        model=model.to(device).eval(),
        head="mlp_head.1",
        targets=("q_proj", "v_proj"),
        train=_read(folder, domain, "train"),
        test=_read(folder, domain, "val"),
        identity=hashlib.sha256(weights.read_bytes()).hexdigest(),
        device=device,
    )


def _read(folder: Path, domain: str, split: str) -> Subset:
    """The domain's images, of MNIST the first ones."""
    if domain == DOMAINS[0]:
        return _normalised(*tiny_imagenet(folder, split))
    images, labels = mnist(folder, split == "train")
    most = MNIST_TRAIN if split == "train" else MNIST_TEST
    return _normalised(images[:most], labels[:most])


def _normalised(images: Tensor, labels: Tensor) -> Subset:
    """uint8 (n, h, w, 3) or (n, h, w) to what the ViT was trained on, (n, 3, 32, 32)."""
    pixels = images[..., None].expand(*images.shape, 3) if images.ndim == 3 else images
    scaled = ((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    if scaled.shape[-1] != 32:
        scaled = functional.interpolate(scaled, size=(32, 32), mode="bilinear", align_corners=False)
    return Subset.whole(Memory(scaled.contiguous(), labels))
