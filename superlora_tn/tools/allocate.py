"""Ranks moved between weights while training: AdaLoRA's importance and its falling budget (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.checks import check_count, shown
from superlora_tn.declare.parts import SpecError
from superlora_tn.model.tuned import Tuned
from superlora_tn.update.base import Adapter


@dataclass(frozen=True)
class _Bond:
    """A bond with values of its own, one a rank (AdaLoRA's lam).

    Attributes:
        name: of the group's weights.
        values: the trained node on the bond alone, (ranks,).
        others: the other trained nodes on the bond, each with the axis that it is.
    """

    name: str
    values: Tensor
    others: tuple[tuple[Tensor, int], ...]


class RankAllocator:
    """Prunes ranks of a trained adapter down to a budget for all weights together, the least important first.

    A rank goes by setting to zero the value that it has on its bond: `adalora`'s lam, or that of any network with a trained
    node on a bond alone. Its importance is AdaLoRA's (equations 8 to 11): for each number the smoothed |w dL/dw| times how much
    that varies, at the value, and averaged over the rank's numbers in each other node. The budget falls as the cube of the
    steps left. Pruned ranks may come back until it has fallen; then the choice stands. Equal to PEFT's.

    Call `step` once a training step, behind the optimizer's step and before the gradients are set to zero. A step of which a
    gradient is infinite or no number (``GradScaler`` skips it) counts as a step and leaves the importances as they were. A
    training that is resumed needs its `state_dict` beside the optimizer's.

    Args:
        tuned: the attached adapter.
        ranks: how many are left in the end, over all weights.
        steps: of the training.
        warm: steps at the beginning without pruning, PEFT's `tinit`.
        last: steps at the end with the final choice, PEFT's `tfinal`.
        every: steps from one pruning to the next, PEFT's `deltaT`.
        smooth: how much of the smoothed importance, and of its variation, is kept in a step.

    Raises:
        SpecError: the adapter has no bond with values of its own, or the numbers do not fit.
    """

    def __init__(
        self,
        tuned: Tuned,
        ranks: int,
        steps: int,
        *,
        warm: int = 0,
        last: int = 0,
        every: int = 1,
        smooth: tuple[float, float] = (0.85, 0.85),
    ) -> None:
        if not isinstance(tuned, Tuned):
            raise SpecError(f"RankAllocator was given a {type(tuned).__name__}; give the handle that attach returns.")
        self._bonds = [bond for adapter in tuned._adapters() for bond in _bonds(adapter)]
        self.total = sum(bond.values.numel() for bond in self._bonds)
        if not self._bonds:
            raise SpecError(
                "RankAllocator was given an adapter of which no bond has values of its own; attach one such as "
                "superlora_tn.adalora(8)."
            )
        check_count("RankAllocator", "ranks", ranks, self.total)
        check_count("RankAllocator", "steps", steps, 1 << 40)
        check_count("RankAllocator", "every", every, steps)
        counts = all(isinstance(n, int) and n >= 0 for n in (warm, last)) and warm + last < steps
        parts = isinstance(smooth, tuple) and len(smooth) == 2 and all(isinstance(s, float) and 0 < s < 1 for s in smooth)
        if not counts or not parts:
            raise SpecError(
                f"RankAllocator was given warm={warm}, last={last} and smooth={smooth} for {steps} steps; fewer steps than all "
                "may be warm and last, and a tuple of two numbers between 0 and 1 smooths."
            )
        self.ranks, self.steps, self.warm, self.last, self.every, self.smooth = ranks, steps, warm, last, every, smooth
        self.now = 0
        measured = (own for bond in self._bonds for own in (bond.values, *(node for node, _ in bond.others)))
        self._nodes = list({id(own): own for own in measured}.values())  # each once
        self._smoothed: list[tuple[Tensor, Tensor] | None] = [None] * len(self._nodes)
        self._kept: list[Tensor] | None = None

    @property
    def budget(self) -> int:
        """How many ranks may be left at this step."""
        if self.now <= self.warm:
            return self.total
        left = 1 - (self.now - self.warm) / (self.steps - self.last - self.warm)
        return int((self.total - self.ranks) * max(left, 0.0) ** 3 + self.ranks)

    @property
    def kept(self) -> dict[str, int]:
        """How many ranks of each group's weights are not zero; a group is called by its first weight."""
        found = dict.fromkeys((bond.name for bond in self._bonds), 0)
        for bond in self._bonds:  # of a sum one for each term
            found[bond.name] += int(bond.values.count_nonzero())
        return found

    @torch.no_grad()
    def step(self) -> None:
        """Take in the gradients of this step, if they are finite, and prune, if it is time to and any step was finite so far.

        Raises:
            SpecError: a node has no gradient: call it between ``backward()`` and ``zero_grad()``.
        """
        end = self.steps - self.last
        if self.now + 1 < end or self._unknown:
            self._measure()
        self.now += 1
        if self._unknown:
            return
        if self.now >= end:
            self._kept = self._chosen() if self._kept is None else self._kept
            self._prune(self._kept)
        elif self.now > self.warm and self.now % self.every == 0:
            self._prune(self._chosen())

    def state_dict(self) -> dict[str, Any]:
        """Where it is, for ``torch.save``: settings, step, the smoothed importance of each number, and the final choice."""
        return {"settings": self._settings, "now": self.now, "smoothed": list(self._smoothed), "kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of an allocator of the same settings for the same adapter.

        Raises:
            SpecError: it is of another; nothing is changed then.
        """
        if state.get("settings") != self._settings:
            raise SpecError(
                f"RankAllocator was given the state of {shown(state.get('settings'), 200)}, and this one is of "
                f"{self._settings}; resume with the same settings."
            )
        smoothed, kept = state["smoothed"], state["kept"]
        fits = len(smoothed) == len(self._nodes) and all(
            pair is None or all(one.shape == own.shape for one in pair) for pair, own in zip(smoothed, self._nodes, strict=True)
        )
        if not fits or (kept is not None and [one.shape for one in kept] != [bond.values.shape for bond in self._bonds]):
            raise SpecError(
                "RankAllocator was given the state of another adapter; give one of the same declaration and weights."
            )
        self.now, self._kept = state["now"], kept
        self._smoothed = [
            None if pair is None else (pair[0].to(own), pair[1].to(own))
            for own, pair in zip(self._nodes, smoothed, strict=True)
        ]

    @property
    def _settings(self) -> dict[str, Any]:
        """What a resumed training has to have again."""
        return {
            "ranks": self.ranks,
            "steps": self.steps,
            "warm": self.warm,
            "last": self.last,
            "every": self.every,
            "smooth": self.smooth,
        }

    @property
    def _unknown(self) -> bool:
        """Whether no importance is known yet."""
        return self._smoothed[0] is None

    def _measure(self) -> None:
        slopes = [own.grad for own in self._nodes if own.grad is not None]
        if len(slopes) < len(self._nodes):
            raise SpecError(
                "RankAllocator found a node without a gradient; call step() behind backward() and before zero_grad()."
            )
        found = [(own * slope).abs() for own, slope in zip(self._nodes, slopes, strict=True)]
        if not _finite(found):
            return
        for k, now in enumerate(found):
            mean, spread = self._smoothed[k] or (torch.zeros_like(now), torch.zeros_like(now))
            mean = self.smooth[0] * mean + (1 - self.smooth[0]) * now
            spread = self.smooth[1] * spread + (1 - self.smooth[1]) * (now - mean).abs()
            self._smoothed[k] = (mean, spread)

    def _chosen(self) -> list[Tensor]:
        """Which ranks of each bond are kept."""
        scores = [self._score(bond).cpu().double() for bond in self._bonds]  # weights may lie on several devices
        drop = self.total - self.budget
        if drop == 0:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        most = torch.cat(scores).kthvalue(drop)[0]
        return [score > most for score in scores]

    def _score(self, bond: _Bond) -> Tensor:
        def each(own: Tensor) -> Tensor:
            found = next(pair for pair, node in zip(self._smoothed, self._nodes, strict=True) if node is own)
            return torch.zeros_like(own) if found is None else found[0] * found[1]

        rest = [each(node).movedim(axis, 0).flatten(1).mean(1) for node, axis in bond.others]
        return torch.stack([each(bond.values), *rest]).sum(0)

    def _prune(self, kept: list[Tensor]) -> None:
        for bond, own in zip(self._bonds, kept, strict=True):
            bond.values.masked_fill_(~own.to(bond.values.device), 0)


def _finite(found: list[Tensor]) -> bool:
    """Whether all of them are; asked once, as each answer of an accelerator is waited for."""
    return bool(torch.stack([one.isfinite().all().to(found[0].device) for one in found]).all())


def _bonds(adapter: Adapter) -> list[_Bond]:
    """The bonds of an adapter that have values of their own, of a sum those of its terms."""
    found, own = list[_Bond](), adapter._parameters
    for k, (home, node) in enumerate(adapter.graph.homes):
        opened = {index for _, indices in home.modes for index in indices}
        if len(node.shape) != 1 or len(node.indices) != 1 or node.indices[0] in opened or not node.trainable:
            continue
        others = [
            (other, other.axes.index(node.indices))
            for other in home.nodes
            if other.name != node.name and node.indices in other.axes
        ]
        values = own.get(f"node_{adapter.graph.nodes[k].name}")
        if others and values is not None and all(one.map is None for one in (node, *(other for other, _ in others))):
            tensors = [(own.get(f"node_{other.name}"), axis) for other, axis in others]
            found.append(
                _Bond(next(iter(adapter.group.members)), values, tuple((t, axis) for t, axis in tensors if t is not None))
            )
    return found
