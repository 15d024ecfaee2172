"""The adapter of a physical fold: x through the network, or through dW, by the cheaper route."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from superlora_tn.base import NOMINAL_TOKENS, TOKEN_STEPS, Adapter, Run
from superlora_tn.execute import compiled
from superlora_tn.fold import PhysicalGroup, Shape
from superlora_tn.graph import Graph
from superlora_tn.plan import Optimizer, Route, choose, make_plan
from superlora_tn.steps import Device

Schedule = tuple[tuple[int, Run | None], ...]


@lru_cache(maxsize=4096)
def _schedule(graph: Graph, shape: Shape, route: Route | None, profile: Device, optimize: Optimizer, backend: str) -> Schedule:
    """(tokens from which on, apply program or None for the delta route), from many tokens to few."""
    if route == "delta":
        return ((0, None),)
    runs: list[tuple[int, Run | None]] = []
    for tokens in TOKEN_STEPS:
        choice = choose(graph, shape, tokens, profile, optimize)
        plan = choice.chosen if route is None else choice.apply
        assert plan is not None  # a physical fold has both routes
        runs.insert(0, (tokens if runs else 0, compiled(plan, backend) if plan.route == "apply" else None))
    return tuple(runs)


def _choose_run(runs: Schedule, tokens: int) -> Run | None:
    for least, run in runs:
        if tokens >= least:
            return run
    return runs[-1][1]


class PhysicalAdapter(Adapter):
    """The adapter of weights of one shape, with physical modes; both routes."""

    group: PhysicalGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._build: Run = compiled(make_plan(self.graph, "delta", 1, self.profile, self.optimize), self.backend)
        # For each target, which nodes have member axes and where this member is on them.
        self._select = {
            target: [(k, s) for k, s in enumerate(self.graph.select(positions)) if any(isinstance(i, int) for i in s)]
            for target, positions in self.group.members.items()
        }
        self._runs = _schedule(self.graph, self.group.shape, self.route, self.profile, self.optimize, self.backend)
        self._multiply = self._dense(self.group.shape)

    @property
    def fan_in(self) -> int:
        """The members' in."""
        return self.group.shape[1]

    def _member(self, target: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The nodes' tensors for one member, in a dtype."""
        nodes = self.tensors()
        for k, select in self._select[target]:
            nodes[k] = nodes[k][select]
        if dtype is not None and any(tensor.dtype != dtype for tensor in nodes):
            return [tensor.to(dtype) for tensor in nodes]
        return nodes

    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in)."""
        return self._build(*self._member(target), alpha=self.scale)

    def forward(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """See `Adapter.forward`."""
        # A traced program is for all numbers of tokens: no branch on them.
        tokens = NOMINAL_TOKENS if torch.compiler.is_compiling() else math.prod(x.shape[:-1])
        x = x if x.dtype == out.dtype else x.to(out.dtype)
        if self.spec.dropout:
            # The layer's own gradient goes through x itself, so the two can no longer be one.
            x, base = self.drop(x), None
        run = _choose_run(self._runs, tokens)
        if run is None:
            return self._multiply(x, self.delta(target).to(out.dtype), out=out, base=base)
        return run(x, *self._member(target, out.dtype), out=out, alpha=self.scale, base=base)
