"""The routes of a sum of networks: each network with its own two, and what all of them cost together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from superlora_tn.contraction.plan import RouteChoice, choose
from superlora_tn.contraction.profile import CPU, ITEM, Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.network.graph import Graph, Term


@dataclass(frozen=True)
class SumChoice:
    """Both routes of each network of a sum at a number of tokens, and which are cheaper; print it.

    Attributes:
        each: the networks with their routes; of a cropped one those of its size before the crop.
        crops: of each, seconds to pad x and to cut outputs, forward plus backward.
    """

    each: tuple[tuple[Term, RouteChoice], ...]
    crops: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Rows of x."""
        return self.each[0][1].tokens

    @property
    def price(self) -> float:
        """Seconds of all networks, each by its cheaper route, forward plus backward."""
        return sum(choice.price for _, choice in self.each) + sum(self.crops)

    def __str__(self) -> str:
        lines, count = list[str](), len(self.each)
        for k, (term, choice) in enumerate(self.each):
            which = f"term {k + 1}/{count}" if count > 1 else "network"
            lines += [f"{which:<10} {term.equation().removeprefix('+ ')}", str(choice)]
        if any(self.crops):
            lines.append(f"crop       {1e3 * sum(self.crops):.3f} ms to pad x and to cut outputs, forward + backward")
        if count > 1 or any(self.crops):
            whole = f"{1e3 * self.price:.3f} ms for {self.tokens:,} tokens"
            lines.append(f"whole      {whole}, each network by its cheaper route")
        return "\n".join(lines)


Choice = RouteChoice | SumChoice


def routes(graph: Graph, shape: tuple[int, int], tokens: int, device: Device = CPU, optimize: Optimizer = "dp") -> Choice:
    """Plan both routes of the one network of a graph, or of each where it is a sum; the arguments of `choose`."""
    found = choose_all(graph, shape, tokens, device, optimize)
    return found if graph.terms else found.each[0][1]


def choose_all(
    graph: Graph,
    shape: tuple[int, int],
    tokens: int,
    device: Device = CPU,
    optimize: Optimizer = "dp",
    memory_limit: int | None = None,
) -> SumChoice:
    """Plan both routes of each network of a sum, or of the one there is; the arguments of `choose`."""

    def planned(term: Term) -> RouteChoice:
        own = padded_shape(term) if term.crops else shape
        return choose(term.graph, own, tokens, device, optimize, memory_limit)

    found = tuple((term, planned(term)) for term in graph.networks)
    return SumChoice(found, tuple(crop_price(term, shape, tokens, device) for term, _ in found))


def crop_price(term: Term, shape: tuple[int, int], tokens: int, device: Device = CPU) -> float:
    """Seconds to pad x to the larger modes of a cropped network and to cut and add its outputs, forward plus backward.

    Args:
        term: of a sum; nothing is padded or cut of a mode that it does not crop.
        shape: (out, in) of the weight.
        tokens: rows of x.
        device: the balance to price for.
    """
    cropped, seconds = {mode for mode, _ in term.crops}, 0.0
    for role, own, passes in (("out", shape[0], 2), ("in", shape[1], 1)):
        modes = [mode for mode, _ in term.graph.modes if mode.role == role]
        if any(mode.name in cropped for mode in modes):
            padded = math.prod(mode.size for mode in modes)
            seconds += 2 * (ITEM * tokens * (passes * own + padded) / device.bandwidth + device.latency)
    return seconds


def padded_shape(term: Term) -> tuple[int, int]:
    """(out, in) of a network of a sum, before it is cropped."""
    out, inward = (math.prod(m.size for m, _ in term.graph.modes if m.role == role) for role in ("out", "in"))
    return out, inward
