"""What a run has finished, on disk, so that a killed run goes on where it stopped, and several processes can share its jobs."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora_tn.demo.whole_file import whole_file

Data = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """The finished jobs of one run: one JSON file a job, written whole or not at all.

    Args:
        folder: made where it does not exist.
        recipe: every setting the jobs depend on, as plain data; jobs of another recipe are not seen.
    """

    folder: Path
    recipe: Mapping[str, Any]

    def path(self, job: str, ending: str = "json") -> Path:
        """Where a job's file is; other files of the job (weights, images) may lie beside it under another ending."""
        key = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:8]
        place = self.folder / key
        place.mkdir(parents=True, exist_ok=True)
        return place / f"{job}.{ending}"

    def get(self, job: str, make: Callable[[], Data]) -> Data:
        """The job's result: read where it is finished, else made and kept."""
        path = self.path(job)
        if path.is_file():
            found: Data = json.loads(path.read_text())
            return found
        start = time.perf_counter()
        result = make()
        write_json(path, {**result, "seconds": round(time.perf_counter() - start, 2)})
        return self.get(job, make)


class Elsewhere(Exception):
    """Another process is at a job that is needed first."""


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Hold a job's lock, which ends with the process that holds it.

    Raises:
        Elsewhere: another process holds it.
    """
    with place.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Elsewhere(place.stem) from None
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def packed(images: Tensor) -> Data:
    """uint8 images as plain data."""
    return {"shape": list(images.shape), "bytes": base64.b64encode(images.contiguous().numpy().tobytes()).decode()}


def unpacked(data: Data) -> Tensor:
    """The images that `packed` was given."""
    return torch.frombuffer(bytearray(base64.b64decode(data["bytes"])), dtype=torch.uint8).reshape(data["shape"])


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write data, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")
