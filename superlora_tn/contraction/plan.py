"""Contraction plans: the path (opt_einsum's), its steps in the order the memory has them, their cost, and the route.

This is the only importer of opt_einsum. A plan is made once for a graph and a number of tokens, is cached, prints,
and is what a backend compiles. Two routes read one graph: `apply` contracts the activation x through the network,
`delta` contracts the network alone to dW and multiplies x by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import opt_einsum as oe

from superlora_tn.contraction.layout import Equation, Indices, Step, volume
from superlora_tn.contraction.profile import CPU, ITEM, Device
from superlora_tn.contraction.search import Optimizer, PlanError, steps_of
from superlora_tn.declare.bounds import KEPT_STEPS, PEAK_SPARE, PEAK_TIMES
from superlora_tn.declare.cache import kept
from superlora_tn.declare.checks import shown
from superlora_tn.declare.parts import TOKEN
from superlora_tn.network.applied import applied
from superlora_tn.network.graph import Graph, GraphNode

Route = Literal["apply", "delta"]


class _AboveLimit(PlanError):
    """The best path found needs more than the memory limit."""


@dataclass(frozen=True)
class Plan:
    """How one equation is contracted.

    Attributes:
        route: `apply` or `delta`.
        names: operand names; on the apply route the first is ``x``.
        inputs: the indices of each operand.
        shapes: the stored shape of each operand; None for x, whose leading axes are free.
        result: the indices of the result, one tuple an axis.
        sizes: (index, size); on the apply route `token` is the number of tokens planned for.
        steps: the pairwise contractions.
        device: what it was priced for.
    """

    route: Route
    names: tuple[str, ...]
    inputs: tuple[Indices, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    result: tuple[Indices, ...]
    sizes: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]
    device: Device
    optimizer: str

    @cached_property
    def size(self) -> Mapping[str, int]:
        """Index -> size."""
        return dict(self.sizes)

    @property
    def output(self) -> Indices:
        """The indices of the result in the order of memory."""
        return tuple(i for axis in self.result for i in axis)

    @property
    def flops(self) -> int:
        """Forward FLOPs."""
        return sum(s.flops for s in self.steps)

    @property
    def bytes(self) -> int:
        """Forward bytes read and written."""
        return sum(s.bytes for s in self.steps)

    @property
    def peak(self) -> int:
        """Bytes of the largest intermediate (the result is not one)."""
        return max((volume(s.result, self.size) * ITEM for s in self.steps[:-1]), default=0)

    @property
    def price(self) -> float:
        """Seconds, forward plus backward, on the device."""
        return sum(s.price(self.device) for s in self.steps)

    @property
    def equation(self) -> str:
        """The equation in index names."""
        return f"{', '.join(' '.join(i) or '1' for i in self.inputs)} -> {' '.join(self.output) or '1'}"

    @cached_property
    def symbols(self) -> str:
        """The equation as opt_einsum and cotengra read it."""
        symbol = {name: oe.get_symbol(k) for k, (name, _) in enumerate(self.sizes)}
        terms = ["".join(symbol[i] for i in indices) for indices in (*self.inputs, self.output)]
        return f"{','.join(terms[:-1])}->{terms[-1]}"

    @cached_property
    def path(self) -> list[tuple[int, ...]]:
        """The contraction path as opt_einsum writes it (positions in a shrinking list)."""
        alive = list(range(len(self.inputs)))
        path: list[tuple[int, ...]] = []
        for k, step in enumerate(self.steps):
            places = tuple(sorted((alive.index(step.large), alive.index(step.small))))
            path.append(places)
            for place in reversed(places):
                del alive[place]
            alive.append(len(self.inputs) + k)
        return path or [tuple(alive)]

    def __str__(self) -> str:
        label = [*self.names, *(f"t{k + 1}" for k in range(len(self.steps)))]
        rows = [("step", "contraction", "FLOPs", "bytes", "as")]
        for k, s in enumerate(self.steps):
            text = (
                f"{label[s.large]}[{' '.join(s.large_indices)}] {label[s.small]}[{' '.join(s.small_indices)}]"
                f" -> [{' '.join(s.result)}]"
            )
            kind = "product" if not s.contracted else "batched matmul" if s.items else "matmul"
            kind += " + permute" if s.permuted else ""
            rows.append((label[len(self.names) + k], text, f"{s.flops:,}", f"{s.bytes:,}", kind))
        return "\n".join(
            [
                f"{self.route} route: {', '.join(self.names)}",
                f"equation   {self.equation}",
                f"path       {self.path} (opt_einsum, {self.optimizer})",
                *table(rows),
                f"forward    {self.flops:,} FLOPs, {self.bytes:,} bytes; peak intermediate {self.peak:,} bytes",
            ]
        )


def table(rows: Sequence[Sequence[str]], right: str = "FLOPs bytes") -> list[str]:
    """Rows of text as aligned columns; a column whose heading is in `right` is set flush right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    flush = [head in right.split() for head in rows[0]]
    return [
        "  ".join(cell.rjust(w) if f else cell.ljust(w) for cell, w, f in zip(row, widths, flush, strict=True)).rstrip()
        for row in rows
    ]


@kept(8192, KEPT_STEPS, lambda plan, *_, **__: len(plan.names))
def make_plan(
    graph: Graph,
    route: Route,
    tokens: int = 1,
    device: Device = CPU,
    optimize: Optimizer = "dp",
    memory_limit: int | None = None,
    fixed: bool = True,
) -> Plan:
    """Plan one route of a graph.

    Args:
        graph: the network.
        route: `apply` (x is contracted with the network) or `delta` (the network alone).
        tokens: rows of x; the delta route does not depend on it.
        device: the balance to price for.
        optimize: "dp" searches on our own price: all paths up to 8 operands, up to 33 those over operands in some rows and,
            where these are few, all without outer products, all beside opt_einsum's "greedy", which it is above that; any
            other name or optimizer object that opt_einsum takes is used as it is.
        memory_limit: the largest allowed intermediate, in bytes.
        fixed: the member indices are chosen beforehand (the usual case); False contracts all members at once, with one
            axis of the result for each member mode in front.

    Raises:
        PlanError: the graph is a sum, the route does not exist for it, nothing fits the memory limit, or dW, without which no
            layer can do, needs an intermediate that no machine has room for beside the weights; tokens that are no
            whole number of at least 1, a memory limit that is no number of bytes, a device that is no `Device`, or an optimizer
            whose path is none.
    """
    if route not in ("apply", "delta"):
        raise PlanError(f"a plan was asked for route={shown(route)}; choose 'apply' or 'delta'.")
    _check_rows(tokens, device, memory_limit)
    if graph.terms:
        raise PlanError(
            f"dW is a sum of {len(graph.terms)} networks, and each has plans of its own; plan them one by one (`graph.terms`)."
        )
    plan = plan_equation(_equation(graph, route, tokens, fixed), route, device, optimize, memory_limit)
    if route == "delta":
        _check_peak(plan, graph)
    return plan


def _check_rows(tokens: object, device: object, memory_limit: object) -> None:
    """Raise for rows of x, a device or a limit that nothing could be priced for."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise PlanError(f"a plan was asked for tokens={shown(tokens)}; give the rows of x, a whole number of at least 1.")
    if not isinstance(device, Device):
        raise PlanError(
            f"a plan was asked for device={shown(device)}; give a Device, such as calibrate() measures, or leave it."
        )
    if memory_limit is not None and (not isinstance(memory_limit, int) or isinstance(memory_limit, bool) or memory_limit < 0):
        raise PlanError(
            f"a plan was asked for memory_limit={shown(memory_limit)}; give bytes, a whole number of at least 0, or leave it."
        )


def _check_peak(plan: Plan, graph: Graph) -> None:
    numbers, most = plan.peak // ITEM, PEAK_TIMES * (graph.num_numbers + volume(plan.output, plan.size)) + PEAK_SPARE
    if numbers > most:
        raise PlanError(
            f"to build dW, the best path found needs an intermediate of {numbers:,} numbers, above {most:,}: the network's "
            f"{len(plan.names)} nodes of {graph.num_numbers:,} numbers hang together too closely. Declare smaller or fewer "
            "bonds."
        )


def sub_network(graph: Graph, nodes: Sequence[GraphNode], result: tuple[Indices, ...], fixed: bool = True) -> Equation:
    """The equation of some nodes of a graph, for one member or (not `fixed`) for all."""
    return Equation(
        tuple(n.name for n in nodes),
        tuple(graph.indices_of(n, fixed) for n in nodes),
        tuple(graph.shape_of(n, fixed) for n in nodes),
        tuple(n.trainable for n in nodes),
        result,
        graph.sizes,
    )


def grown(graph: Graph, nodes: Sequence[int], free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Numbers of nodes, and again with all of the free ones that hang on them, until none is left."""
    indices = [set(graph.indices_of(n, fixed=True)) for n in graph.nodes]
    found, more = list[int](), list(nodes)
    while more:
        found = sorted([*found, *more])
        yield tuple(found)
        touched = set[str]().union(*(indices[k] for k in found))
        more = [k for k in free if k not in found and touched & indices[k]]


def _equation(graph: Graph, route: Route, tokens: int, fixed: bool) -> Equation:
    """The equation of a graph's route: dW, or x through it."""
    if route == "delta":
        member = tuple(indices for mode, indices in graph.modes if mode.role == "member" and not fixed)
        axes = (graph.open("flat"),) if graph.is_flat else (graph.open("out"), graph.open("in"))
        return sub_network(graph, graph.nodes, (*member, *axes), fixed)
    if not fixed:
        raise PlanError("the apply route is planned for one member: x belongs to one layer. Leave fixed=True.")
    if graph.is_flat:
        raise PlanError("a flat fold has only the delta route: its modes are not the weight's in and out.")
    graph = applied(graph).graph
    return sub_network(graph, graph.nodes, ((TOKEN,), graph.open("out"))).fed(graph.open("in"), tokens)


@kept(1024, KEPT_STEPS, lambda plan, *_, **__: len(plan.names))
def plan_equation(
    equation: Equation,
    route: Route = "delta",
    device: Device = CPU,
    optimize: Optimizer = "dp",
    memory_limit: int | None = None,
) -> Plan:
    """Plan any equation; the arguments and errors of `make_plan`."""
    used = {i for term in equation.inputs for i in term}
    size = {i: s for i, s in equation.sizes if i in used}
    steps = steps_of(equation, size, device, optimize, memory_limit)
    plan = Plan(
        route,
        equation.names,
        equation.inputs,
        equation.shapes,
        equation.result,
        tuple(size.items()),
        steps,
        device,
        str(optimize),
    )
    if memory_limit is not None and plan.peak > memory_limit:
        less = "plan for fewer tokens, or take the other route" if route == "apply" else "or declare smaller bonds"
        raise _AboveLimit(
            f"the {route} route needs an intermediate of {plan.peak:,} bytes, above memory_limit={memory_limit:,}; "
            f"raise the limit, {less}."
        )
    return plan


@dataclass(frozen=True)
class RouteChoice:
    """Both routes of a layer at a number of tokens, and which is cheaper."""

    apply: Plan | None
    delta: Plan
    tokens: int
    shape: tuple[int, int]
    memory_limit: int | None = None

    @property
    def delta_fits(self) -> bool:
        """Whether building dW keeps to the memory limit; dW's own plan is there all the same, to merge by."""
        return self.memory_limit is None or self.delta.peak <= self.memory_limit

    @property
    def route(self) -> Route:
        """The cheaper route of those that the memory limit leaves."""
        return "delta" if self.apply is None or (self.delta_fits and self.delta_price < self.apply.price) else "apply"

    @property
    def delta_price(self) -> float:
        """Seconds to build dW and multiply x by it, forward plus backward."""
        d_out, d_in = self.shape
        moved = ITEM * (self.tokens * (d_in + d_out) + d_out * d_in)
        device = self.delta.device
        product = 2 * self.tokens * d_out * d_in / device.flops + moved / device.bandwidth + device.latency
        return self.delta.price + 3 * product

    @property
    def price(self) -> float:
        """Seconds of the cheaper route, forward plus backward."""
        return self.delta_price if self.apply is None or self.route == "delta" else self.apply.price

    @property
    def chosen(self) -> Plan:
        """The plan of the cheaper route."""
        return self.apply if self.apply is not None and self.route == "apply" else self.delta

    def __str__(self) -> str:
        device = self.delta.device.name
        above = f"needs an intermediate above memory_limit={self.memory_limit or 0:,}"
        prices: dict[Route, str] = {"delta": f"{self.delta_price * 1e3:.3f} ms" if self.delta_fits else above}
        absent = "not possible with a flat fold" if len(self.delta.result) == 1 else above
        prices["apply"] = f"{self.apply.price * 1e3:.3f} ms" if self.apply else absent
        other: Route = "apply" if self.route == "delta" else "delta"
        return (
            f"{self.chosen}\n"
            f"price      {prices[self.route]} for {self.tokens:,} tokens on {device}, forward + backward\n"
            f"refused    {other} route: {prices[other]}"
        )


def weight_price(choice: RouteChoice) -> float:
    """Seconds of an adapter whose dW is added to the weight before x meets it, forward plus backward.

    dW is built and added to W, of which a copy is written; x goes through the sum as it would through W, and the gradient of
    dW takes one product.
    """
    d_out, d_in = choice.shape
    device, elements = choice.delta.device, d_out * d_in
    added = 3 * ITEM * elements / device.bandwidth + device.latency
    gradient = 2 * choice.tokens * elements / device.flops + device.latency
    return choice.delta.price + added + gradient + ITEM * (choice.tokens * (d_in + d_out) + elements) / device.bandwidth


def choose(
    graph: Graph,
    shape: tuple[int, int],
    tokens: int,
    device: Device = CPU,
    optimize: Optimizer = "dp",
    memory_limit: int | None = None,
) -> RouteChoice:
    """Plan both routes of a graph for a number of tokens, for a weight of shape (out, in).

    Raises:
        PlanError: see `make_plan`; a memory limit that only one of the routes keeps to leaves that one.
    """
    _check_rows(tokens, device, memory_limit)
    try:
        delta = make_plan(graph, "delta", 1, device, optimize, memory_limit)
    except _AboveLimit:
        if graph.is_flat:
            raise
        delta = make_plan(graph, "delta", 1, device, optimize)
    found = RouteChoice(None, delta, tokens, shape, memory_limit)
    if not graph.is_flat:
        try:
            found = replace(found, apply=make_plan(graph, "apply", tokens, device, optimize, memory_limit))
        except _AboveLimit as error:
            if not found.delta_fits:
                raise PlanError(f"{error} The delta route does not keep to the limit either.") from error
    return found
