"""Any adapter file or folder, by what lies there: this library's own, PEFT's, diffusers', or a single file."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from superlora_tn.files import own, peft
from superlora_tn.files.container import load
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.folder import ENDINGS, JSON, TENSORS, place_of
from superlora_tn.files.foreign import Parsed
from superlora_tn.files.own import Saved
from superlora_tn.files.single import parse_single

DIFFUSERS = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read(path: str | PathLike[str]) -> Parsed | Saved:
    """Read an adapter of this library or another, without a model.

    Args:
        path: a folder, or a file in one.

    Returns:
        what it holds: `Saved` of this library's own, `Parsed` of another's; `Parsed.fitted` fits it to a model.

    Raises:
        CheckpointError: it is no adapter, damaged, or holds anything that is not understood. Nothing in it is run.
    """
    place = place_of(path)
    if place.is_dir():
        return _folder(place)
    if place.name == JSON or (TENSORS.fullmatch(place.name) and (place.parent / JSON).exists()):
        return own.read(place.parent)
    if place.name in (*peft.TENSORS, peft.CONFIG) and (place.parent / peft.CONFIG).exists():
        return replace(peft.parse_folder(place.parent), path=place)
    if place.suffix in PICKLES and place.name != peft.TENSORS[1]:
        raise CheckpointError(
            f"{place} is a pickle by its name, which can run code when it is opened; have its author save it as safetensors."
        )
    return parse_single(load(place))


def _folder(place: Path) -> Parsed | Saved:
    if (place / JSON).exists():
        return own.read(place)
    if (place / peft.CONFIG).exists():
        return peft.parse_folder(place)
    if (place / DIFFUSERS).exists():
        return replace(parse_single(load(place / DIFFUSERS)), path=place)
    try:
        found = sorted(p for p in place.iterdir() if p.suffix in ENDINGS)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be listed: {error.strerror}.") from error
    if any(TENSORS.fullmatch(file.name) for file in found):
        return own.read(place)  # which says what is missing
    if len(found) == 1 and found[0].name not in peft.TENSORS:
        return replace(parse_single(load(found[0])), path=place)
    if any((place / name).exists() for name in peft.TENSORS):
        raise CheckpointError(f"{place} lacks {peft.CONFIG}, which says what PEFT's tensors are scaled by.")
    if found:
        raise CheckpointError(f"{place} holds {len(found)} files such as {found[0].name}; give the one that is meant.")
    raise CheckpointError(f"{place} holds no adapter: no {JSON}, no {peft.CONFIG}, no file of tensors.")
