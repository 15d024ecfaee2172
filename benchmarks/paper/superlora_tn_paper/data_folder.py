"""Readers of the data folder: raw images, uint8, and labels, int64."""

from __future__ import annotations

import gzip
import io
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Images = tuple[Tensor, Tensor]


def mnist(folder: Path, train: bool) -> Images:
    """MNIST's own files: images (n, 28, 28)."""
    name = "train" if train else "t10k"

    def read(ending: str, header: int) -> Tensor:
        data = gzip.decompress((folder / "mnist" / f"{name}-{ending}-ubyte.gz").read_bytes())
        return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header)

    return read("images-idx3", 16).view(-1, 28, 28), read("labels-idx1", 8).long()


def tiny_imagenet(folder: Path, split: str) -> Images:
    """30 classes of Tiny ImageNet, "train" or "val", (n, 32, 32, 3): one contact sheet a class, `cols` images a row."""
    pack = np.load(folder / "tinyimagenet30" / f"tin30_32px_{split}_sheets.npz")
    blob, borders, count, columns = pack["blob"].tobytes(), pack["offsets"], int(pack["per_class"]), int(pack["cols"])
    images = []
    for start, end in itertools.pairwise(borders):
        sheet = torch.from_numpy(np.array(Image.open(io.BytesIO(blob[start:end]))))
        images.append(sheet.view(count // columns, 32, columns, 32, 3).transpose(1, 2).reshape(count, 32, 32, 3))
    return torch.cat(images), torch.arange(len(images)).repeat_interleave(count)


def svhn(folder: Path) -> Images:
    """The first 1,083 training images of SVHN: (n, 32, 32, 3)."""
    pack = np.load(folder / "svhn_train1083" / "svhn_train_first1083.npz")
    return torch.from_numpy(pack["x"]), torch.from_numpy(pack["y"]).long()
