"""How the squared norms of the rows of W + dW follow from those of W without dW: ``2 <W, dW> + <dW, dW>``, row by row.

Both are contractions of the network's own graph that keep `out` alone: one with W as a further node, one with the nodes twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from superlora_tn.contraction.layout import Equation, Step
from superlora_tn.contraction.plan import Plan, make_plan, plan_equation, sub_network
from superlora_tn.contraction.profile import ITEM, Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.bounds import KEPT_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.network.graph import Graph


@dataclass(frozen=True)
class RowProducts:
    """The two contractions.

    Attributes:
        crossed: ``<W, dW>`` (out,); W (out, in) is the first operand.
        squared: ``<dW, dW>`` (out,); the operands are the nodes, and again the nodes.
    """

    crossed: Plan
    squared: Plan


@kept(4096, KEPT_NODES, lambda _, graph, *__, **___: len(graph.nodes))
def row_products(
    graph: Graph, shape: tuple[int, int], device: Device, optimize: Optimizer, always: bool = False
) -> RowProducts | None:
    """Both plans for one member of a physical fold; None where building dW and reading it costs less, unless `always`."""
    out, inward = graph.open("out"), graph.open("in")
    own = sub_network(graph, graph.nodes, (out,))
    again = {i: i if i in (*out, *inward) else f"{i} again" for i, _ in graph.sizes}  # no index has a space in its name
    none = (False,) * len(own.names)
    crossed = Equation(
        ("W", *own.names), ((*out, *inward), *own.inputs), (shape, *own.shapes), (False, *none), own.result, own.sizes
    )
    squared = Equation(
        (*own.names, *(f"{name} again" for name in own.names)),
        (*own.inputs, *(tuple(again[i] for i in term) for term in own.inputs)),
        own.shapes * 2,
        none * 2,
        own.result,
        (*own.sizes, *((again[i], s) for i, s in own.sizes if again[i] != i)),
    )
    found = RowProducts(plan_equation(crossed, "delta", device, optimize), plan_equation(squared, "delta", device, optimize))
    if always:
        return found
    # Forward alone, as norms have no gradient by default. dW is written, read with W for their sum, and the sum is read.
    dense = _seconds(make_plan(graph, "delta", 1, device, optimize).steps, device)
    dense += 4 * ITEM * shape[0] * shape[1] / device.bandwidth + 2 * device.latency
    apart = _seconds((*found.crossed.steps, *found.squared.steps), device)
    return found if apart < dense else None


def _seconds(steps: Iterable[Step], device: Device) -> float:
    """What steps take in forward alone."""
    return sum(step.price(device) / step.products for step in steps)
