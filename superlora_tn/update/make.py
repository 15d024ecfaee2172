"""Makes the adapter of a group: one torch module, of the kind that the group's fold wants."""

from __future__ import annotations

import torch

from superlora_tn.contraction.plan import Route
from superlora_tn.contraction.profile import CPU, DEVICES
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.fold import FlatGroup, Group
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter
from superlora_tn.update.flat import FlatAdapter
from superlora_tn.update.physical import PhysicalAdapter


def make_adapter(
    spec: AdapterSpec,
    group: Group,
    graph: Graph,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
    backend: str = "tensorly_torch",
    route: Route | None = None,
    optimize: Optimizer = "dp",
    recompute: bool = False,
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
        recompute: flat folds build dW again in backward, in place of keeping it.
    """
    place = device or torch.device("cpu")
    arguments = (spec, group, graph, backend, route, optimize, DEVICES.get(place.type, CPU))
    flat = isinstance(group, FlatGroup)
    adapter = FlatAdapter(*arguments, recompute=recompute) if flat else PhysicalAdapter(*arguments)
    adapter.fill(dtype, place, generator)
    return adapter
