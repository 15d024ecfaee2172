"""Saved adapters to be read, damaged and signed again, and processes that save; what the tests of files share."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import struct
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DIM, TARGETS, Tiny, assert_untouched, bounded, noise, perturb, seeded, snapshot
from safetensors.torch import load_file
from safetensors.torch import save as packed
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.files.folder import OLD
from superlora_tn.files.own import Entry, read, write

JSON = "adapter.json"
SPEC = sl.lotr(2, alpha=4)
LONG = 60.0
"""Seconds after which a test says that something hangs; each takes far less."""


def save(folder: Path, spec: sl.AdapterSpec = SPEC, seed: int = 0) -> nn.Module:
    """A trained adapter in a folder; returns its model."""
    model = seeded(0, Tiny)
    tuned = sl.attach(model, spec, TARGETS, seed=seed)
    perturb(tuned, seed)
    tuned.save(folder)
    return model


def save_value(folder: Path, value: float, size: int = 4) -> None:
    """A small adapter without a model, told by one number: alpha and all values are it."""
    nodes = {"group0.factor_out": torch.full((size, 1), value), "group0.factor_in": torch.full((size, 1), value)}
    write(folder, [Entry(sl.lora(1, alpha=value), {"0": (size, size)})], nodes)


def value_of(folder: Path) -> float:
    """The number of `save_value`; that all of the adapter says the same is checked."""
    found = read(folder)
    values = {float(v) for tensor in found.tensors.values() for v in tensor.flatten()} | {found.spec.alpha}
    assert len(values) == 1, f"a mixture of the adapters {values}"
    return values.pop()


def names(folder: Path) -> list[str]:
    """All files of a folder, drafts too."""
    return sorted(p.name for p in folder.iterdir())


def body_of(folder: Path) -> dict[str, Any]:
    """The JSON's fields."""
    body = json.loads((folder / JSON).read_text())
    assert isinstance(body, dict)
    return body


def tensors_of(folder: Path) -> Path:
    """The file that the JSON names for its tensors."""
    return folder / body_of(folder)["tensors"]


def digest(body: dict[str, Any]) -> str:
    """The digest of a JSON's fields, written apart from the library: files of today are read by later versions."""
    rest = {name: value for name, value in body.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def edit_json(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Change the JSON; with `sign`, give it the right digest again, as someone who knows the format would."""
    body = body_of(folder)
    change(body)
    if sign:
        body["digest"] = digest(body)
    (folder / JSON).write_text(json.dumps(body))


def edit_entry(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the first declaration, spec or targets, and sign."""
    edit_json(folder, lambda body: change(body["entries"][0]))


def put_tensors(folder: Path, data: bytes) -> None:
    """Any bytes as the tensors' file, named and signed as if they were meant."""
    tensors_of(folder).unlink()
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / f"adapter-{sha256[:16]}.safetensors").write_bytes(data)
    edit_json(folder, lambda body: body.update(tensors=f"adapter-{sha256[:16]}.safetensors", tensors_sha256=sha256))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and sign them again."""
    tensors = load_file(tensors_of(folder))
    change(tensors)
    put_tensors(folder, packed(tensors))


def make_first(folder: Path) -> None:
    """Make a folder what the first schema would have written."""
    body, data = body_of(folder), tensors_of(folder).read_bytes()
    tensors_of(folder).unlink()
    (folder / "adapter.safetensors").write_bytes(data)
    [entry] = body["entries"]
    body = {"format": body["format"], "schema": 1, **entry, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    (folder / JSON).write_text(json.dumps({**body, "digest": digest(body)}, indent=1))


def with_header(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file of this header; with `size`, one that says its header has so many bytes."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def output_of(folder: Path) -> bytes:
    """What the tiny model computes with the adapter."""
    model = seeded(0, Tiny)
    sl.load(model, folder)
    return model(noise(2, 3, DIM)).detach().numpy().tobytes()


def refuse(folder: Path, *words: str, model: nn.Module | None = None) -> None:
    """Loading raises CheckpointError with these words, in bounded work, and leaves the model alone."""
    model = model or seeded(0, Tiny)
    before = snapshot(model)
    with bounded(400_000), pytest.raises(sl.CheckpointError) as caught:
        sl.load(model, folder)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 4000
    assert_untouched(model, before)


def two_files(folder: Path) -> list[str]:
    """The names of an adapter's files, as `names` gives them where there is nothing else."""
    return sorted([JSON, tensors_of(folder).name])


def make_old(folder: Path, seconds: float = OLD + 60) -> None:
    """As if all files of a folder had been written so long ago."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def forked(*works: Callable[[], None]) -> list[BaseProcess]:
    """Processes that do these works, started. They share the test's memory as it is now."""
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads: ours hold no lock
        processes = [context.Process(target=work, daemon=True) for work in works]
        for process in processes:
            process.start()
    return processes


def join(processes: list[BaseProcess]) -> None:
    """Wait for processes, each of which has to end well."""
    for process in processes:
        process.join(LONG)
        assert process.exitcode == 0
