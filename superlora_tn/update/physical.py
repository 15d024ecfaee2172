"""The adapter of a physical fold: x through the network, or through dW, by the cheaper route."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.cut import halves
from superlora_tn.contraction.plan import Route, choose, make_plan
from superlora_tn.contraction.profile import Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.contraction.sharing import Scheme, scheme
from superlora_tn.declare.fold import PhysicalGroup, Shape
from superlora_tn.network.graph import Graph
from superlora_tn.update.base import NOMINAL_TOKENS, TOKEN_STEPS, Adapter, Run, state
from superlora_tn.update.eager import is_eager


@dataclass(frozen=True)
class _Stage:
    """What a call of so many tokens runs: x through the common nodes (if any), then the others; nothing: the delta route."""

    common: Run | None
    rest: Run | None


Schedule = tuple[tuple[int, _Stage], ...]


@lru_cache(maxsize=4096)
def _schedule(
    graph: Graph, shape: Shape, route: Route | None, divided: Scheme, profile: Device, optimize: Optimizer, backend: str
) -> Schedule:
    """(tokens from which on, what to run), from many tokens to few."""
    stages: list[tuple[int, _Stage]] = []
    for tokens in TOKEN_STEPS:
        stage = _Stage(None, None)
        if route == "apply" or (route is None and choose(graph, shape, tokens, profile, optimize).route == "apply"):
            common, rest = divided.plans(tokens, profile, optimize)
            stage = _Stage(None if common is None else compiled(common, backend), compiled(rest, backend))
        stages.insert(0, (tokens if stages else 0, stage))
    return tuple(stages)


@dataclass
class _Carried:
    """x through the common nodes, and all that it was made in."""

    x: Any  # a weak reference
    made_in: tuple[Any, ...]
    value: Tensor


class PhysicalAdapter(Adapter):
    """The adapter of weights of one shape, with physical modes; both routes.

    What its members share is made once: the sub-networks that do not depend on x when the model's pass begins, and x
    through the common nodes when the first of the layers that read this x is called.
    """

    group: PhysicalGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prepare()

    def prepare(self) -> None:
        """See `Adapter.prepare`."""
        settings = (self.profile, self.optimize)
        self._build: Run = compiled(make_plan(self.graph, "delta", 1, *settings), self.backend)
        blocks = Counter(target.rpartition(".")[0] for target in self.group.members)
        # Weights that are named side by side read the same x, as far as names tell.
        self._siblings = frozenset(t for t in self.group.members if blocks[t.rpartition(".")[0]] > 1)
        self._scheme = scheme(self.graph, max(blocks.values()), NOMINAL_TOKENS, *settings)
        self._runs = _schedule(self.graph, self.group.shape, self.route, self._scheme, *settings, self.backend)
        self._roots = [(r, compiled(r.together, self.backend), compiled(r.single, self.backend)) for r in self._scheme.roots]
        self._inside = sorted({k for root in self._scheme.roots for k in root.leaves})
        self._select = {target: self._selections(positions) for target, positions in self.group.members.items()}
        self._multiply = self._dense(self.group.shape)
        self._halves = None if self.route == "delta" else halves(self.graph, *settings)
        parts = () if self._halves is None else (self._halves.outer, self._halves.inner)
        self._half_runs = [(half.nodes, compiled(half.plan, self.backend)) for half in parts]
        self._carried: _Carried | None = None

    def _selections(self, positions: tuple[int, ...]) -> tuple[dict[int, Any], tuple[int, ...]]:
        """For a member: the index expressions of the nodes with member axes, and its place in each root."""
        values = self.graph.member_values(positions)
        places = []
        for root in self._scheme.roots:
            place = 0
            for index in (i for i in root.indices if i in values):
                place = place * self.graph.size[index] + values[index]
            places.append(place)
        select = enumerate(self.graph.select(positions))
        return {k: s for k, s in select if any(isinstance(i, int) for i in s)}, tuple(places)

    @property
    def fan_in(self) -> int:
        """The members' in."""
        return self.group.shape[1]

    def _member(self, target: str) -> list[Tensor]:
        """The nodes' tensors for one member."""
        nodes = self.tensors()
        for k, select in self._select[target][0].items():
            nodes[k] = nodes[k][select]
        return nodes

    def _leaves(self) -> list[Tensor]:
        """The tensors of all nodes that are in a root."""
        nodes = self.tensors()
        return [nodes[k] for k in self._inside]

    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in)."""
        return self._build(*self._member(target), alpha=self.scale)

    def halves(self, target: str, rows: int, blocks: int = 1) -> tuple[Tensor, Tensor] | None:
        """See `Adapter.halves`."""
        if self._halves is None or (self.route is None and not self._halves.pays(self.group.shape, rows, blocks)):
            return None
        nodes = self._member(target)
        outer, inner = (
            run(*(nodes[k] for k in own), alpha=alpha)
            for (own, run), alpha in zip(self._half_runs, (self.scale, 1.0), strict=True)
        )
        return outer, inner

    @property
    def shares(self) -> bool:
        """Whether anything is made once for several members."""
        return bool(self._roots or self._scheme.common)

    def begin(self) -> None:
        """Contract the roots for all members, where they changed."""
        if not is_eager() or not self.active:
            return
        self._carried, leaves = None, self._leaves()
        if not self._roots or self._kept.holds(leaves):
            return
        nodes = self.tensors()
        made = [together(*(nodes[k] for k in root.leaves)) for root, together, _ in self._roots]
        member = self.graph.open("member")
        views: dict[Any, Tensor] = {}
        for r, (root, value) in enumerate(zip(self._scheme.roots, made, strict=True)):
            own = value.shape[sum(i in member for i in root.indices) :]
            # Taken apart once: the members' gradients come together in one tensor.
            views |= {(r, place): part for place, part in enumerate(value.reshape(-1, *own).unbind())}
        self._kept.keep(views, leaves, made, again=True)

    def end(self) -> None:
        """No other layer reads the last x."""
        if is_eager():
            self._carried = None

    def _operands(self, target: str, dtype: torch.dtype) -> list[Tensor]:
        """The tensors of the scheme's graph for one member, in a dtype."""
        nodes = self._member(target)
        if self._roots:
            leaves = self._leaves()
            kept = [self._kept.get((r, place), leaves) for r, place in enumerate(self._select[target][1])]
            roots = [
                single(*(nodes[k] for k in root.leaves)) if value is None else value
                for value, (root, _, single) in zip(kept, self._roots, strict=True)
            ]
            nodes = [n for k, n in enumerate(nodes) if k not in self._inside] + roots
        return [n.to(dtype) for n in nodes] if any(n.dtype != dtype for n in nodes) else nodes

    def _carry(self, x: Tensor, cast: Tensor, run: Run, nodes: list[Tensor]) -> Tensor:
        """x through the common nodes: made once for all calls with this x, and let go when its gradient has come."""
        made_in = (
            run,
            x._version,
            cast.dtype,
            torch.is_grad_enabled(),
            torch._C._current_graph_task_id(),
            state(self.tensors()),
        )
        carried = self._carried
        if carried is not None and carried.x() is x and carried.made_in == made_in:
            return carried.value
        value = run(cast, *nodes)
        if value.requires_grad:
            value.register_hook(lambda _: self.end())  # type: ignore[no-untyped-call]
        self._carried = _Carried(weakref.ref(x), made_in, value)
        return value

    def forward(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """See `Adapter.forward`."""
        # A traced program is for all numbers of tokens: no branch on them.
        tokens = NOMINAL_TOKENS if torch.compiler.is_compiling() else math.prod(x.shape[:-1])
        cast = x if x.dtype == out.dtype else x.to(out.dtype)
        if self.spec.dropout:
            # The layer's own gradient goes through x itself, so the two can no longer be one.
            cast, base = self.drop(cast), None
        stage = next((stage for least, stage in self._runs if tokens >= least), self._runs[-1][1])
        if stage.rest is None:
            return self._multiply(cast, self.delta(target).to(out.dtype), out=out, base=base)
        nodes = self._operands(target, out.dtype)
        if stage.common is None:
            return stage.rest(cast, *nodes, out=out, alpha=self.scale, base=base)
        first = [nodes[k] for k in self._scheme.common]
        mine = target not in self._siblings or self.spec.dropout or x.is_inference() or not is_eager()
        t = stage.common(cast, *first) if mine else self._carry(x, cast, stage.common, first)
        rest = [nodes[k] for k in self._scheme.rest]
        return stage.rest(t, *rest, out=out, alpha=self.scale, base=base, through=cast)

    def __getstate__(self) -> dict[str, Any]:
        """What one pass shares is neither copied nor pickled."""
        return {**self.__dict__, "_carried": None}
