"""An adapter as two files: ``adapter.json`` (what it is) and ``adapter-<hash>.safetensors`` (its numbers). No pickle.

The JSON is the truth: it names the tensors' file by its SHA-256, carries a digest of itself, and is replaced as the one
commit (`folder`), so a reader never mixes two adapters: what it read has the hash that the JSON says, or it reads again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import BufferedReader
from os import PathLike
from pathlib import Path

from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.rows import Span
from superlora_tn.files.errors import CheckpointError, DiskError
from superlora_tn.files.folder import JSON, check_folder, commit, content, opened, place_of
from superlora_tn.files.record import (
    BOUNDS,
    Entry,
    Record,
    buffer_name,
    buffers_of,
    entries_of,
    file_name,
    marked,
    most_bytes,
    nodes_of,
    owned,
    record_of,
    tensor_name,
    written,
)
from superlora_tn.files.tensors import BOUNDS as HEADER
from superlora_tn.files.tensors import check_shapes as _check_shapes
from superlora_tn.files.tensors import packed, unpacked
from superlora_tn.network.spec import AdapterSpec

__all__ = ["CheckpointError", "DiskError", "Entry", "Saved", "marked", "read", "tensor_name", "write"]

TRIES, STILL = 100, 3
"""How often a reader begins anew where savers overtake it, and how often where the JSON has not changed."""


@dataclass(frozen=True)
class Saved:
    """A checked adapter, read into memory.

    Attributes:
        entries: the declarations, each for targets of its own.
        tensors: the nodes, by `tensor_name`, each of the dtype it was saved in.
        buffers: buffers of the base, by their full names.
    """

    entries: tuple[Entry, ...]
    tensors: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    @property
    def spec(self) -> AdapterSpec:
        """The declaration, where there is one only.

        Raises:
            CheckpointError: there are several.
        """
        if len(self.entries) != 1:
            raise CheckpointError(f"this adapter has {len(self.entries)} declarations; look at its entries one by one.")
        return self.entries[0].spec

    @property
    def targets(self) -> dict[str, Shape]:
        """The adapted weights of all entries, name -> (out, in)."""
        return {name: shape for entry in self.entries for name, shape in entry.targets.items()}

    @property
    def tables(self) -> frozenset[str]:
        """Those targets that are known to be embeddings' tables."""
        return frozenset(name for entry in self.entries for name in entry.tables)

    @property
    def rows(self) -> dict[str, Span]:
        """Which rows of their layers those targets are that are blocks."""
        return {name: span for entry in self.entries for name, span in entry.rows.items()}


def check_part(source: str | PathLike[str], part: str | None) -> None:
    """Raise `CheckpointError` where a part is asked of an adapter of this library: it has none."""
    if part is not None:
        raise CheckpointError(f"{source} is of this library and has no parts; leave part={part!r} out.")


class _Overtaken(CheckpointError):
    """The JSON's tensors are not there, or no longer, as where a saver replaced both meanwhile."""


def write(
    folder: str | PathLike[str],
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] = {},
) -> None:
    """Save an adapter; whatever interrupts it, a loadable adapter stands in the folder, the old one or the new one.

    Any number of threads and processes may save into one folder while others read. A tensor that is sharded (DTensor)
    is gathered, so all its processes have to save.

    Args:
        folder: made where it does not exist.
        entries: the declarations, each for targets of its own.
        tensors: the nodes, by `tensor_name`, of any floating dtypes.
        buffers: buffers of the base that are saved with the adapter, by their full names.

    Raises:
        CheckpointError: tensors that do not fit the declarations or cannot be saved, or more than would be read again.
        DiskError: the folder or the disk refuses.
    """
    place = place_of(folder)
    check_folder(place, "this library's own format")
    source = f"what is saved to {place}"
    prefixed = {buffer_name(name): tensor for name, tensor in buffers.items()}
    data = packed(source, tensors, prefixed, nodes_of(source, entries))
    sha256 = hashlib.sha256(data).hexdigest()
    text = written(source, entries, {name: tuple(tensor.shape) for name, tensor in buffers.items()}, sha256)
    commit(place, file_name(sha256), data, text, owned)


def read(folder: str | PathLike[str]) -> Saved:
    """Read an adapter and check it completely, whoever saves into the folder meanwhile.

    Raises:
        CheckpointError: with the file, what was found and what was expected.
    """
    place = place_of(folder)
    seen, still = b"", 0
    for _ in range(TRIES):
        text = _read_json(place)
        still = still + 1 if text == seen else 0
        seen = text
        try:
            return _read(place, record_of(str(place / JSON), text))
        except _Overtaken:
            if still == STILL:
                raise
            time.sleep(0.01 * still)
    raise CheckpointError(f"{place} was saved to {TRIES} times while it was read; read it again.")


def _read_json(place: Path) -> bytes:
    try:
        with opened(place / JSON) as file:
            return content(file, BOUNDS.size)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{place / JSON} is missing; a saved adapter is adapter.json and the adapter-<hash>.safetensors that it names."
        ) from error


def _read(place: Path, record: Record) -> Saved:
    with ExitStack() as stack:
        # Opened before all work that takes time: an opened file stays, whoever removes its name.
        files = _open(place, record, stack)
        entries = entries_of(record)
        nodes = nodes_of(record.source, entries)
        buffers = {buffer_name(name): shape for name, shape in buffers_of(record).items()}
        path, data = _find(files, HEADER.size + 8 + most_bytes({**nodes, **buffers}), record)
    _check_shapes(path, data, nodes, buffers)
    tensors = unpacked(path, data)
    return Saved(
        entries,
        {name: tensor for name, tensor in tensors.items() if name in nodes},
        {name.removeprefix(buffer_name("")): tensors[name] for name in buffers},
    )


def _open(place: Path, record: Record, stack: ExitStack) -> list[BufferedReader]:
    """The files that may be the tensors', as many as there are."""
    files = []
    for name in record.tensors:
        with suppress(FileNotFoundError):
            files.append(stack.enter_context(opened(place / name)))
    if not files:
        raise _Overtaken(f"{place / record.tensors[0]} is missing; {record.source} names it for its tensors.")
    return files


def _find(files: Sequence[BufferedReader], most: int, record: Record) -> tuple[str, bytes]:
    """The one file that has the record's hash, and its bytes."""
    refused: CheckpointError | None = None
    for file in files:
        try:
            data = content(file, most)
        except CheckpointError as error:
            refused = error
            continue
        if hashlib.sha256(data).hexdigest() == record.sha256:
            return str(file.name), data
    # A name with a hash is given to the bytes of that hash only; in the first schema a saver may have been half way.
    kind = _Overtaken if record.schema == 1 else CheckpointError
    raise refused or kind(
        f"{files[0].name} is not the file that {record.source} was written with (SHA-256 differs); it is damaged or foreign."
    )
