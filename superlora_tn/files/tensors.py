"""The tensors' file of an adapter: safetensors, its header bounded and compared before anything is taken for true."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from superlora_tn.files.bounds import Bounds, parse, shown
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.whole import whole

BOUNDS = Bounds(size=16 << 20, values=1_000_000, depth=8)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of nodes; of the base's buffers also the others."""
STORED = {
    **FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Shapes = Mapping[str, tuple[int, ...]]


def packed(source: str, nodes: Mapping[str, Tensor], buffers: Mapping[str, Tensor], declared: Shapes) -> bytes:
    """The bytes of a file that holds these tensors.

    Args:
        source: what an error calls it.
        nodes: as declared.
        buffers: of any shape.
        declared: the nodes' shapes.

    Raises:
        CheckpointError: a node that is missing, foreign or of another shape, or a tensor that no file can hold.
    """
    check_names(source, set(nodes), set(declared))
    copies = {name: whole(name, nodes[name], shape, FLOATS.values()) for name, shape in declared.items()}
    data = save(copies | {name: whole(name, tensor, None, STORED.values()) for name, tensor in buffers.items()})
    _header(source, data)  # what would not be read is not written
    return data


def unpacked(path: str, data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a file.

    Raises:
        CheckpointError: they are not a whole safetensors file.
    """
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}).") from error


def check_shapes(path: str, data: bytes, nodes: Shapes, buffers: Shapes) -> None:
    """Compare a file's header with what the declaration and the base's buffers need.

    Raises:
        CheckpointError: a tensor that is missing, foreign, or of another shape or dtype.
    """
    header, wanted = _header(path, data), {**nodes, **buffers}
    check_names(path, set(header), set(wanted))
    floats, stored = list(FLOATS), list(STORED)  # lists: what is no string cannot be hashed
    for name, shape in wanted.items():
        entry = header[name]
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{path}: tensor '{name}' is described as {shown(entry)}, not by dtype, shape and offsets.")
        known = floats if name in nodes else stored
        if entry["dtype"] not in known:
            raise CheckpointError(f"{path}: tensor '{name}' is {shown(entry['dtype'])}; expected one of {', '.join(known)}.")
        if entry["shape"] != list(shape):
            raise CheckpointError(f"{path}: tensor '{name}' has shape {_shape(entry['shape'])}, expected {shape}.")


def check_names(source: str, found: set[str], wanted: set[str]) -> None:
    """Refuse tensors that are missing or foreign.

    Raises:
        CheckpointError: with the first of them.
    """
    if missing := wanted - found:
        raise CheckpointError(f"{source} lacks the tensor '{min(missing)}', which the declaration has.")
    if foreign := found - wanted:
        raise CheckpointError(f"{source} holds the tensor {shown(min(foreign))}, which the declaration does not have.")


def _header(path: str, data: bytes) -> dict[str, Any]:
    """What a safetensors file says of its tensors: eight bytes of length, then JSON."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= size <= min(BOUNDS.size, len(data) - 8):
        raise CheckpointError(f"{path} is not a readable safetensors file (its header is said to have {size:,} bytes).")
    try:
        header = parse(data[8 : 8 + size], "its header", BOUNDS)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a readable safetensors file (its header is no dict).")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _shape(given: Any) -> str:
    return shown(tuple(given) if isinstance(given, list) else given)
