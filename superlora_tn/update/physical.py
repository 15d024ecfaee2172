"""The adapter of a physical fold: x through the network, or through dW, by the cheaper route."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.chain import Chain, chain
from superlora_tn.contraction.cut import halves
from superlora_tn.contraction.plan import Route, choose, make_plan
from superlora_tn.contraction.profile import Device
from superlora_tn.contraction.rows import row_products
from superlora_tn.contraction.search import Optimizer
from superlora_tn.contraction.sharing import Scheme, scheme
from superlora_tn.declare.bounds import KEPT_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.declare.fold import PhysicalGroup, Shape
from superlora_tn.declare.joins import Magnitude
from superlora_tn.network.applied import applied
from superlora_tn.network.graph import Graph
from superlora_tn.update.base import NOMINAL_TOKENS, TOKEN_STEPS, Adapter, Member, Run, Side
from superlora_tn.update.eager import is_eager, is_recorded
from superlora_tn.update.links import Links
from superlora_tn.update.lookup import Lookup, lookup
from superlora_tn.update.passes import lasting, state
from superlora_tn.update.plain import by_matrix


@dataclass(frozen=True)
class _Stage:
    """What a call of so many tokens runs: x through the common nodes (if any), then the others; nothing: the delta route."""

    common: Run | None
    rest: Run | None


Schedule = tuple[tuple[int, _Stage], ...]


@kept(4096, KEPT_NODES, lambda _, graph, *__, **___: len(graph.nodes))
def _schedule(
    graph: Graph, shape: Shape, route: Route | None, divided: Scheme, profile: Device, optimize: Optimizer, backend: str
) -> Schedule:
    """(tokens from which on, what to run), from many tokens to few."""
    stages: list[tuple[int, _Stage]] = []
    for tokens in TOKEN_STEPS:
        stage = _Stage(None, None)
        if route == "apply" or (route is None and choose(graph, shape, tokens, profile, optimize).route == "apply"):
            common, rest = divided.plans(tokens, profile, optimize)
            first = None if common is None else compiled(common, backend)
            if first is not None and not callable(getattr(first, "carry", None)):  # a backend that cannot share x
                first, rest = None, make_plan(divided.graph, "apply", tokens, profile, optimize)
            stage = _Stage(first, compiled(rest, backend))
        stages.insert(0, (tokens if stages else 0, stage))
    return tuple(stages)


@dataclass(frozen=True)
class _Place:
    """A member's place in the network.

    Attributes:
        select: the index expressions of the nodes with member axes.
        applied: the same of the graph that x goes through.
        roots: its place in each root.
        has_siblings: whether other members read the same x, as far as names tell.
    """

    select: dict[int, Any]
    applied: dict[int, Any]
    roots: tuple[int, ...]
    has_siblings: bool


def _chosen(graph: Graph, positions: tuple[int, ...]) -> dict[int, Any]:
    """The index expressions of the nodes with member axes, for one member."""
    return {k: s for k, s in enumerate(graph.select(positions)) if any(isinstance(i, int) for i in s)}


def _selected(nodes: list[Tensor], select: dict[int, Any]) -> list[Tensor]:
    """The nodes with some of them indexed."""
    nodes = nodes.copy()
    for k, chosen in select.items():
        nodes[k] = nodes[k][chosen]
    return nodes


class PhysicalAdapter(Adapter):
    """The adapter of weights of one shape, with physical modes; both routes.

    What its members share is made once a pass: the sub-networks that do not depend on x, and x through the common nodes
    when the first of the layers that read this x is called.
    """

    group: PhysicalGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lookups: dict[Side, Lookup | None] = {}
        self._every: Run | None = None
        self._chains: dict[int, tuple[Chain, list[Run]] | None] = {}

    def prepare(self) -> None:
        """See `Adapter.prepare`."""
        settings, backend, route = (self.profile, self.settings.optimize), self.settings.backend, self.settings.route
        self._build: Run = compiled(make_plan(self.graph, "delta", 1, *settings), backend)
        blocks = Counter(target.rpartition(".")[0] for target in self.group.members)
        self._scheme = scheme(self.graph, max(blocks.values()), NOMINAL_TOKENS, *settings)
        self._runs = _schedule(self.graph, self.group.shape, route, self._scheme, *settings, backend)
        self._roots = [(r, compiled(r.together, backend), compiled(r.single, backend)) for r in self._scheme.roots]
        self._inside = sorted({k for root in self._scheme.roots for k in root.leaves})
        self._multiply = by_matrix(self.group.shape, self.profile, self.settings)
        self._halves = None if route == "delta" else halves(self.graph, *settings)
        parts = () if self._halves is None else (self._halves.outer, self._halves.inner)
        self._half_runs = [(half.nodes, compiled(half.plan, backend)) for half in parts]
        normed = isinstance(self.spec.join, Magnitude) and route != "delta"
        rows = row_products(self.graph, self.group.shape, *settings, route == "apply") if normed else None
        self._row_runs = None if rows is None else (compiled(rows.crossed, backend), compiled(rows.squared, backend))
        for name, positions in self.group.members.items():
            member = self.members[name]
            member.shape = self.group.shape
            # Weights that are named side by side read the same x, as far as names tell.
            member.place = self._place(positions, blocks[name.rpartition(".")[0]] > 1)
        for side in self._lookups:
            self.look_up(side)
        for kernel in self._chains:
            self.link_up(kernel)
        if self._every is not None:
            self.stack_up()

    def _place(self, positions: tuple[int, ...], has_siblings: bool) -> _Place:
        values = self.graph.member_values(positions)
        places = []
        for root in self._scheme.roots:
            place = 0
            for index in (i for i in root.indices if i in values):
                place = place * self.graph.size[index] + values[index]
            places.append(place)
        graph = applied(self.graph).graph
        select = _chosen(self.graph, positions)
        inside = select if graph is self.graph else _chosen(graph, positions)
        return _Place(select, inside, tuple(places), has_siblings)

    @property
    def fan_in(self) -> int:
        """The members' in."""
        return self.group.shape[1]

    @staticmethod
    def _nodes(member: Member, own: list[Tensor]) -> list[Tensor]:
        """The nodes' tensors for one member."""
        return _selected(own, member.place.select)

    def delta_of(self, member: Member) -> Tensor:
        """See `Adapter.delta`."""
        return self._build(*self._nodes(member, self.tensors()), alpha=self.scale)

    def current(self, member: Member) -> Tensor:
        """See `Adapter.current`; whoever reads a weight several times may take several gradients of what it reads."""
        scale = self.scale
        return lasting(lambda own: self._build(*self._nodes(member, list(own)), alpha=scale), self.tensors())

    def more(self, member: Member, weight: Tensor) -> Tensor | None:
        """See `Adapter.more`."""
        if self._row_runs is None:
            return None
        (crossed, squared), nodes = self._row_runs, self._nodes(member, self.tensors())
        wide = [n.to(torch.promote_types(n.dtype, torch.float32)) for n in nodes]
        # Beside ||W||^2 the product with W is small, so W's own half precision does: a wide copy would be as large as dW.
        half = weight.dtype in (torch.float16, torch.bfloat16)
        dtype = weight.dtype if half else torch.promote_types(weight.dtype, wide[0].dtype)
        meet = crossed(weight.to(dtype), *(n.to(dtype) for n in wide)).to(wide[0].dtype)
        return cast(Tensor, 2 * self.scale * meet + self.scale**2 * squared(*wide, *wide))

    def stack_up(self) -> None:
        """See `Adapter.stack_up`."""
        if len(self.group.members) > 1:
            plan = make_plan(self.graph, "delta", 1, self.profile, self.settings.optimize, fixed=False)
            self._every = compiled(plan, self.settings.backend)

    def is_all(self, members: Sequence[Member]) -> bool:
        """Whether these names are all of the group, in the order of the cells of the member modes."""
        # Members are numbered as they come, so the cells are in their order where their places are in order.
        places = list(self.group.members.values())
        return [m.name for m in members] == list(self.group.members) and places == sorted(places)

    def together(self, members: Sequence[Member]) -> Tensor | None:
        """See `Adapter.together`; whoever reads it may take several gradients of it."""
        if self._every is None or not self.is_all(members):
            return None
        every, scale = self._every, self.scale
        whole = lasting(lambda own: every(*own, alpha=scale), self.tensors())
        return whole.reshape(len(members), *self.group.shape)

    def halves(self, member: Member, rows: int, blocks: int = 1) -> tuple[Tensor, Tensor] | None:
        """See `Adapter.halves`."""
        if self._halves is None or (self.settings.route is None and not self._halves.pays(self.group.shape, rows, blocks)):
            return None
        return self.both_halves(member)

    def both_halves(self, member: Member) -> tuple[Tensor, Tensor]:
        """See `Adapter.halves`, whether they pay or not; only of a network that has a cut."""
        nodes = self._nodes(member, self.tensors())
        outer, inner = (
            run(*(nodes[k] for k in own), alpha=alpha)
            for (own, run), alpha in zip(self._half_runs, (self.scale, 1.0), strict=True)
        )
        return outer, inner

    def link_up(self, kernel: int) -> None:
        """See `Adapter.link_up`."""
        delta = self.settings.route == "delta"
        found = None if delta else chain(self.graph, kernel, self.profile, self.settings.optimize)
        runs = [] if found is None else [compiled(half.plan, self.settings.backend) for half in found.parts]
        self._chains[kernel] = None if found is None else (found, runs)

    def links(self, member: Member, kernel: int, rows: int, before: int, blocks: int = 1) -> Links | None:
        """See `Adapter.links`."""
        prepared = self._chains.get(kernel)
        if prepared is None or not prepared[0].fits(blocks):
            return None
        (found, runs), cut = prepared, self._halves
        if self.settings.route is None:
            cost, shape = found.cost(rows, before, blocks), self.group.shape
            if not found.pays(shape, rows, before, blocks) or (cut is not None and cut.cost(shape, rows, blocks) < cost):
                return None
        nodes = self._nodes(member, self.tensors())
        made = [
            run(*(nodes[k] for k in half.nodes), alpha=self.scale if half is found.core else 1.0)
            for half, run in zip(found.parts, runs, strict=True)
        ]
        thin = iter(made)
        before_, core, after, left = (None if half is None else next(thin) for half in found.links)
        assert core is not None
        return Links(before_, core, after, left, found.terms, found.sizes)

    def look_up(self, side: Side) -> None:
        """See `Adapter.look_up`."""
        optimize, backend = self.settings.optimize, self.settings.backend
        found = None if self.settings.route == "delta" else lookup(self.graph, side, self.profile, optimize, backend)
        self._lookups[side] = found

    def lookup(self, member: Member, numbers: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
        """See `Adapter.lookup`."""
        found = self._lookups.get(side)
        if found is None:
            return super().lookup(member, numbers, side, dtype)
        return found(numbers, self._nodes(member, self.tensors()), dtype, self.scale)

    @property
    def applies(self) -> bool:
        """See `Adapter.applies`."""
        return self.settings.route != "delta" and self.spec.join is None

    @property
    def shares(self) -> bool:
        """Whether anything is made once for several members."""
        return bool(self._roots or self._scheme.common or self._maps)

    def _operands(self, member: Member, own: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The tensors of the scheme's graph for one member, in a dtype."""
        nodes = _selected(own, member.place.applied)
        if self._roots:
            roots = [self._root(r, member, own, nodes) for r in range(len(self._roots))]
            nodes = [n for k, n in enumerate(nodes) if k not in self._inside] + roots
        return [n.to(dtype) for n in nodes] if any(n.dtype != dtype for n in nodes) else nodes

    def _root(self, r: int, member: Member, own: list[Tensor], nodes: list[Tensor]) -> Tensor:
        """One root for one member: from this pass, which makes it for all members together, or its own."""
        root, together, single = self._roots[r]
        leaves = [own[k] for k in root.leaves]

        def for_all() -> tuple[Tensor, ...]:
            value = lasting(lambda tensors: together(*tensors), leaves)
            members = sum(i in self.graph.open("member") for i in root.indices)
            # Taken apart once: the members' gradients come together in one tensor.
            return value.reshape(-1, *value.shape[members:]).unbind()

        made = self.passes.kept((id(self), r), leaves, for_all)
        if made is None:
            return lasting(lambda tensors: single(*tensors), [nodes[k] for k in root.leaves])
        return cast(Tensor, made[member.place.roots[r]])

    def _carry(self, member: Member, x: Tensor, cast_x: Tensor, run: Any, own: list[Tensor], nodes: list[Tensor]) -> Any:
        """x through the common nodes; in a pass made once for all siblings that read this x."""
        found = self.passes.current() if member.place.has_siblings and not self.spec.dropout else None
        if found is None or not found.in_its_own_graph:
            return run.carry(cast_x, *nodes)
        now = state([x, *own])
        if now is None:  # a tensor made in inference mode may be written to and nothing would tell
            return run.carry(cast_x, *nodes)
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        made_in = (run, now, x.requires_grad, cast_x.dtype, mode)
        held = found.carried.get(id(self))
        if held is None or held[0] != made_in:
            # x and the nodes are held, so that no other tensor gets their numbers.
            held = found.carried[id(self)] = (made_in, (x, *own), run.carry(cast_x, *nodes))
        return held[2]

    def update(
        self, member: Member, x: Tensor, out: Tensor | None, base: Tensor | None = None, training: bool = True
    ) -> Tensor:
        """See `Adapter.update`."""
        # A recorded program is for all numbers of tokens: no branch on them.
        tokens = NOMINAL_TOKENS if is_recorded() else math.prod(x.shape[:-1])
        dtype = x.dtype if out is None else out.dtype
        cast_x = x if x.dtype == dtype else x.to(dtype)
        if self.spec.dropout:
            # The layer's own gradient goes through x itself, so the two can no longer be one.
            cast_x, base = self.drop(cast_x, training), None
        stage = self._stage(tokens)
        if stage.rest is None:
            found = self._multiply(cast_x, self.delta_of(member).to(dtype), out=out, base=base)
        else:
            found = self._apply_route(member, stage, x, cast_x, out, base)
        return found if out is not None else found.reshape(*x.shape[:-1], member.shape[0])

    def _stage(self, tokens: int) -> _Stage:
        """What so many tokens run."""
        for least, stage in self._runs:
            if tokens >= least:
                return stage
        raise AssertionError  # the last is from 0 on

    def _apply_route(
        self, member: Member, stage: _Stage, x: Tensor, cast_x: Tensor, out: Tensor | None, base: Tensor | None
    ) -> Tensor:
        """x through the network; `cast_x` is x as it is computed with."""
        assert stage.rest is not None
        own = self.applied()
        nodes = self._operands(member, own, cast_x.dtype)
        if stage.common is None:
            return stage.rest(cast_x, *nodes, out=out, alpha=self.scale, base=base)
        first, rest = [nodes[k] for k in self._scheme.common], [nodes[k] for k in self._scheme.rest]
        if not is_eager():
            return stage.rest(stage.common(cast_x, *first), *rest, out=out, alpha=self.scale)
        carried = self._carry(member, x, cast_x, stage.common, own, first)
        return stage.rest(carried.value, *rest, out=out, alpha=self.scale, base=base, carried=carried)
