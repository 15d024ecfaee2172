"""What lies in a file: named tensors and a few words about them, read whole into memory within bounds. Nothing is run.

Three containers are known: safetensors, the zip that ``torch.save`` writes (of tensors alone, and only where PEFT's old
``adapter_model.bin`` is meant), and GGUF. Each is checked before its data are read, and a file that changes or ends while
it is read raises.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora_tn.files.bounds import Bounds, parse, shown
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.folder import content, opened

# Real adapters: 20,000 tensors, headers of a few MB (trainers put their tag counts there as one string), a few GB.
HEADER = Bounds(size=16 << 20, values=1_000_000, depth=8, text=16 << 20)
SETTINGS = Bounds(size=2 << 20, values=100_000, text=1 << 16)
MAX_TENSORS = 100_000
MAX_BYTES = 16 << 30
MAX_PICKLE = 4 << 30
MAX_AXES = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.uint8,
}


@dataclass(frozen=True)
class Container:
    """A file's tensors, and the strings that stand beside them."""

    path: Path
    bytes: int
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that holds one object.

    Raises:
        CheckpointError: there is none, it is too large, no JSON, or holds something else.
    """
    with opened_file(path) as file:
        data = content(file, SETTINGS.size)
    return _object(data, str(path), SETTINGS)


def _object(data: bytes, source: str, bounds: Bounds) -> dict[str, Any]:
    found = parse(data, source, bounds)
    if not isinstance(found, dict):
        raise CheckpointError(f"{source} holds {shown(found)}, expected an object of fields.")
    return found


def load(path: str | PathLike[str]) -> Container:
    """Read a container by its first bytes.

    Args:
        path: a .safetensors, .gguf, or PEFT's old adapter_model.bin.

    Raises:
        CheckpointError: not such a file, damaged, or out of bounds.
    """
    place = Path(path)
    with opened_file(place) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{place} has {size:,} bytes; adapters up to {MAX_BYTES:,} are read.")
        head = file.read(9)
        file.seek(0)
        if head[:4] == b"GGUF":
            return _gguf(place, content(file, MAX_BYTES))
        # A header's length can begin with the same bytes as a pickle, but then a brace follows it.
        if head[8:] != b"{" and (head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"):
            return _pickled(place, file)
        return _safetensors(place, file, size)


# --- safetensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file: bytes from `begin` to `end`, behind the header."""

    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def _safetensors(path: Path, file: BufferedReader, size: int) -> Container:
    places, metadata = _header(path, file, size)
    found = {name: _numbers(path, name, file, p) for name, p in sorted(places.items(), key=lambda one: one[1].begin)}
    return Container(path, size, {name: found[name] for name in places}, metadata)


def _header(path: Path, file: BufferedReader, size: int) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors are, and the words beside them; leaves the file at the first tensor."""
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(HEADER.size, size - 8):
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would have {length:,} bytes of the {size:,} there are "
            f"(at most {HEADER.size:,} are read). It is cut short, or of another kind."
        )
    header = _object(file.read(length), f"the header of {path}", HEADER)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' is not a table of strings.")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} names {len(header):,} tensors; at most {MAX_TENSORS:,} are read.")
    places = {name: _entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda one: (one[1].begin, one[1].end)):
        if place.begin != end:
            raise CheckpointError(f"{path}: the bytes of '{name}' do not follow those before it; it is damaged.")
        end = place.end
    if size - 8 - length != end:
        raise CheckpointError(f"{path} has {size - 8 - length:,} bytes of tensors, its header says {end:,}; it is cut short.")
    return places, metadata


def look(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a safetensors file's tensors, however large it is.

    Raises:
        CheckpointError: it is not such a file.
    """
    with opened_file(path) as file:
        places, _ = _header(path, file, os.fstat(file.fileno()).st_size)
        return {name: place.shape for name, place in places.items()}


def tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file.

    Raises:
        CheckpointError: it is not such a file, or has no such tensor.
    """
    with opened_file(path) as file:
        places, _ = _header(path, file, os.fstat(file.fileno()).st_size)
        if name not in places:
            raise CheckpointError(f"{path} has no tensor '{name}'.")
        file.seek(places[name].begin, os.SEEK_CUR)
        return _numbers(path, name, file, places[name])


@contextmanager
def opened_file(path: Path) -> Iterator[BufferedReader]:
    """`folder.opened`, with words where there is no file."""
    try:
        with opened(path) as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give a file or folder that is there.") from error


def _entry(path: Path, name: str, entry: Any) -> Place:
    """What the header says of one tensor, checked."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: '{name}' is of dtype {shown(dtype)}; known are {', '.join(DTYPES)}.")
    if shape is None or len(shape) > MAX_AXES or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{path}: '{name}' has no readable shape and place in its header.")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if size != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{path}: '{name}' of shape {shape} and dtype {dtype} needs {size:,} bytes, but its header gives it "
            f"{offsets[1] - offsets[0]:,}."
        )
    return Place(offsets[0], offsets[1], dtype, shape)


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers that a file may have as sizes or places."""
    good = isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_BYTES for v in value)
    return tuple(value) if good else None


def _numbers(path: Path, name: str, file: BufferedReader, place: Place) -> Tensor:
    if place.begin == place.end:
        return torch.empty(place.shape, dtype=DTYPES[place.dtype])
    data = bytearray(place.end - place.begin)
    if file.readinto(data) != len(data):
        raise CheckpointError(f"{path} ended within '{name}'; it was changed while it was read.")
    return _narrow(torch.frombuffer(data, dtype=DTYPES[place.dtype]).reshape(place.shape))


def _narrow(tensor: Tensor) -> Tensor:
    """Eight-bit floats as float16, which holds each of them; torch has no arithmetic for them."""
    return tensor.to(torch.float16) if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else tensor


# --- torch's zip ----------------------------------------------------------------------------------------------------


def _pickled(path: Path, file: BufferedReader) -> Container:
    if path.name != "adapter_model.bin":
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is opened; only PEFT's adapter_model.bin is read, and of it "
            "tensors alone. Have the file's author save it as safetensors."
        )
    data = content(file, MAX_PICKLE)
    size = len(data)
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a file of tensors alone ({str(error).splitlines()[:1]}).") from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and type(v) is Tensor for k, v in found.items()):
        raise CheckpointError(f"{path} holds more than named tensors; only these are read.")
    for name, tensor in found.items():
        # A tensor may claim any shape by strides of 0.
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.numel() * tensor.itemsize > size:
            raise CheckpointError(f"{path}: '{name}' is no plain tensor that lies in this file.")
    return Container(path, size, {name: tensor.detach().contiguous() for name, tensor in found.items()}, {})


# --- GGUF -----------------------------------------------------------------------------------------------------------

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
GGUF_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
GGUF_TOKENS = "token_embd"  # how the name of a token table ends
MAX_NAME = 1 << 16
MAX_FIELDS = 1 << 12


class _Cursor:
    """Numbers and strings out of bytes, one after another."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if not 0 <= size <= len(self.data) - self.at:
            raise CheckpointError(f"{self.path} ends within its header; it is cut short.")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        """One number by its struct code."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        """A counted string."""
        size = self.number("<Q")
        if size > MAX_NAME:
            raise CheckpointError(f"{self.path} has a name of {size:,} bytes; at most {MAX_NAME:,} are read.")
        return self.take(size).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """One value of a field; arrays are passed over, as no adapter needs one."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SCALARS:
                self.take(count * struct.calcsize(_SCALARS[inner]))
            elif inner == _STRING and count <= MAX_TENSORS:
                for _ in range(count):
                    self.string()
            else:
                raise CheckpointError(f"{self.path} holds an array that no adapter has.")
            return f"[{count} values]"
        raise CheckpointError(f"{self.path} holds a field of the unknown type {kind}.")


def _gguf(path: Path, data: bytes) -> Container:
    cursor = _Cursor(path, data)
    cursor.take(4)
    version, tensors, fields = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in (2, 3) or tensors > MAX_TENSORS or fields > MAX_FIELDS:
        raise CheckpointError(f"{path} is GGUF {version} with {tensors:,} tensors and {fields:,} fields; out of bounds.")
    metadata: dict[str, str] = {}
    for _ in range(fields):
        name = cursor.string()
        metadata[name] = str(cursor.value(cursor.number("<I")))
    entries = [_gguf_entry(cursor) for _ in range(tensors)]
    unit = metadata.get("general.alignment", "32")
    alignment = int(unit) if unit.isdigit() and 1 <= int(unit) <= 1 << 16 else 32
    start = -(-cursor.at // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        if kind not in GGUF_DTYPES:
            raise CheckpointError(f"{path}: '{name}' is quantised (GGUF type {kind}); an adapter is of F32, F16 or BF16.")
        size = math.prod(shape) * GGUF_DTYPES[kind].itemsize
        if name in found or start + offset + size > len(data):
            raise CheckpointError(f"{path}: '{name}' is there twice, or its bytes are not all there; it is damaged.")
        place = bytearray(data[start + offset : start + offset + size])
        found[name] = torch.frombuffer(place, dtype=GGUF_DTYPES[kind]).reshape(shape)
    return Container(path, len(data), found, metadata)


def _gguf_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape as torch writes it, type, offset) of one tensor."""
    name, axes = cursor.string(), cursor.number("<I")
    sizes = [cursor.number("<Q") for _ in range(axes)] if axes <= MAX_AXES else []
    if not sizes or not all(1 <= s <= MAX_BYTES for s in sizes):
        raise CheckpointError(f"{cursor.path}: '{name}' has {axes} axes of sizes {sizes}; out of bounds.")
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    return name, tuple(reversed(sizes)), kind, offset
