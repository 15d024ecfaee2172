"""How much of a dW each structure holds, at several numbers of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from superlora_tn.contraction.plan import table
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import SpecError, check_count, shown
from superlora_tn.network.catalogue import bought, check_variants
from superlora_tn.network.kernels import Kernels
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools import draw
from superlora_tn.tools.decompose import FitError, check_matrices, decompose, fit_weights
from superlora_tn.tools.difference import difference
from superlora_tn.tools.fitting import Settings
from superlora_tn.tools.layers import Model, untold_words

PROBED = ("lora", "lokr", "krona", "lotr", "lorta", "tt_lora", "miss", "gralora")
PARTS = (256, 64, 16, 4)


@dataclass(frozen=True)
class Held:
    """What one structure holds at one number of parameters.

    Attributes:
        variant, spec: the structure.
        parameters: trainable.
        energy: the part of ||dW||^2 that its nearest network holds, 0 to 1.
    """

    variant: str
    spec: AdapterSpec
    parameters: int
    energy: float


@dataclass(frozen=True)
class Probe:
    """What structures hold of a dW; print it, or `plot` it.

    Attributes:
        numbers: entries of dW.
        points: by variant, and in each by number of parameters.
        refused: why structures have no point, by variant.
        untold: parameters that differ and are not counted, as nothing tells which of their axes is out.
    """

    numbers: int
    points: tuple[Held, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    untold: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("variant", "parameters", "of dW", "energy")]
        for point in self.points:
            share = f"{point.parameters / self.numbers:.2%}"
            rows.append((point.variant, f"{point.parameters:,}", share, f"{point.energy:.4f}"))
        lines = table(rows, "parameters energy")
        lines += [f"{name} is left out: {words}" for name, words in self.refused.items()]
        return "\n".join([*lines, *([untold_words(self.untold)] if self.untold else [])])

    def plot(self, path: str | PathLike[str]) -> Path:
        """Draw energy against parameters, with each structure's frontier, as a PNG (needs matplotlib).

        Args:
            path: where it goes.
        """
        points = [draw.Point(p.variant, p.parameters, p.energy, 0.0) for p in self.points]
        return draw.pareto(points, Path(path), "energy of dW held", label="energy, %")


def probe(
    delta: Tensor | Mapping[str, Tensor],
    budgets: Sequence[int] | None = None,
    variants: Sequence[str] = PROBED,
    *,
    steps: int = 50,
    tolerance: float = 1e-3,
    restarts: int = 1,
    seed: int = 0,
) -> Probe:
    """How much of the energy of a dense dW each structure holds, at each number of parameters.

    A random dW has no structure, so its energy is about the part of its numbers that train; what is above that is structure.
    Structures without a closed form are fitted (see `decompose`), so that theirs is a lower bound. Frozen nodes are as `seed`
    draws them.

    Args:
        delta: a matrix (out, in), or several by module name, for structures that weights share.
        budgets: the most parameters of each fit; by default 1/256, 1/64, 1/16 and 1/4 of dW's numbers. A structure is left
            out where it has no setting within a budget, and said once where two budgets buy the same.
        variants: the structures, by variant's name.
        steps, tolerance, restarts, seed: of the fits, see `decompose`.

    Returns:
        A point for each structure and number of parameters.

    Raises:
        SpecError: an unknown variant, or budgets within which nothing fits.
        FitError: a dW of zeros, or one that is no real matrix of finite numbers.
    """
    weights = {"weight": delta} if isinstance(delta, Tensor) else delta
    check_matrices("probe", weights)
    if not any(bool(torch.count_nonzero(weight)) for weight in weights.values()):
        raise FitError("probe was given a dW of zeros, which has no energy to hold; give a trained update.")
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}

    def held(spec: AdapterSpec) -> float:
        return decompose(weights, spec, steps=steps, tolerance=tolerance, restarts=restarts, seed=seed).error

    return _probed(shapes, budgets, variants, held)


def probe_checkpoints(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    targets: Sequence[str] = (),
    budgets: Sequence[int] | None = None,
    variants: Sequence[str] = PROBED,
    *,
    model: Model | None = None,
    linear: bool = False,
    steps: int = 50,
    tolerance: float = 1e-3,
    restarts: int = 1,
    seed: int = 0,
) -> Probe:
    """`probe` of the difference of two checkpoints, of which a weight is read when its turn comes.

    Nodes of the base's own values, as HiRA's, are taken from the base.

    Args:
        base, tuned: safetensors files, or folders of them, with the same parameters.
        targets: names of modules or their endings; none takes all matrices and kernels that differ.
        budgets, variants, steps, tolerance, restarts, seed: see `probe`.
        model, linear: see `extract`; what they leave open does not count.

    Raises:
        CheckpointError: see `extract`.
        SpecError, FitError: see `probe`.
    """
    check_variants("probe", variants)
    found = difference(base, tuned, targets, model, linear)
    settings = Settings(steps, tolerance, restarts)

    def held(spec: AdapterSpec) -> float:
        return fit_weights(found.shapes, found.delta, spec, settings, seed, found.start(spec), kernels=found.kernels).error

    return replace(_probed(found.shapes, budgets, variants, held, found.kernels), untold=found.untold)


def _probed(
    shapes: Mapping[str, Shape],
    budgets: Sequence[int] | None,
    variants: Sequence[str],
    missed: Callable[[AdapterSpec], float],
    kernels: Kernels | None = None,
) -> Probe:
    """A point for each structure and number of parameters; `missed` fits one and gives its relative error."""
    numbers = sum(d_out * d_in for d_out, d_in in shapes.values())
    check_variants("probe", variants)
    if not isinstance(budgets, Iterable | None):
        raise SpecError(f"probe was given budgets={shown(budgets)}; give a list of numbers, or None.")
    wanted = sorted({max(1, numbers // part) for part in PARTS} if budgets is None else set(budgets))
    for budget in wanted:
        check_count("probe", "budgets", budget, 1 << 62)
    found, refused = list[Held](), dict[str, Exception]()
    for name in variants:
        counts = dict[int, AdapterSpec]()
        for budget in wanted:
            try:
                choice = bought(name, budget, shapes, kernels)
                counts.setdefault(choice.count, choice.spec)
            except SpecError as error:
                refused[name] = error
        for count, spec in counts.items():
            try:
                found.append(Held(name, spec, count, max(0.0, 1 - missed(spec) ** 2)))
            except (SpecError, FitError) as error:
                refused[name] = error
    if not found:
        none = SpecError("probe was given no budget or no variant; give one of each at least.")
        raise next(reversed(refused.values()), none)
    there = {point.variant for point in found}
    return Probe(numbers, tuple(found), {name: str(error) for name, error in refused.items() if name not in there})
