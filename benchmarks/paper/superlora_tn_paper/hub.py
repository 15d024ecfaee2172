"""The paper's size: a ViT and images by their names on the Hugging Face hub, or from local folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, ViTForImageClassification

from superlora_tn import AttachError, match
from superlora_tn_paper.task import Batch, Subset, Task, TaskError

MODEL, DATA = "google/vit-base-patch16-224-in21k", "uoft-cs/cifar100"
WORKERS = 8  # processes that decode and resize images for a GPU
QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"))  # transformers 5, and before


@dataclass(frozen=True)
class Preparation:
    """Turns rows of a data set into a batch; a loader's processes carry it along."""

    processor: Any
    image: str
    label: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Images (n, 3, h, w) as the model wants them, and labels (n,)."""
        pixels = self.processor([row[self.image].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor([row[self.label] for row in rows])


@dataclass(frozen=True)
class Hub:
    """One split of a data set, read and prepared batch by batch."""

    rows: Any
    labels: Tensor
    prepare: Preparation
    workers: int

    def batches(self, plan: Sequence[Tensor]) -> Iterator[Batch]:
        """Images and labels of each batch of rows."""
        picks = [rows.tolist() for rows in plan]
        return iter(
            DataLoader(
                self.rows,
                batch_sampler=picks,
                collate_fn=self.prepare,
                num_workers=min(self.workers, len(picks)),
                pin_memory=self.workers > 0,
            )
        )


def hub_task(model: str, data: str, device: str) -> Task:
    """A ViT for image classification with a new head for the data set's classes.

    Args:
        model: what `ViTForImageClassification.from_pretrained` takes: a folder or a hub name.
        data: what `datasets.load_dataset` takes: a folder (images by class, parquet, or saved to disk) or a hub name.
        device: "cpu" or "cuda".

    Raises:
        TaskError: either cannot be loaded, or is not of the right kind.
    """
    sets = _load_data(data)
    train = sets["train"]
    test = next((sets[name] for name in ("test", "validation") if name in sets), None)
    if test is None:
        raise TaskError(f"the data set '{data}' has the splits {', '.join(sets)}; it needs 'train' and 'test'.")
    image, label, classes = _columns(data, train.features)
    network, processor = _load_model(model, classes)
    prepare = Preparation(processor, image, label)
    workers = WORKERS if device == "cuda" else 0
    tasks = [Subset.whole(Hub(rows, torch.tensor(rows[label][:]), prepare, workers)) for rows in (train, test)]
    return Task(
        words=f"{model}, adapted to {data}",
        model=network.to(device).eval(),
        head="classifier",
        targets=_targets(network),
        train=tasks[0],
        test=tasks[1],
        identity=f"{model} {data}",
        device=device,
    )


def _load_data(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(f"--scale full needs the package datasets: pip install 'superlora_tn[reproduce]' ({error}).") from error
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the package raises of many kinds
        raise TaskError(_unreachable("the data set", name, "--data", "load_dataset", error)) from error
    if "train" not in found:
        raise TaskError(f"the data set '{name}' has the splits {', '.join(found)}; it needs 'train' and 'test'.")
    return found


def _load_model(name: str, classes: int) -> tuple[Any, Any]:
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model = ViTForImageClassification.from_pretrained(name, num_labels=classes, ignore_mismatched_sizes=True)
    except Exception as error:  # network, files, shapes: the package raises of many kinds
        raise TaskError(_unreachable("the model", name, "--model", "from_pretrained", error)) from error
    return model, processor


def _unreachable(what: str, name: str, option: str, call: str, error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return (
        f"{what} '{name}' cannot be loaded ({first}). Check the name and the network, or download it where there is one "
        f"and give its folder: {option} FOLDER (anything that {call} reads)."
    )


def _columns(name: str, features: Any) -> tuple[str, str, int]:
    """The image column, the finest label column, and how many classes it has."""
    import datasets

    images = [n for n, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = {n: kind.num_classes for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    if not images or not labels:
        raise TaskError(f"the data set '{name}' has the columns {', '.join(features)}; it needs an Image and a ClassLabel.")
    label = max(labels, key=labels.__getitem__)
    return images[0], label, labels[label]


def _targets(model: Any) -> tuple[str, ...]:
    for names in QUERY_VALUE:
        try:
            match(model, names)
        except AttachError:
            continue
        return names
    raise TaskError(f"the model {type(model).__name__} has no query and value layers named as in {QUERY_VALUE}.")
