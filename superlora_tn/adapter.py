"""One torch module a group: the nodes' tensors, dW of a member, and x through it by the cheaper route."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.execute import compiled
from superlora_tn.fold import FlatGroup, Group, PhysicalGroup
from superlora_tn.graph import Graph
from superlora_tn.initialise import first_values
from superlora_tn.nodes import SpecError
from superlora_tn.plan import Optimizer, Route, choose, make_plan
from superlora_tn.projection import fixed_map
from superlora_tn.spec import AdapterSpec
from superlora_tn.steps import CPU, DEVICES, Device

# Plans are made for these numbers of tokens; a call takes the plan of the largest that is not above its own.
TOKEN_STEPS = (1, 32, 1024, 32768)
Run = Callable[..., Tensor]


class Adapter(nn.Module):
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
    def fan_in(self) -> int:
        """Length of the rows of the members (the longest, where they differ)."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """The nodes' tensors in graph order."""
        # The module's own tables, since getattr and get_parameter cost more than a small matmul.
        parameters, buffers = self._parameters, self._buffers
        return [parameters[name] if name in parameters else buffers[name] for name in self._names]  # type: ignore[misc]

    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in), in the parameters' dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor, target: str, out: Tensor) -> Tensor:
        """``out + x dW^T`` for a target: x (..., in), out (..., out); in out's dtype."""
        raise NotImplementedError

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the adapter's input, while training."""
        return functional.dropout(x, self.spec.dropout, self.training) if self.spec.dropout else x


class PhysicalAdapter(Adapter):
    """The adapter of weights of one shape, with physical modes; both routes."""

    group: PhysicalGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._select = {
            target: tuple(s if any(isinstance(i, int) for i in s) else None for s in self.graph.select(positions))
            for target, positions in self.group.members.items()
        }
        self._runs = self._schedule()

    @property
    def fan_in(self) -> int:
        """The members' in."""
        return self.group.shape[1]

    def _schedule(self) -> tuple[tuple[int, Run | None], ...]:
        """(tokens from which on, apply program or None for the delta route), from many tokens to few."""
        if self.route == "delta":
            return ((0, None),)
        runs: list[tuple[int, Run | None]] = []
        last = None
        for tokens in TOKEN_STEPS:
            choice = choose(self.graph, self.group.shape, tokens, self.profile, self.optimize)
            plan = choice.chosen if self.route is None else choice.apply
            assert plan is not None
            same = (plan.route, plan.path)
            if same != last:
                run = compiled(plan, self.backend) if plan.route == "apply" else None
                runs.insert(0, (tokens if runs else 0, run))
            last = same
        return tuple(runs)

    def _member(self, target: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The nodes' tensors for one member, in a dtype."""
        chosen = []
        for tensor, select in zip(self.tensors(), self._select[target], strict=True):
            one = tensor if select is None else tensor[select]
            chosen.append(one if dtype is None or one.dtype == dtype else one.to(dtype))
        return chosen

    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in)."""
        return self._build(*self._member(target), alpha=self.scale)

    def forward(self, x: Tensor, target: str, out: Tensor) -> Tensor:
        """``out + x dW^T``: x (..., in), out (..., out)."""
        tokens = math.prod(x.shape[:-1])
        run = next(run for least, run in self._runs if tokens >= least)
        if run is None:
            return out + functional.linear(self.drop(x).to(out.dtype), self.delta(target).to(out.dtype))
        return run(self.drop(x).to(out.dtype), *self._member(target, out.dtype), out=out, alpha=self.scale)


class FlatAdapter(Adapter):
    """The adapter of a flat fold: groups are runs of one long vector, and a weight is a slice of it. Delta route only."""

    group: FlatGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.route == "apply":
            raise SpecError("a flat fold has no apply route: its modes are not the weight's in and out. Leave route=None.")
        self.map = fixed_map(self.spec.projection, self.group.inner, self.group.length)

    @property
    def fan_in(self) -> int:
        """The members' largest in."""
        return max(d_in for _, _, d_in in self.group.members.values())

    def vector(self, group: int) -> Tensor:
        """The elements of one group, scale included, shape (its length,)."""
        nodes = self.tensors()
        if self.group.groups > 1:
            nodes = [tensor[group] for tensor in nodes]
        # A map may be nonlinear, so the scale waits until after it.
        flat = self._build(*nodes, alpha=1.0 if self.map is not None else self.scale)[: self.group.inner]
        if self.map is not None:
            flat = self.map(flat) * self.scale
        return flat[: self.group.start(group + 1) - self.group.start(group)]

    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in): cut from the groups it lies in."""
        start, d_out, d_in = self.group.members[target]
        end, pieces = start + d_out * d_in, []
        for group in range(self.group.groups):
            low, high = self.group.start(group), self.group.start(group + 1)
            if low < end and high > start:
                pieces.append(self.vector(group)[max(start - low, 0) : end - low])
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(d_out, d_in)

    def forward(self, x: Tensor, target: str, out: Tensor) -> Tensor:
        """``out + x dW^T``: x (..., in), out (..., out)."""
        return out + functional.linear(self.drop(x).to(out.dtype), self.delta(target).to(out.dtype))


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
