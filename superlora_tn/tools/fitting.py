"""The fit of one problem: from each start alternating least squares, then Gauss-Newton steps, and the best of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from superlora_tn.tools.als import Fitting
from superlora_tn.tools.closed_forms import is_nearest
from superlora_tn.tools.deflated import any_starts
from superlora_tn.tools.newton import Newton
from superlora_tn.tools.problem import Problem
from superlora_tn.tools.summed import AnyProblem, environments_of, settled

Report = Callable[[int, float], None]

FOUND = 1e-10  # a relative error that no other start need improve
ROUNDING = 1e-14  # one that no step improves
SLOW = 1e-2  # where a sweep lowers the error by less of itself, Gauss-Newton steps take over
PATIENCE = 15  # sweeps before a start may be given up: those by chance begin with a long fall


@dataclass(frozen=True)
class Settings:
    """How long a fit goes on.

    Attributes:
        steps: sweeps and Gauss-Newton steps from one start.
        tolerance: it ends where a step lowers the error by less of itself.
        restarts: starts by chance, for a network without a closed form.
    """

    steps: int
    tolerance: float
    restarts: int


@dataclass(frozen=True)
class Fit:
    """How nodes were found.

    Attributes:
        start: where this fit started from.
        errors: at the start and behind each step, the Frobenius norm of what is missing over that of what is wanted; none
            where nothing was fitted.
        tried: how many starts there were.
    """

    start: str
    errors: tuple[float, ...]
    tried: int

    @property
    def steps(self) -> int:
        """Sweeps and Gauss-Newton steps."""
        return max(len(self.errors) - 1, 0)


def fit(
    problem: AnyProblem, given: Sequence[Tensor], settings: Settings, generator: torch.Generator, report: Report | None = None
) -> tuple[Sequence[Tensor], Fit]:
    """Fit a network.

    Args:
        problem: what is wanted.
        given: nodes with one axis an index, a sum's as they are: the frozen ones, and what stays where nothing is wanted.
        settings: how long.
        generator: of the starts by chance.
        report: is told the number of steps and the error after each.

    Returns:
        The nodes nearest to what is wanted, of those found, balanced; and how.
    """
    if not bool(problem.wanted.any()):
        return given, Fit("nothing wanted", (0.0,), 1)
    best, found = Fit("no start", (math.inf,), 0), given
    around, count = environments_of(problem), 0
    for name, nodes in any_starts(problem, given, settings.restarts, generator):
        count += 1
        fitting = Fitting(problem, around, nodes)
        nearest = isinstance(problem, Problem) and problem.unfolding.isometric and is_nearest(problem.equation)
        nearest = nearest and name == "singular values"
        errors = [fitting.error] if nearest else _converge(fitting, settings, best.errors[-1], report)
        if errors[-1] < best.errors[-1]:
            best, found = Fit(name, tuple(errors), count), fitting.nodes
        if best.errors[-1] < FOUND:
            break
    if best.errors[-1] > 1:  # through a nonlinear map a start may be worse than nothing
        return given, Fit("nothing better than zero", (1.0,), count)
    return settled(problem, found), replace(best, tried=count)


def _converge(fitting: Fitting, settings: Settings, bar: float, report: Report | None) -> list[float]:
    """Sweeps while they are quick, then Gauss-Newton steps; the errors on the way.

    Where the problem is too large for these, a start that stays behind another one, `bar`, is given up.
    """
    errors, newton, large = [fitting.error], None, False
    if errors[0] < ROUNDING:  # nodes that a start left at zero are to stay there
        return errors
    for done in range(1, settings.steps + 1):
        errors.append(newton.step() if newton else fitting.sweep())
        if report:
            report(done, errors[-1])
        gained = (errors[-2] - errors[-1]) / errors[-2] if errors[-2] > 0 else 0.0
        hopeless = large and done >= PATIENCE and errors[-1] * (1 - gained) ** done > bar
        if errors[-1] < ROUNDING or hopeless:
            break
        if newton is None and not large and gained < SLOW:
            newton = Newton(fitting)
            if newton.possible:
                continue
            newton, large = None, True
        if gained < settings.tolerance:
            break
    return errors
