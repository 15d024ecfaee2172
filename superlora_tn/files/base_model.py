"""What a base model's checkpoint says of its weights, from the headers of its files: no model is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.files.container import look, tensor
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.folder import place_of


@dataclass(frozen=True)
class BaseModel:
    """The parameters of a checkpoint.

    Attributes:
        files: parameter's full name -> the file that holds it.
        sizes: parameter's full name -> its shape.
    """

    files: Mapping[str, Path]
    sizes: Mapping[str, tuple[int, ...]]

    @property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of all weights with two axes or more, by module; a kernel's axes belong to in."""
        found: dict[str, Shape] = {}
        for name, shape in self.sizes.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module and len(shape) > 1:
                inward = 1
                for size in shape[1:]:
                    inward *= size
                found[module] = (shape[0], inward)
        return found

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        """The kernels' sizes of the convolutions, by module."""
        return {name: self.sizes[f"{name}.weight"][2:] for name in self.shapes if len(self.sizes[f"{name}.weight"]) > 2}

    def weight(self, module: str) -> Tensor:
        """The weight of a module, (out, in).

        Raises:
            CheckpointError: its file is damaged.
        """
        return self.parameter(f"{module}.weight").flatten(1)

    def parameter(self, name: str) -> Tensor:
        """A parameter by its full name.

        Raises:
            CheckpointError: its file is damaged.
        """
        return tensor(self.files[name], name)


def base_model(path: str | PathLike[str]) -> BaseModel:
    """Look into a checkpoint.

    Args:
        path: a safetensors file, or a folder of them.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    place = place_of(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files:
        raise CheckpointError(f"{place} holds no safetensors file of a base model.")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        found |= {name: (file, shape) for name, shape in look(file).items()}
    return BaseModel({n: f for n, (f, _) in found.items()}, {n: s for n, (_, s) in found.items()})


def within(name: str, targets: Sequence[str]) -> bool:
    """Whether a module is among targets, names or their endings; none means all."""
    return not targets or any(name == t or name.endswith(f".{t}") for t in targets)
