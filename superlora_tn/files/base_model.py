"""What a base model's checkpoint says of its weights, from the headers of its files: no model is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.files.container import look, read_json, tensor
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.folder import place_of
from superlora_tn.files.gguf import heads_in


@dataclass(frozen=True)
class BaseModel:
    """The parameters of a checkpoint.

    Attributes:
        files: parameter's full name -> the file that holds it.
        sizes: parameter's full name -> its shape.
        config: the model's ``config.json``, which may not be there.
    """

    files: Mapping[str, Path]
    sizes: Mapping[str, tuple[int, ...]]
    config: Path | None = None

    @property
    def heads(self) -> tuple[int, int] | None:
        """Heads of attention's q and of its k; None where no configuration tells them.

        Raises:
            CheckpointError: the configuration is damaged.
        """
        return heads_in(read_json(self.config)) if self.config is not None and self.config.is_file() else None

    @property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of all weights with two axes or more, by module; a kernel's axes belong to in.

        They are taken to be kept so, but for matrices whose biases tell that they are not; see `turned`.
        """
        found: dict[str, Shape] = {}
        for name, shape in self.sizes.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module and len(shape) > 1:
                inward = math.prod(shape[1:])
                found[module] = (inward, shape[0]) if len(shape) == 2 and self.turned(module) else (shape[0], inward)
        return found

    def turned(self, module: str) -> bool | None:
        """Whether a weight is kept as (in, out, ...), as the size of its bias tells; None where it tells neither.

        So are those of GPT-2's Conv1D and of transposed convolutions. An embedding has no bias, so nothing tells it.
        """
        rows, columns, *kernel = self.sizes[f"{module}.weight"]
        bias = self.sizes.get(f"{module}.bias", ())
        if len(bias) != 1 or not columns:
            return None
        # A transposed convolution has a multiple of its second axis as outputs, one for each group.
        either = rows % columns == 0 if kernel else rows == columns
        if bias[0] == rows:
            return None if either else False
        return True if bias[0] == columns or (kernel and bias[0] % columns == 0) else None

    @cached_property
    def _turned(self) -> str | None:
        """The first module whose matrix is kept as (in, out); None where no bias tells of one."""
        return next((n for n in self.shapes if len(self.sizes[f"{n}.weight"]) == 2 and self.turned(n)), None)

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        """The kernels' sizes of the convolutions, by module."""
        return {name: self.sizes[f"{name}.weight"][2:] for name in self.shapes if len(self.sizes[f"{name}.weight"]) > 2}

    def weight(self, module: str) -> Tensor:
        """The weight of a module, (out, in); it is taken to be kept so where nothing in the files speaks against it.

        Raises:
            CheckpointError: its file is damaged; or it is square, and other matrices of the files are kept as (in, out).
        """
        held, turned = self.parameter(f"{module}.weight"), self.turned(module)
        if held.ndim > 2 or held.shape[0] != held.shape[1]:
            return held.T if held.ndim == 2 and turned else held.flatten(1)
        if self._turned is not None:
            raise CheckpointError(
                f"'{module}' is square, and which of its axes is out cannot be told from the base's files, in which "
                f"'{self._turned}' keeps (in, out); load() the adapter on the model."
            )
        return held

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
    config = files[0].with_name("config.json")
    return BaseModel({n: f for n, (f, _) in found.items()}, {n: s for n, (_, s) in found.items()}, config)


def within(name: str, targets: Sequence[str]) -> bool:
    """Whether a module is among targets, names or their endings; none means all."""
    return not targets or any(name == t or name.endswith(f".{t}") for t in targets)
