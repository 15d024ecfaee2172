"""What stands where an adapter would be written: nothing is replaced that is another thing, unless the user says so."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from superlora_tn.files.container import look, opened_file
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.folder import JSON, TENSORS, place_of
from superlora_tn.files.forms import foreign_method, split_key
from superlora_tn.files.own import Saved
from superlora_tn.files.own import read as read_own
from superlora_tn.files.peft import CONFIG
from superlora_tn.files.peft import TENSORS as PEFT_TENSORS
from superlora_tn.files.whole import whole
from superlora_tn.files.writes import FILES, FORMATS

# Where GGUF says that a file is an adapter: among its first strings.
GGUF_HEAD, GGUF_WORD = 1 << 20, b"adapter.type"


def check_replaceable(source: str | PathLike[str], target: str | PathLike[str], to: str) -> None:
    """Raise where writing would replace what is no adapter, the source itself, or the adapter of another format.

    Raises:
        CheckpointError: it would; the message says what stands there.
    """
    place, read = place_of(target), place_of(source)
    if place.is_dir():
        other = next((format for format in FORMATS if format != to and _files(place, format)), None)
        if other is not None:
            held = _files(place, other)[0].name
            raise CheckpointError(
                f"{place} holds an adapter in the format {other} ({held}), and of one in the format {to} beside it only one "
                "would be read; name another folder, or replace it (force=True)."
            )
        files = _files(place, to)
    else:
        files = [place] if place.is_file() else []
    if to == "superlora":
        return  # a folder, whose save replaces an adapter of its own alone
    if read.exists() and any(file.samefile(read) for file in (place, *files) if file.exists()):
        raise CheckpointError(f"{place} is what is read, too; name another, or replace it (force=True).")
    for file in files:
        if file.name != CONFIG and not _is_adapter(file):
            raise CheckpointError(f"{file} is there and holds no adapter; name another, or replace it (force=True).")


def check_same(target: str | PathLike[str], now: Saved) -> None:
    """Raise where the folder of a target holds an adapter of this library's own that is another one (other declarations, nodes
    or values of the base that trained along): it would be read, whatever other formats lie beside it.

    Raises:
        CheckpointError: it does, or it is damaged.
    """
    place = place_of(target)
    if not (place / JSON).is_file():
        return
    found = read_own(place)
    same = found.entries == now.entries and _equal(found.tensors, now.tensors) and _equal(found.buffers, now.buffers)
    if not same:
        raise CheckpointError(
            f"{place} holds another adapter in this library's own format ({JSON}), which would be read in place of this one; "
            "name another folder, remove that adapter, or save this one over it first (format='superlora')."
        )


def _equal(saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the same names, dtypes and values."""
    return saved.keys() == now.keys() and all(
        tensor.dtype == now[name].dtype and torch.equal(tensor, whole(name, now[name], None, [tensor.dtype]))
        for name, tensor in saved.items()
    )


def left_over(target: str | PathLike[str], to: str) -> list[Path]:
    """Files of adapters in other formats in the folder of a target; its readers would take them for the adapter."""
    place = place_of(target)
    return [file for format in FORMATS if format != to for file in _files(place, format)] if place.is_dir() else []


def _files(place: Path, format: str) -> list[Path]:
    """What a folder holds of a format's adapter, the file that tells it first."""
    if format == "superlora":
        tensors = sorted(file for file in place.iterdir() if TENSORS.fullmatch(file.name))
        return [place / JSON, *tensors] if (place / JSON).is_file() else []
    if format == "peft":
        return [file for name in (CONFIG, *PEFT_TENSORS) if (file := place / name).is_file()]
    return [file] if (file := place / FILES[format]).is_file() else []


def _is_adapter(file: Path) -> bool:
    """Whether a file's names are those of adapters, by its head alone: it may be a large model."""
    with opened_file(file) as opened:
        head = opened.read(GGUF_HEAD)
    if head[:4] == b"GGUF":
        return GGUF_WORD in head
    if file.name == PEFT_TENSORS[1]:
        return True  # a pickle, which nothing looks into; PEFT alone calls a file so
    with suppress(CheckpointError):
        names = look(file)
        parts = [part for part in map(split_key, names) if part is not None]
        # Models have parameters called alpha, too.
        return any(field != "alpha" for _, field in parts) or any(map(foreign_method, names))
    return False
