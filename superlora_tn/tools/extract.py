"""An adapter of the difference of two checkpoints, and one adapter as another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from superlora_tn.declare.fold import PhysicalGroup, Shape
from superlora_tn.files.base_model import BaseModel, base_model, within
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.own import Saved, tensor_name
from superlora_tn.files.read import read
from superlora_tn.model.tuned import Tuned
from superlora_tn.network.budget import Budget
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.convert import convert as convert_entries
from superlora_tn.tools.decompose import Decomposition, Progress, fit_weights
from superlora_tn.tools.fitting import Settings
from superlora_tn.update.based import base_values

Declared = AdapterSpec | Budget | Callable[[Mapping[str, Shape]], AdapterSpec]


def convert(
    adapter: Tuned | str | PathLike[str],
    to: AdapterSpec | Budget,
    *,
    steps: int = 200,
    tolerance: float = 1e-5,
    restarts: int = 3,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Decomposition:
    """An adapter of another declaration with the same dW, or the nearest with its error.

    It is exact, but for rounding, where the other declaration contains this one: LoHa of ranks r and s in LoRA of rank r s,
    LoKr in LoRA of the product of its splits' ranks, LoTR in a LoRA of each weight, a network in itself with larger bonds.

    Args:
        adapter: a handle, or the folder of a saved adapter of this library.
        to: the other declaration, or a budget that buys one.
        steps, tolerance, restarts, seed, progress: of fits, where there are any; see `decompose`.

    Returns:
        Nodes and errors; `Decomposition.write` saves it, for `load`. A strength does not count.

    Raises:
        CheckpointError: a folder that is no adapter of this library, row blocks, or parameters that train beside.
        SpecError: the other declaration does not fit the weights' shapes.
    """
    saved = _saved(adapter)
    options = {"steps": steps, "tolerance": tolerance, "restarts": restarts, "seed": seed, "progress": progress}
    return convert_entries(saved.entries, saved.tensors, to, **options)  # type: ignore[arg-type]


def _saved(adapter: Tuned | str | PathLike[str]) -> Saved:
    if isinstance(adapter, Tuned):
        saved = adapter._saved()
    else:
        found = read(adapter)
        if not isinstance(found, Saved):
            raise CheckpointError(f"{adapter} is an adapter of another library; load() it on a model, and convert the handle.")
        saved = found
    if saved.rows:
        raise CheckpointError(f"'{next(iter(saved.rows))}' is a block of rows of a weight, which a conversion would not keep.")
    if saved.buffers:
        raise CheckpointError(
            f"the adapter has parameters or buffers of the base beside it ({next(iter(saved.buffers))}), which a conversion "
            "would not keep; convert one that has none."
        )
    return saved


@dataclass(frozen=True)
class Extracted:
    """An adapter made of two checkpoints; print it.

    Attributes:
        adapter: the nodes, with each weight's error.
        left: parameters that differ and are no matrices, or are not among the targets: no adapter gives these.
    """

    adapter: Decomposition
    left: tuple[str, ...]

    def __str__(self) -> str:
        if not self.left:
            return str(self.adapter)
        names = ", ".join(self.left[:5]) + (", ..." if len(self.left) > 5 else "")
        return f"{self.adapter}\n{len(self.left)} parameters differ and are left as in the base: {names}"


def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    to: Declared,
    targets: Sequence[str] = (),
    *,
    steps: int = 200,
    tolerance: float = 1e-5,
    restarts: int = 3,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Extracted:
    """The adapter whose dW is nearest to the difference of two checkpoints; no model is built.

    Args:
        base, tuned: safetensors files, or folders of them, with the same parameters.
        to: the declaration, a budget, or what gives one for the weights' shapes.
        targets: names of modules or their endings; none takes all matrices and kernels that differ.
        steps, tolerance, restarts, seed, progress: see `decompose`.

    Raises:
        CheckpointError: files that are damaged, or are no two checkpoints of one model; or nothing differs.
        SpecError: the declaration does not fit.
    """
    first, second = base_model(base), base_model(tuned)
    _check_alike(first, second, str(base), str(tuned))
    changed = [name for name in first.sizes if not torch.equal(first.parameter(name), second.parameter(name))]
    shapes = {n: s for n, s in first.shapes.items() if f"{n}.weight" in changed and within(n, targets)}
    if not shapes:
        of = f" of the targets {', '.join(targets)}" if targets else ""
        raise CheckpointError(f"no weight{of} differs between {base} and {tuned}, so there is nothing to make an adapter of.")
    made = to if isinstance(to, AdapterSpec | Budget) else to(shapes)
    spec = made.choose(shapes).spec if isinstance(made, Budget) else made

    def delta(name: str) -> Tensor:
        return second.weight(name).double() - first.weight(name).double()

    found = fit_weights(
        shapes, delta, spec, Settings(steps, tolerance, restarts), seed, _of_base(first, spec, shapes), progress
    )
    return Extracted(found, tuple(n for n in changed if n.removesuffix(".weight") not in shapes))


def _of_base(base: BaseModel, spec: AdapterSpec, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The nodes that hold the base's own values, by name."""
    found = dict[str, Tensor]()
    for k, (group, graph) in enumerate(spec.lay_out(shapes)):
        members = group.members if isinstance(group, PhysicalGroup) else {}
        for number, select, value in base_values(graph, members, lambda name: base.weight(name).double()):
            node = graph.nodes[number]
            name = tensor_name(k, node)
            found.setdefault(name, torch.zeros(node.shape, dtype=torch.float64))[select] = value
    return found


def _check_alike(first: BaseModel, second: BaseModel, base: str, tuned: str) -> None:
    for name, shape in first.sizes.items():
        if second.sizes.get(name) != shape:
            has = f"as {second.sizes[name]}" if name in second.sizes else "not at all"
            raise CheckpointError(f"{base} has '{name}' of shape {shape}, {tuned} has it {has}; they are no two of one model.")
    more = next((name for name in second.sizes if name not in first.sizes), None)
    if more is not None:
        raise CheckpointError(f"{tuned} has '{more}', which {base} lacks; they are no two of one model.")
