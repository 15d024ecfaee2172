"""An adapter as two files: ``adapter.safetensors`` (the nodes) and ``adapter.json`` (what they are). No pickle.

The JSON is the truth: it names the tensors' file by its SHA-256 and carries a digest of itself. The tensors are
written first and the JSON last, each by an atomic rename, and the old tensors stay beside them as
``adapter.safetensors.previous`` until the new JSON stands. So whenever a save is interrupted, the JSON that is there
matches one of the tensor files that are there, and loading gives the old adapter or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import SpecError
from superlora_tn.network.graph import GraphNode
from superlora_tn.network.spec import AdapterSpec

SCHEMA = 1
FORMAT = "superlora_tn adapter"
FIELDS = ("format", "schema", "spec", "targets", "tensors_sha256", "digest")
MAX_JSON = 64 << 20
FLOATS = {"F64", "F32", "F16", "BF16"}


class CheckpointError(ValueError):
    """Files that are not an intact adapter, or not one for this base."""


@dataclass(frozen=True)
class Saved:
    """A checked adapter on disk, its tensors not yet read."""

    spec: AdapterSpec
    targets: Mapping[str, Shape]
    tensors: Path

    def load(self) -> dict[str, Tensor]:
        """The nodes, by ``group<k>.<node>``."""
        return load_file(self.tensors)


def tensor_name(group: int, node: GraphNode) -> str:
    """Under which name a node of a group is kept."""
    return f"group{group}.{node.name}"


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: str | PathLike[str], spec: AdapterSpec, targets: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> None:
    """Write both files so that an interruption at any point leaves a loadable adapter.

    Args:
        folder: made where it does not exist.
        spec: the declaration.
        targets: adapted weights, name -> (out, in).
        tensors: the nodes, by ``group<k>.<node>``.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    packed = save({name: t.contiguous().cpu() for name, t in tensors.items()})
    body: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "spec": spec.to_dict(),
        "targets": {name: list(shape) for name, shape in targets.items()},
        "tensors_sha256": hashlib.sha256(packed).hexdigest(),
    }
    body["digest"] = _digest(body)
    file, previous = place / "adapter.safetensors", place / "adapter.safetensors.previous"
    _write_new(place / "adapter.safetensors.new", packed)
    _write_new(place / "adapter.json.new", (json.dumps(body, indent=1) + "\n").encode())
    # A save cut short before may have left `previous` as the only match of the JSON; then it is the one to keep.
    if file.exists() and not (previous.exists() and _is_recorded(place, previous)):
        previous.unlink(missing_ok=True)
        _link(file, previous)
    os.replace(place / "adapter.safetensors.new", file)
    os.replace(place / "adapter.json.new", place / "adapter.json")
    previous.unlink(missing_ok=True)


def _link(file: Path, beside: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        os.link(file, beside)
    except OSError:
        shutil.copyfile(file, beside)


def _is_recorded(place: Path, tensors: Path) -> bool:
    try:
        recorded = json.loads((place / "adapter.json").read_bytes()).get("tensors_sha256")
    except (OSError, ValueError, AttributeError):
        return False
    return bool(recorded == _sha256(tensors))


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: str | PathLike[str]) -> Saved:
    """Check an adapter on disk completely, reading only headers and hashes.

    Raises:
        CheckpointError: with the file, what was found and what was expected.
    """
    place = Path(folder)
    body = _read_json(place / "adapter.json")
    try:
        spec = AdapterSpec.from_dict(body["spec"])
        targets = _targets(body["targets"])
        wanted = {
            tensor_name(k, node): node.shape for k, (_, graph) in enumerate(spec.lay_out(targets)) for node in graph.nodes
        }
    except SpecError as error:
        raise CheckpointError(f"{place / 'adapter.json'}: {error}") from error
    tensors = _find_tensors(place, body["tensors_sha256"])
    _check_shapes(tensors, wanted)
    return Saved(spec, targets, tensors)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a saved adapter is adapter.json and adapter.safetensors.")
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; an adapter's JSON has at most {MAX_JSON:,}.")
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it is damaged or cut short.") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not say format={FORMAT!r}; it is not an adapter of this library.")
    schema = body.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise CheckpointError(f"{path} has schema={schema!r}; expected a whole number up to {SCHEMA}.")
    if schema > SCHEMA:
        raise CheckpointError(f"{path} has schema {schema}, this version reads up to {SCHEMA}; upgrade superlora_tn.")
    if set(body) != set(FIELDS):
        raise CheckpointError(f"{path} has the fields {sorted(body)}, expected {sorted(FIELDS)}.")
    if body["digest"] != _digest(body):
        raise CheckpointError(f"{path} does not match its own digest; it was edited or damaged.")
    return body


def _targets(data: Any) -> dict[str, Shape]:
    if not isinstance(data, dict) or not data:
        raise SpecError("targets must be a dict of name -> [out, in] with at least one entry.")
    if not all(isinstance(shape, list) and len(shape) == 2 for shape in data.values()):
        raise SpecError("targets must give [out, in] for each name.")
    return {name: (shape[0], shape[1]) for name, shape in data.items()}


def _find_tensors(place: Path, wanted: Any) -> Path:
    file, previous = place / "adapter.safetensors", place / "adapter.safetensors.previous"
    if not file.is_file() and not previous.is_file():
        raise CheckpointError(f"{file} is missing; a saved adapter is adapter.json and adapter.safetensors.")
    for candidate in (file, previous):
        if candidate.is_file() and _sha256(candidate) == wanted:
            return candidate
    raise CheckpointError(
        f"{file} is not the file that adapter.json was written with (SHA-256 differs); it is damaged or foreign."
    )


def _check_shapes(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: tuple(one.get_shape()) for name, one in slices.items()}
            dtypes = {one.get_dtype() for one in slices.values()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}).") from error
    if len(dtypes) > 1 or not dtypes <= FLOATS:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(dtypes))}; an adapter is of one dtype of {', '.join(sorted(FLOATS))}."
        )
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{path} lacks the tensor '{name}' of shape {wanted[name]}.")
        if name not in wanted:
            raise CheckpointError(f"{path} holds the tensor '{name}', which the declaration does not have.")
        if found[name] != wanted[name]:
            raise CheckpointError(f"{path}: tensor '{name}' has shape {found[name]}, expected {wanted[name]}.")
