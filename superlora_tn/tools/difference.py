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
from superlora_tn.update.based import Read, base_values


@dataclass(frozen=True)
class Difference:
    """What training changed.

    Attributes:
        base, tuned: the checkpoints.
        shapes: (out, in) of the weights that differ and are among the targets, by module.
        kernels: the sizes of the kernels of those that are convolutions, by module.
        left: parameters that differ beside these.
    """

    base: BaseModel
    tuned: BaseModel
    shapes: Mapping[str, Shape]
    kernels: Kernels
    left: tuple[str, ...]

    def delta(self, name: str) -> Tensor:
        """The difference of a weight, (out, in), in float64."""
        return self.tuned.weight(name).double() - self.base.weight(name).double()

    def start(self, spec: AdapterSpec) -> dict[str, Tensor]:
        """The nodes that hold the base's own values, by name, for `fit_weights`.

        Raises:
            SpecError: the declaration does not fit the shapes.
        """
        return resting(spec, self.shapes, lambda name: self.base.weight(name).double(), self.kernels)


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


def difference(base: str | PathLike[str], tuned: str | PathLike[str], targets: Sequence[str] = ()) -> Difference:
    """What differs between two checkpoints.

    Args:
        base, tuned: safetensors files, or folders of them, with the same parameters.
        targets: names of modules or their endings; none takes all matrices and kernels that differ.

    Raises:
        CheckpointError: files that are damaged, or are no two checkpoints of one model; or no weight of the targets differs.
    """
    first, second = base_model(base), base_model(tuned)
    _check_alike(first, second, str(base), str(tuned))
    changed = [name for name in first.sizes if not torch.equal(first.parameter(name), second.parameter(name))]
    shapes = {n: s for n, s in first.shapes.items() if f"{n}.weight" in changed and within(n, targets)}
    if not shapes:
        if targets and not any(within(name, targets) for name in first.shapes):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in first.shapes)
            raise CheckpointError(f"{base} has no weight by the names {', '.join(targets)}; {near(targets[0], ends)}")
        of = f" of the targets {', '.join(targets)}" if targets else ""
        raise CheckpointError(f"no weight{of} differs between {base} and {tuned}, so there is nothing to make an adapter of.")
    left = tuple(n for n in changed if n.removesuffix(".weight") not in shapes)
    return Difference(first, second, shapes, {n: k for n, k in first.kernels.items() if n in shapes}, left)


def _check_alike(first: BaseModel, second: BaseModel, base: str, tuned: str) -> None:
    for name, shape in first.sizes.items():
        if second.sizes.get(name) != shape:
            has = f"as {second.sizes[name]}" if name in second.sizes else "not at all"
            raise CheckpointError(f"{base} has '{name}' of shape {shape}, {tuned} has it {has}; they are no two of one model.")
    more = next((name for name in second.sizes if name not in first.sizes), None)
    if more is not None:
        raise CheckpointError(f"{tuned} has '{more}', which {base} lacks; they are no two of one model.")
