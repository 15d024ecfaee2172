"""The difference of two checkpoints of a model, weight by weight; no model is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from superlora_tn.declare.checks import near
from superlora_tn.declare.fold import PhysicalGroup, Shape
from superlora_tn.files.base_model import BaseModel, base_model, within
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.own import tensor_name
from superlora_tn.network.kernels import Kernels, lay_out
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.layers import REMEDY, Layer, Model, model_of, told
from superlora_tn.update.based import Read, base_values


@dataclass(frozen=True)
class Difference:
    """What training changed.

    Attributes:
        base, tuned: the checkpoints.
        layers: the weights that differ and are among the targets, by the names of targets.
        left: parameters that differ beside these.
        untold: those of them that are matrices among the targets, but nothing tells which of their axes is out.
    """

    base: BaseModel
    tuned: BaseModel
    layers: Mapping[str, Layer]
    left: tuple[str, ...]
    untold: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of the weights."""
        return {name: layer.shape for name, layer in self.layers.items()}

    @property
    def kernels(self) -> Kernels:
        """The sizes of the kernels of those that are convolutions."""
        return {name: layer.kernel for name, layer in self.layers.items() if layer.kernel}

    @property
    def tables(self) -> frozenset[str]:
        """Those that are embeddings' tables."""
        return frozenset(name for name, layer in self.layers.items() if layer.is_table)

    def weight(self, files: BaseModel, name: str) -> Tensor:
        """A weight in one of the checkpoints, (out, in), in float64."""
        return self.layers[name].matrix(files.parameter(self.layers[name].parameter)).double()

    def delta(self, name: str) -> Tensor:
        """The difference of a weight, (out, in), in float64."""
        return self.weight(self.tuned, name) - self.weight(self.base, name)

    def start(self, spec: AdapterSpec) -> dict[str, Tensor]:
        """The nodes that hold the base's own values, by name, for `fit_weights`.

        Raises:
            SpecError: the declaration does not fit the shapes.
        """
        return resting(spec, self.shapes, lambda name: self.weight(self.base, name), self.kernels)


def resting(spec: AdapterSpec, shapes: Mapping[str, Shape], read: Read, kernels: Kernels | None = None) -> dict[str, Tensor]:
    """The nodes of a declaration that hold the base's own values, by name, in float64.

    Args:
        shapes: of the weights.
        read: W of a weight, (out, in), in float64; asked only where there are such nodes.
        kernels: of the weights, where they are known.

    Raises:
        SpecError: the declaration does not fit the shapes.
    """
    found = dict[str, Tensor]()
    for k, (_, group, graph) in enumerate(lay_out(spec, shapes, kernels)):
        members = group.members if isinstance(group, PhysicalGroup) else {}
        for number, select, value in base_values(graph, members, read):
            node = graph.nodes[number]
            found.setdefault(tensor_name(k, node), torch.zeros(node.shape, dtype=torch.float64))[select] = value
    return found


def difference(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    targets: Sequence[str] = (),
    model: Model | None = None,
    linear: bool = False,
) -> Difference:
    """What differs between two checkpoints.

    Args:
        base, tuned: safetensors files, or folders of them, with the same parameters.
        targets: names of modules or their endings; none takes all matrices and kernels that differ.
        model: of these parameters, or the folder of its config.json; None looks for one beside the files.
        linear: whether weights of which nothing tells how they are kept are those of linear layers and convolutions.

    Raises:
        CheckpointError: files that are damaged, or are no two checkpoints of one model; no weight of the targets differs; or of
            none that does is known which axis is out.
    """
    first, second = base_model(base), base_model(tuned)
    _check_alike(first, second, str(base), str(tuned))
    changed = [name for name in first.sizes if not torch.equal(first.parameter(name), second.parameter(name))]
    asked = [n for n in first.shapes if f"{n}.weight" in changed and within(n, targets)]
    if not asked:
        if targets and not any(within(name, targets) for name in first.shapes):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in first.shapes)
            raise CheckpointError(f"{base} has no weight by the names {', '.join(targets)}; {near(targets[0], ends)}")
        of = f" of the targets {', '.join(targets)}" if targets else ""
        raise CheckpointError(f"no weight{of} differs between {base} and {tuned}, so there is nothing to make an adapter of.")
    found = told(first, asked, model_of(model, base, tuned), linear)
    if not found:
        sizes = first.sizes[f"{asked[0]}.weight"]
        raise CheckpointError(
            f"{base} does not tell which axis of '{asked[0]}.weight' {sizes} is out: linear layers and convolutions keep "
            f"(out, in), embeddings, GPT-2's Conv1D and transposed convolutions (in, out). {REMEDY}"
        )
    layers = {layer.name: layer for layer in found.values()}
    left = tuple(name for name in changed if name not in {layer.parameter for layer in layers.values()})
    return Difference(first, second, layers, left, tuple(f"{n}.weight" for n in asked if n not in found))


def _check_alike(first: BaseModel, second: BaseModel, base: str, tuned: str) -> None:
    for name, shape in first.sizes.items():
        if second.sizes.get(name) != shape:
            has = f"as {second.sizes[name]}" if name in second.sizes else "not at all"
            raise CheckpointError(f"{base} has '{name}' of shape {shape}, {tuned} has it {has}; they are no two of one model.")
    more = next((name for name in second.sizes if name not in first.sizes), None)
    if more is not None:
        raise CheckpointError(f"{tuned} has '{more}', which {base} lacks; they are no two of one model.")
