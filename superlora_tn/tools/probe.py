"""How much of a dW each structure holds, at several numbers of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from superlora_tn.contraction.plan import table
from superlora_tn.declare.parts import SpecError, check_count
from superlora_tn.network.catalogue import VARIANTS, bought
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools import draw
from superlora_tn.tools.decompose import FitError, decompose

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
    """

    numbers: int
    points: tuple[Held, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("variant", "parameters", "of dW", "energy")]
        for point in self.points:
            share = f"{point.parameters / self.numbers:.2%}"
            rows.append((point.variant, f"{point.parameters:,}", share, f"{point.energy:.4f}"))
        return "\n".join(table(rows, "parameters energy"))

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
    weights = {"weight": delta} if isinstance(delta, Tensor) else dict(delta)
    numbers = sum(weight.numel() for weight in weights.values())
    if not any(bool(torch.count_nonzero(weight)) for weight in weights.values()):
        raise FitError("probe was given a dW of zeros, which has no energy to hold; give a trained update.")
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise SpecError(f"probe was given the variant '{unknown[0]}'; choose of {', '.join(VARIANTS)}.")
    wanted = sorted({max(1, numbers // part) for part in PARTS} if budgets is None else set(budgets))
    for budget in wanted:
        check_count("probe", "budgets", budget, 1 << 62)
    shapes = {name: (weight.shape[0], weight.shape[-1]) for name, weight in weights.items()}
    found, refused = list[Held](), SpecError("probe was given no budget or no variant; give one of each at least.")
    for name in variants:
        counts = dict[int, AdapterSpec]()
        for budget in wanted:
            try:
                choice = bought(name, budget, shapes)
                counts.setdefault(choice.count, choice.spec)
            except SpecError as error:
                refused = error
        for count, spec in counts.items():
            fit = decompose(weights, spec, steps=steps, tolerance=tolerance, restarts=restarts, seed=seed)
            found.append(Held(name, spec, count, max(0.0, 1 - fit.error**2)))
    if not found:
        raise refused
    return Probe(numbers, tuple(found))
