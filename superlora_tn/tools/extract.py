"""An adapter of the difference of two checkpoints, and one adapter as another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.own import Saved
from superlora_tn.files.read import read
from superlora_tn.model.tuned import Tuned
from superlora_tn.network.budget import Budget
from superlora_tn.network.kernels import Kernels
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.convert import REMEDY
from superlora_tn.tools.convert import convert as convert_entries
from superlora_tn.tools.decompose import Decomposition, Progress, fit_weights
from superlora_tn.tools.difference import difference
from superlora_tn.tools.fitting import Settings
from superlora_tn.tools.layers import Model, some, untold_words

Maker = Callable[[Mapping[str, Shape], Kernels], AdapterSpec] | Callable[[Mapping[str, Shape]], AdapterSpec]
Declared = AdapterSpec | Budget | Maker


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
    A DoRA becomes another DoRA, whose magnitudes are the same.

    Args:
        adapter: a handle, or the folder of a saved adapter of this library. What the other declaration takes of the base's
            weights (HiRA's, LoRA-XS's frozen nodes) comes from the handle's model; a folder has what its own nodes hold.
            So do the kernels of convolutions, which of a folder are those that its declarations name.
        to: the other declaration, or a budget that buys one.
        steps, tolerance, restarts, seed, progress: of fits, where there are any; see `decompose`.

    Returns:
        Nodes and errors; `Decomposition.write` saves it, for `load`. A strength does not count.

    Raises:
        CheckpointError: a folder that is no adapter of this library, row blocks, or parameters that train beside.
        SpecError: the other declaration does not fit the weights' shapes.
        FitError: it needs the base's weights, which a folder does not have, or which a merged adapter has changed.
    """
    saved = _saved(adapter)
    options = {"steps": steps, "tolerance": tolerance, "restarts": restarts, "seed": seed, "progress": progress}

    def base(name: str) -> Tensor:
        return own[name].weight().to(device="cpu", dtype=torch.float64)

    merged = isinstance(adapter, Tuned) and adapter.merged
    own = adapter._targets if isinstance(adapter, Tuned) and not merged else {}
    kernels = {n: t.kernel for n, t in adapter._targets.items()} if isinstance(adapter, Tuned) else None
    rest = {"remedy": "unmerge() it first" if merged else REMEDY, "base": base if own else None, "kernels": kernels, **options}
    return convert_entries(saved.entries, saved.tensors, to, **rest)  # type: ignore[arg-type]


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
        left: parameters that differ and are no matrices, or are not among the targets, or are untold: the adapter lacks these.
        untold: those of them that are matrices among the targets, but nothing tells which of their axes is out.
    """

    adapter: Decomposition
    left: tuple[str, ...]
    untold: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.adapter)]
        if self.left:
            one = len(self.left) == 1
            many = "1 other parameter differs and is" if one else f"{len(self.left)} other parameters differ and are"
            lines.append(f"{many} left as in the base: {some(self.left)}")
        if self.untold:
            lines.append(untold_words(self.untold))
        return "\n".join(lines)


def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    to: Declared,
    targets: Sequence[str] = (),
    *,
    model: Model | None = None,
    linear: bool = False,
    steps: int = 200,
    tolerance: float = 1e-5,
    restarts: int = 3,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Extracted:
    """The adapter whose dW is nearest to the difference of two checkpoints.

    Which axis of a weight is out, files alone tell only of layers whose bias has the size of one axis and not of the other.
    Of all others a model does, or the config.json of transformers or diffusers beside the files, of which the model is made
    without memory. What nothing tells of is left out and named in the result.

    Args:
        base, tuned: safetensors files, or folders of them, with the same parameters.
        to: the declaration, a budget, or what gives one for the weights' shapes (out, in) and the kernels of the convolutions.
            As in `attach`, a declaration that leaves its kernel open takes those of the weights.
        targets: names of modules or their endings; none takes all matrices and kernels that differ.
        model: of these parameters, on whatever device, or the folder of its config.json; None looks for one beside the files.
        linear: say that weights which nothing tells of are those of linear layers and convolutions, (out, in). An embedding's
            table or a Conv1D among them would make a wrong adapter.
        steps, tolerance, restarts, seed, progress: see `decompose`.

    Raises:
        CheckpointError: files that are damaged, or are no two checkpoints of one model; nothing differs; or of nothing that
            does is known which axis is out.
        SpecError: the declaration does not fit.
    """
    found = difference(base, tuned, targets, model, linear)
    given = to if isinstance(to, AdapterSpec | Budget) else _made(to, found.shapes, found.kernels)
    spec = given.choose(found.shapes, found.kernels).spec if isinstance(given, Budget) else given
    settings = Settings(steps, tolerance, restarts)
    start = found.start(spec)
    made = fit_weights(found.shapes, found.delta, spec, settings, seed, start, progress, kernels=found.kernels)
    return Extracted(replace(made, tables=found.tables), found.left, found.untold)


def _made(maker: Any, shapes: Mapping[str, Shape], kernels: Kernels) -> AdapterSpec:
    """What gives the declaration may ask for the shapes alone."""
    found: AdapterSpec = maker(shapes, kernels) if len(signature(maker).parameters) > 1 else maker(shapes)
    return found
