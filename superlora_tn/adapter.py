"""One torch module a group: the nodes' tensors, dW of a member, and x through it by the cheaper route."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.eager import is_eager
from superlora_tn.execute import compiled
from superlora_tn.fold import FlatGroup, Group, Mode, PhysicalGroup, Shape
from superlora_tn.graph import Graph, lower
from superlora_tn.initialise import first_values
from superlora_tn.nodes import Dense, SpecError
from superlora_tn.plan import Optimizer, Route, choose, make_plan
from superlora_tn.projection import fixed_map
from superlora_tn.spec import AdapterSpec
from superlora_tn.steps import CPU, DEVICES, Device

# Plans are made for these numbers of tokens; a call takes the plan of the largest that is not above its own.
TOKEN_STEPS = (1, 32, 256, 2048, 16384)
NOMINAL_TOKENS = 1024
Run = Callable[..., Tensor]


class Adapter(nn.Module, ABC):
    """The trainable network of one group of weights.

    Its parameters and frozen buffers are named ``node_<name>``, in graph order.

    Attributes:
        active: False switches the adapter off (it is disabled, or merged).
    """

    def __init__(
        self,
        spec: AdapterSpec,
        group: Group,
        graph: Graph,
        backend: str,
        route: Route | None,
        optimize: Optimizer,
        profile: Device,
    ) -> None:
        super().__init__()
        self.spec, self.group, self.graph = spec, group, graph
        self.backend, self.optimize, self.profile = backend, optimize, profile
        self.scale = spec.scale
        self.active = True
        self.route = route
        self._names = tuple(f"node_{n.name}" for n in graph.nodes)
        self._build: Run = compiled(make_plan(graph, "delta", 1, profile, optimize), backend)

    def fill(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> None:
        """Make the nodes' tensors with their first values; on the meta device only their shapes."""
        meta = device.type == "meta"
        values = None if meta else first_values(self.graph, self.fan_in, generator)
        for k, (name, node) in enumerate(zip(self._names, self.graph.nodes, strict=True)):
            tensor = torch.empty(node.shape, device="meta") if values is None else values[k]
            tensor = tensor.to(dtype=dtype, device=device)
            if node.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Length of the rows of the members (the longest, where they differ)."""

    def tensors(self) -> list[Tensor]:
        """The nodes' tensors in graph order."""
        # The module's own tables, since getattr and get_parameter cost more than a small matmul.
        parameters, buffers = self._parameters, self._buffers
        return [parameters[name] if name in parameters else buffers[name] for name in self._names]  # type: ignore[misc]

    @abstractmethod
    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in), in the parameters' dtype."""

    @abstractmethod
    def forward(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """``out + x dW^T`` for a target, in out's dtype.

        Args:
            x: (..., in).
            target: which member.
            out: (..., out).
            base: W, where out is the untouched output ``x W^T + b`` of a frozen linear layer: then out is written to.
        """

    def current(self, target: str) -> Tensor:
        """dW of a target for a layer of this forward pass; a flat fold has built it already."""
        return self.delta(target)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the adapter's input, while training."""
        return functional.dropout(x, self.spec.dropout, self.training) if self.spec.dropout else x

    def _dense(self, shape: Shape) -> Run:
        """The delta route's last part: dW as the one node of a dense network, with x."""
        modes = (Mode("out", shape[0], "out"), Mode("in", shape[1], "in"))
        return compiled(make_plan(lower(Dense(), modes), "apply", TOKEN_STEPS[-1], self.profile, self.optimize), self.backend)


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


class FlatAdapter(Adapter):
    """The adapter of a flat fold: groups are runs of one long vector, and a weight is a slice of it. Delta route only."""

    group: FlatGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.route == "apply":
            raise SpecError("a flat fold has no apply route: its modes are not the weight's in and out. Leave route=None.")
        self.map = fixed_map(self.spec.projection, self.group.inner, self.group.length)
        self._build_all = compiled(make_plan(self.graph, "delta", 1, self.profile, self.optimize, fixed=False), self.backend)
        self._multiply = {target: self._dense((d_out, d_in)) for target, (_, d_out, d_in) in self.group.members.items()}
        self._shared: dict[str, Tensor] = {}
        self._stamp: list[tuple[int, int]] = []
        self._detached = False

    @property
    def fan_in(self) -> int:
        """The members' largest in."""
        return max(d_in for _, _, d_in in self.group.members.values())

    def _pieces(self, groups: range) -> Tensor:
        """The elements of a run of groups one after another, scale included."""
        # A map may be nonlinear, so the scale waits until after it.
        alpha = 1.0 if self.map is not None else self.scale
        nodes = self.tensors()
        if self.group.groups == 1:
            rows = self._build(*nodes, alpha=alpha).unsqueeze(0)
        elif len(groups) == self.group.groups:
            rows = self._build_all(*nodes, alpha=alpha)
        else:
            rows = torch.stack([self._build(*(tensor[g] for tensor in nodes), alpha=alpha) for g in groups])
        rows = rows[:, : self.group.inner]
        if self.map is not None:
            rows = self.map(rows) * self.scale
        longer = sum(self.group.start(g + 1) - self.group.start(g) == self.group.length for g in groups)
        if longer == len(groups):
            return rows[:, : self.group.length].reshape(-1)
        return torch.cat([rows[:longer, : self.group.length].reshape(-1), rows[longer:, : self.group.length - 1].reshape(-1)])

    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in): cut from the groups it lies in."""
        start, d_out, d_in = self.group.members[target]
        end = start + d_out * d_in
        touched = [g for g in range(self.group.groups) if self.group.start(g) < end and self.group.start(g + 1) > start]
        groups = range(touched[0], touched[-1] + 1)
        first = self.group.start(groups[0])
        return self._pieces(groups)[start - first : end - first].reshape(d_out, d_in)

    def share(self) -> None:
        """Build dW of all members at once, for the forward pass of the model that follows.

        The members' layers take it from here until its gradient has come back, or the next pass builds anew.
        """
        flat = self._pieces(range(self.group.groups))
        members = self.group.members
        pieces = torch.split(flat, [d_out * d_in for _, d_out, d_in in members.values()])
        shapes = [shape[1:] for shape in members.values()]
        self._shared = {t: p.reshape(s) for t, p, s in zip(members, pieces, shapes, strict=True)}
        self._stamp, self._detached = self._state(), False
        if flat.requires_grad:
            flat.register_hook(lambda _: self.release())  # type: ignore[no-untyped-call]

    def _state(self) -> list[tuple[int, int]]:
        """What the shared dW was made from: the tensors and how often each was written."""
        return [(id(tensor), tensor._version) for tensor in self.tensors()]

    def release(self) -> None:
        """Forget the shared dW."""
        self._shared = {}

    def current(self, target: str) -> Tensor:
        """dW of a target: the shared one, where this pass built it and may differentiate through it.

        Re-entrant checkpointing runs a block first without gradients and again, alone, during backward. Its second
        run may not share a graph with other blocks, so it builds dW for itself.
        """
        shared = self._shared.get(target)
        if shared is None or not is_eager() or self._stamp != self._state():
            return self.delta(target)
        if not torch.is_grad_enabled():
            self._detached = shared.requires_grad
            return shared.detach()
        return self.delta(target) if self._detached else shared

    def forward(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """See `Adapter.forward`."""
        x = x if x.dtype == out.dtype else x.to(out.dtype)
        if self.spec.dropout:
            x, base = self.drop(x), None
        return self._multiply[target](x, self.current(target).to(out.dtype), out=out, base=base)

    def __getstate__(self) -> dict[str, Any]:
        """Shared tensors belong to one pass and are neither copied nor pickled."""
        return {**self.__dict__, "_shared": {}}


def make_adapter(
    spec: AdapterSpec,
    group: Group,
    graph: Graph,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
    backend: str = "tensorly_torch",
    route: Route | None = None,
    optimize: Optimizer = "dp",
) -> Adapter:
    """The adapter of one group, filled with its first values.

    Args:
        spec, group, graph: from `AdapterSpec.lay_out`.
        dtype: of the parameters.
        device: where they live.
        generator: source of the first values.
        backend: the name of the backend.
        route: force a route; None lets the cost decide, call by call.
        optimize: opt_einsum optimizer, as in `plan.make_plan`.
    """
    place = device or torch.device("cpu")
    kind = FlatAdapter if isinstance(group, FlatGroup) else PhysicalAdapter
    adapter = kind(spec, group, graph, backend, route, optimize, DEVICES.get(place.type, CPU))
    adapter.fill(dtype, place, generator)
    return adapter
