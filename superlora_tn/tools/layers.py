"""How a checkpoint keeps the weights of its layers: told by a model, by the config beside its files, or by a layer's bias.

A file has sizes alone. `nn.Linear` and convolutions keep (out, in, ...), `nn.Embedding`, GPT-2's Conv1D and transposed
convolutions (in, out, ...), and of a square weight without more, nobody can tell. What is not told is left out, never guessed.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora_tn.declare.fold import Shape
from superlora_tn.files.base_model import BaseModel
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.folder import place_of
from superlora_tn.model.kinds import Held, LayerError
from superlora_tn.model.places import Place, tied
from superlora_tn.model.targets import AttachError, Target, bind, places

Model = nn.Module | str | PathLike[str]
# What to do where files do not tell; the command line says it in its own words.
REMEDY = "Give the model or the folder of its config.json (model=...), or say that such weights are (out, in) (linear=True)."


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight of a checkpoint, as an adapter sees it.

    Attributes:
        name: of the target; of a tied table, those of both places.
        parameter: its full name in the files.
        shape: (out, in).
        kernel: the sizes of its kernel; () for a matrix.
        matrix: the parameter as it is kept -> (out, in).
        is_table: whether it is an embedding's table.
    """

    name: str
    parameter: str
    shape: Shape
    kernel: tuple[int, ...]
    matrix: Callable[[Tensor], Tensor]
    is_table: bool = False


def told(files: BaseModel, modules: Iterable[str], model: nn.Module | None, linear: bool) -> dict[str, Layer]:
    """The layers of modules of a checkpoint, of those whose orientation is known.

    Args:
        files: the checkpoint.
        modules: names of modules in it that have a weight of two axes or more.
        model: of these parameters; its values do not count, so it may be on the meta device.
        linear: whether weights that nothing tells of are those of linear layers and convolutions.
    """
    known = {} if model is None else places(model)
    joined = {name: "+".join(names) for names in tied(known) for name in names if _alone(files, name, names)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, Layer] = {}
    for module in modules:
        sizes = files.sizes[f"{module}.weight"]
        names = (joined.get(module, module), f"{module}.weight", f"{prefix}{module}", module.removeprefix(prefix))
        layer = next((own for name in names if (own := _of_place(module, name, sizes, known)) is not None), None)
        layer = _of_bias(module, sizes, files.turned(module), linear) if layer is None else layer
        if layer is not None:
            found[module] = layer
    return found


def _of_bias(module: str, sizes: tuple[int, ...], turned: bool | None, linear: bool) -> Layer | None:
    """The layer by what its bias tells; None where that is nothing, or a transposed convolution of groups unknown."""
    if (turned is None and not linear) or (turned and len(sizes) > 2):
        return None
    matrix = Held(transposed=bool(turned)).matrix
    d_out, d_in = matrix(torch.empty(sizes, device="meta")).shape
    return Layer(module, f"{module}.weight", (d_out, d_in), tuple(sizes[2:]), matrix)


def _alone(files: BaseModel, name: str, names: Iterable[str]) -> bool:
    """Whether a checkpoint has a tied parameter by this name only."""
    return [own for own in names if f"{own}.weight" in files.sizes] == [name]


def _of_place(module: str, name: str, sizes: tuple[int, ...], known: dict[str, Place]) -> Layer | None:
    """The layer of a place of the model; None where there is none that keeps a weight of these sizes."""
    place = known.get(name)
    if place is None or not place.is_supported or place.span is not None or place.stack:
        return None
    with suppress(AttachError, LayerError):
        target = bind(name, place)
        if _sizes(target) == sizes and target.shape == tuple(_matrix(target, torch.empty(sizes, device="meta")).shape):
            # A name that the model has with its prefix or without one stays as in the files.
            own = name if "+" in name or name == f"{module}.weight" else module
            return Layer(own, f"{module}.weight", target.shape, target.kernel, partial(_matrix, target), target.is_table)
    return None


def _parameter(target: Target) -> str:
    """The name that a target's layer has for its weight."""
    return target.kind.parameter if isinstance(target.kind, Held) else "weight"


def _sizes(target: Target) -> tuple[int, ...]:
    """Of the parameter that a target's layer keeps; none where it keeps no such."""
    held = target.layer._parameters.get(_parameter(target))
    return () if held is None else tuple(held.shape)


def _matrix(target: Target, tensor: Tensor) -> Tensor:
    """A tensor of the parameter's sizes as (out, in), read as the layer's kind reads its own weight."""
    own: Any = copy.copy(target.layer)
    own.__dict__["_parameters"] = {**own._parameters, _parameter(target): nn.Parameter(tensor, requires_grad=False)}
    return target.kind.read(own).detach()


def untold_words(parameters: Sequence[str]) -> str:
    """A line that names the parameters of which nothing tells how they are kept."""
    many = "1 matrix is" if len(parameters) == 1 else f"{len(parameters)} matrices are"
    return f"{many} left out, as nothing tells which axis is out for want of the model or its config: {some(parameters)}"


def some(names: Sequence[str]) -> str:
    """Names in a line, the first of many."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def model_of(model: Model | None, *checkpoints: str | PathLike[str]) -> nn.Module | None:
    """The model that is given, or else described beside a checkpoint; on the meta device then.

    Args:
        model: a model, or the folder of its config.
        checkpoints: safetensors files, or folders of them.

    Raises:
        CheckpointError: the given folder has no config of which a model is made.
    """
    if model is None:
        return next((made for path in checkpoints if (made := _described(place_of(path))) is not None), None)
    if isinstance(model, nn.Module):
        return model
    made = _described(place_of(model))
    if made is None:
        raise CheckpointError(
            f"{model} has no config.json of which transformers or diffusers make a model; give the folder of one, or the model "
            "itself."
        )
    return made


def _described(place: Path) -> nn.Module | None:
    """The model of a config.json, without memory; None where there is none, or its library does not make it."""
    folder = place if place.is_dir() else place.parent
    try:
        config = json.loads((folder / "config.json").read_text())
        with torch.device("meta"):
            if "model_type" in config:
                return _of_transformers(folder, config)
            return _of_diffusers(config) if "_class_name" in config else None
    except Exception:  # whatever the libraries raise for what they do not know, or are not there for
        return None


def _of_transformers(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The model by the first of its architectures, whose parameters' names a checkpoint has."""
    library = importlib.import_module("transformers")
    own = library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = getattr(library, str((config.get("architectures") or [""])[0]), None)
    if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel):
        return kind(own)  # type: ignore[no-any-return]
    return library.AutoModel.from_config(own, trust_remote_code=False)  # type: ignore[no-any-return]


def _of_diffusers(config: dict[str, Any]) -> nn.Module | None:
    library = importlib.import_module("diffusers")
    kind = getattr(library, str(config["_class_name"]), None)
    known = isinstance(kind, type) and issubclass(kind, library.ModelMixin)
    return kind.from_config(config) if known else None  # type: ignore[union-attr]
