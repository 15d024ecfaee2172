"""A saved adapter and a model: read for its names and shapes, checked against them, and the half of it that trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from typing import Literal

from torch import Tensor, nn

from superlora_tn.declare.parts import SpecError
from superlora_tn.files.gguf import heads_in, in_model
from superlora_tn.files.own import CheckpointError, Entry, Saved, check_part
from superlora_tn.files.read import read
from superlora_tn.model.buffers import by_one_name
from superlora_tn.model.targets import AttachError, Target, bind, near, places
from superlora_tn.model.tuned import Tuned

At = Literal["weight", "output"]


def read_for(
    model: nn.Module, path: str | PathLike[str], part: str | None = None, at: At | None = None, joined: bool = True
) -> Saved:
    """An adapter of this library or another, fitted to the model's names and shapes; the arguments are those of `load`.

    Args:
        joined: DoRA is read as such, and not as the dW that it makes of this base.

    Raises:
        CheckpointError: it is damaged, or does not fit.
    """
    found = read(path)
    if isinstance(found, Saved):
        check_part(path, part)
        return found
    known = places(model)
    targets: dict[str, Target] = {}
    for name, place in known.items():
        if place.is_supported and not place.tied and place.span is None:
            with suppress(AttachError):
                targets[name] = bind(name, place, at)
    shapes = {name: target.shape for name, target in targets.items()}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    def weights(name: str) -> Tensor:
        return targets[name].kind.read(targets[name].layer).detach()

    found = in_model(found, shapes, lambda: _heads(model))
    saved = found.fitted(shapes, parameters=tensors, weights=weights, part=part, joined=joined).saved(tensors.__getitem__)
    return replace(saved, buffers=by_one_name(model, saved.buffers))


def _heads(model: nn.Module) -> tuple[int, int] | None:
    """Heads of q and of k, where the model has a configuration of transformers that tells them."""
    told = getattr(getattr(model, "config", None), "to_dict", None)
    return heads_in(told()) if callable(told) else None


def check_base(model: nn.Module, folder: str | PathLike[str], saved: Saved, at: At | None) -> None:
    """Raise `CheckpointError` unless the model has the weights that the adapter is for."""
    known = places(model, saved.rows)
    for entry in saved.entries:
        for target, shape in entry.targets.items():
            if target not in known:
                raise CheckpointError(
                    f"{folder}: this base has no module '{target}', which the adapter needs; {near(target, known)}."
                )
            try:
                own = bind(target, known[target], at).shape
            except (AttachError, SpecError) as error:
                raise CheckpointError(f"{folder}: this base cannot take the adapter: {error}") from error
            if own != tuple(shape):
                raise CheckpointError(
                    f"{folder}: '{target}' is {own} in this base and {tuple(shape)} in the adapter; it is another base."
                )


def depart(handle: Tuned, entries: Sequence[Entry], values: Sequence[Sequence[Tensor]]) -> None:
    """Give a handle these declarations; where they say that half trains, its adapters depart from values.

    Args:
        handle: attached, its adapters not departed yet (see `Adapter.depart`).
        entries: for the same weights in the same order, of halves still.
        values: of each adapter's nodes.

    Raises:
        SpecError: a declaration that is too large.
    """
    laid = [(entry, graph) for entry in entries for _, graph in entry.spec.lay_out(entry.targets)]
    for (entry, graph), adapter, nodes in zip(laid, handle._adapters(), values, strict=True):
        if entry.trains is not None:
            adapter.depart(entry.spec, graph, nodes)
    # The model knows which targets are tables, and a file may not.
    handle.entries = tuple(replace(new, tables=own.tables) for new, own in zip(entries, handle.entries, strict=True))
