"""``superlora-tn convert SOURCE TARGET --to FORMAT``: from any of the formats into any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch

from superlora_tn.files.base_model import BaseModel
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Fitted, Parsed
from superlora_tn.files.gguf import Architecture, in_model
from superlora_tn.files.names import label
from superlora_tn.files.own import Saved, check_part
from superlora_tn.files.plain import Wish
from superlora_tn.files.read import read
from superlora_tn.files.record import marked
from superlora_tn.files.standing import check_replaceable, left_over
from superlora_tn.files.thin import of_weight
from superlora_tn.files.writes import FORMATS, Beside, Format, Report, save_as, save_weights

# How kohya's files call the parts of a pipeline.
KOHYA = {
    "unet": "lora_unet",
    "denoiser": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


def convert(
    source: str | PathLike[str],
    target: str | PathLike[str],
    to: Format,
    *,
    base: BaseModel | None = None,
    part: str | None = None,
    rank: int | None = None,
    error: float | None = None,
    dtype: torch.dtype | None = None,
    prefix: str | None = None,
    architecture: Architecture | None = None,
    force: bool = False,
) -> Report:
    """Read an adapter and write it in another format.

    Args:
        source: an adapter's file or folder, of this library or another.
        target: where it goes.
        to: the format, see `writes.save_as`.
        base: the base model; needed where names have '_' for '.' and the format has dots, and for DoRA and VeRA.
        part: one part of a pipeline's adapter alone, such as "unet".
        rank, error, dtype, prefix, architecture: as in `writes.save_as`.
        force: replace what stands at the target, whatever it is; of a folder, the adapter that it holds in another format.

    Raises:
        CheckpointError: the source is not understood, needs the base model, or the format cannot hold it; or the target is a
            file that holds no adapter, the source, or a folder that holds another format.
    """
    if to in FORMATS and not force:
        check_replaceable(source, target, to)
    found = read(source)
    more = {"rank": rank, "error": error, "dtype": dtype, "prefix": prefix, "architecture": architecture}
    report = _converted(found, source, target, to, base, part, more)
    for file in left_over(target, to) if force else ():
        file.unlink(missing_ok=True)
    return report


def _converted(
    found: Parsed | Saved,
    source: str | PathLike[str],
    target: str | PathLike[str],
    to: Format,
    base: BaseModel | None,
    part: str | None,
    more: dict[str, Any],
) -> Report:
    """What was read, written in the format."""
    if isinstance(found, Saved):
        check_part(source, part)
        beside = Beside(replaced=found.buffers)
        kernels = base.kernels if base else None
        entries = marked(found.entries, _tables(found, base)) if base else found.entries
        return save_as(entries, found.tensors, target, to, kernels=kernels, beside=beside, **more)
    if part is not None:
        found = found.only(part)
    if base is not None:
        fitted = in_model(found, base.shapes, lambda: base.heads).fitted(
            base.shapes, parameters=base.sizes, weights=base.weight, stored=True
        )
        if to == "superlora":
            saved = fitted.saved(base.parameter)
            fitted = Fitted(saved.entries, saved.tensors, {}, saved.buffers, fitted.kernels, fitted.embeddings)
        return _from_fitted(fitted, target, to, more)
    if to in ("lycoris", "kohya"):
        return _as_named(found, target, to, Wish(more["rank"], more["error"], more["dtype"]), more["prefix"])
    if to == "diffusers" and more["prefix"] is None:
        more = {**more, "prefix": found.parts[0] if found.parts[0] not in ("", "denoiser") else None}
    return _from_fitted(found.plain(), target, to, more)


def _tables(found: Saved, base: BaseModel) -> list[str]:
    """The targets that the base has as (num, dim) and without a bias: tables, as adapters of older releases do not say."""
    shapes = {name: base.sizes.get(f"{name}.weight", ()) for name in found.targets if f"{name}.bias" not in base.sizes}
    return [name for name, held in shapes.items() if held == found.targets[name][::-1] != found.targets[name]]


def _from_fitted(fitted: Fitted, target: str | PathLike[str], to: Format, more: Mapping[str, object]) -> Report:
    beside = Beside(fitted.added, fitted.replaced)
    return save_as(
        fitted.entries,
        fitted.tensors,
        target,
        to,
        kernels=fitted.kernels,
        embeddings=fitted.embeddings,
        beside=beside,
        **more,  # type: ignore[arg-type]
    )


def _as_named(found: Parsed, target: str | PathLike[str], to: Format, wish: Wish, prefix: str | None) -> Report:
    """Into kohya's way of writing, which needs no model: dots become '_', and such names stay."""
    found.check_names()
    weights = []
    for weight in found.weights:
        if weight.late is not None or weight.rests:
            raise CheckpointError(f"{found.path}: the update of '{weight.name}' follows from the base model; give it.")
        weights.append(replace(of_weight(weight), name=_renamed(weight.name, prefix)))
    added, replaced = ({_moved(n, prefix): t for n, t in own.items()} for own in (found.added, found.replaced))
    return save_weights(weights, target, to, wish, prefix, Beside(added, replaced), Architecture(), to == "lycoris")


def _moved(parameter: str, prefix: str | None) -> str:
    module, _, kind = parameter.rpartition(".")
    return f"{_renamed(module, prefix)}.{kind}"


def _renamed(name: str, prefix: str | None) -> str:
    own = label(name)
    if not own.dotted or prefix is not None or own.part not in KOHYA:
        return name if not own.dotted else own.rest
    return f"{KOHYA[own.part]}_{own.rest}".replace(".", "_")
