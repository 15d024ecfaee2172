"""All nodes at once, by damped Gauss-Newton steps: the last digits, and out of the swamps of alternating least squares.

Levenberg 1944, Marquardt 1963, with the damping of Nielsen 1999. Small problems solve for the step through the Jacobian, large
ones by conjugate gradients with the environments' spectra as preconditioner (Sorber, Van Barel & De Lathauwer 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from superlora_tn.tools.als import Fitting, conjugate_gradients
from superlora_tn.tools.environment import Solved
from superlora_tn.tools.summed import settled

MAX_SIDE, MAX_WORK = 600, 4e8  # unknowns, and FLOPs of the normal equations, of a step through the Jacobian: under 0.1 s
INNER, WORK = 200, 4e9  # conjugate gradients within a step, and the numbers they may go through
TRIALS = 12
Solve = Callable[[float], Tensor]


class Newton:
    """Damped Gauss-Newton steps of a `Fitting`."""

    def __init__(self, fitting: Fitting) -> None:
        self.fitting, problem = fitting, fitting.problem
        fitting.move(settled(problem, fitting.nodes))
        self._shapes = [problem.shapes[e.node] for e in fitting.environments]
        self._sizes = [s.numel() for s in map(torch.Size, self._shapes)]
        self._damping: float | None = None
        side, seen = sum(self._sizes), problem.wanted.numel()
        self._direct = problem.unfolding.linear and side <= MAX_SIDE and side * side * seen <= MAX_WORK
        cost = 2 * len(self._sizes) * fitting.tensor.numel()
        self._inner = int(min(INNER, WORK / cost))

    @property
    def possible(self) -> bool:
        """Whether a step can be had at a bearable cost."""
        return self._direct or self._inner >= 10

    def step(self) -> float:
        """One step that lowers the error, or none where none does.

        Returns:
            The error behind it.
        """
        fitting, growth = self.fitting, 2.0
        spectra = [e.spectrum(fitting.nodes) for e in fitting.environments]
        right = self._pull(fitting.residual)
        solve = self._through_jacobian(right) if self._direct else self._iteratively(right, spectra)
        if self._damping is None:
            self._damping = 1e-2 * max(s.largest for s in spectra)
        before = fitting.error
        for _ in range(TRIALS):
            damping = self._damping
            step = solve(damping)
            nodes = list(fitting.nodes)
            for environment, own in zip(fitting.environments, self._parts(step), strict=True):
                nodes[environment.node] = nodes[environment.node] + own
            trial = Fitting(fitting.problem, fitting.environments, nodes)
            if trial.error < before:
                promised = float((step * (damping * step + right)).sum()) / fitting.wanted**2
                gain = (before**2 - trial.error**2) / promised if promised > 0 else 0.0
                self._damping = damping * max(0.1, 1 - (2 * gain - 1) ** 3)
                fitting.nodes, fitting.tensor, fitting.residual = trial.nodes, trial.tensor, trial.residual
                break
            self._damping, growth = damping * growth, growth * 2
        return fitting.error

    def _parts(self, unknowns: Tensor) -> list[Tensor]:
        """A vector of all unknowns, node by node."""
        return [p.reshape(s) for p, s in zip(torch.split(unknowns, self._sizes), self._shapes, strict=True)]

    def _pull(self, elements: Tensor) -> Tensor:
        """J' of elements."""
        fitting = self.fitting
        back = fitting.problem.unfolding.pull(fitting.tensor, elements)
        return torch.cat([e.pull(fitting.nodes, back).reshape(-1) for e in fitting.environments])

    def _push(self, unknowns: Tensor) -> Tensor:
        """J of a vector of all unknowns."""
        fitting, total = self.fitting, torch.zeros_like(self.fitting.tensor)
        for environment, own in zip(fitting.environments, self._parts(unknowns), strict=True):
            total = total + environment.push(fitting.nodes, own)
        return fitting.problem.unfolding.push(fitting.tensor, total)

    def _through_jacobian(self, right: Tensor) -> Solve:
        unit = torch.eye(sum(self._sizes), dtype=right.dtype)
        jacobian = torch.func.vmap(self._push)(unit).reshape(len(unit), -1)
        values, vectors = torch.linalg.eigh(jacobian @ jacobian.mT)
        turned = vectors.mT @ right
        # Rounding puts some eigenvalues of a gauge below zero.
        return lambda damping: vectors @ (turned / (values.clamp_min(0.0) + damping))

    def _iteratively(self, right: Tensor, spectra: Sequence[Solved]) -> Solve:
        tolerance = min(1e-2, max(1e-8, self.fitting.error))

        def solve(damping: float) -> Tensor:
            def near(unknowns: Tensor) -> Tensor:
                parts = zip(spectra, self._parts(unknowns), strict=True)
                return torch.cat([s.solve(own, damping).reshape(-1) for s, own in parts])

            through = lambda unknowns: self._pull(self._push(unknowns)) + damping * unknowns  # noqa: E731
            return conjugate_gradients(through, right, near, self._inner, tolerance)

        return solve
